"""DynamiCrafter (Xing et al. 2023, arXiv 2310.12190): a picture set in motion, or what lies between two."""

from collections.abc import Mapping
from pathlib import Path as File
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .. import video, video_layouts
from ..latents import latent_space, to_latents
from ..model import Condition, DiffusionModel
from ..noise import DiscretePath, Prediction
from ..open_clip import encode_tokens
from ..published import factor, needed, space_of
from ..text import encode_text
from ..video_network import VideoNetwork, load_video_network, with_picture
from .videocrafter import VideoCrafter

LICENCE = "Apache-2.0"
"""Of the published weights, whose base is VideoCrafter's."""
Rate = Literal["frame_stride", "fps"]
Version = Literal["256", "512", "1024"]
_LATER = {"prediction": "v_prediction", "zero_terminal_snr": True, "rate": "fps"}
VERSIONS: dict[str, dict[str, Any]] = {
    "256": {"rate": "frame_stride", "default_rate": 3},
    "512": {**_LATER, "least_scale": 0.7, "default_rate": 24},
    "1024": {**_LATER, "least_scale": 0.3, "default_rate": 10},
}
"""What the published models were trained with, besides their networks."""
RESOLUTIONS = {"256": (256, 256), "512": (320, 512), "1024": (576, 1024)}


class DynamiCrafter(DiffusionModel):
    """Scaled latents of a frozen `vae`, frame by frame; scaled_linear path, epsilon (256), or that path with zero
    terminal SNR and scaled data, v (512, 1024); see VERSIONS.

    Condition parts, of which two are dropped: "text" (B, N, D), open_clip's text context as in VideoCrafter, null that
    of the empty prompt, `null_text`; "image" (B, M, D'), all tokens of open_clip's image tower for the picture
    (ViT-H/14; 257 x 1280), from which the network's own resampler makes 16 per frame, null those of a picture that is 0
    in [-1, 1], `null_image`. Never dropped: "frame" (B, 4, 1 or F, h, w), the picture's latents, SCALED, concatenated
    to x_t at every frame; and the rate (B,), "frame_stride" in the 256 model and "fps" in the others.

    As the frame is never dropped, its null still sees the picture: a text-to-video prior does not. Two scales, image's
    first: the paper's 1.5 and 7.5. Equal scales (s, s) are the authors' default of one scale that drops both together:
    `guide` then skips the rung between.

    interpolation: "frame" holds the first and the last picture's latents in their places, zeros between.
    """

    added = ("unet.conv_in", "unet.time_embedding.rate", "image_projection", "image_attention")
    null_text: Tensor
    null_image: Tensor

    def __init__(
        self,
        network: VideoNetwork,
        null_text: Tensor,
        null_image: Tensor,
        vae: AutoencoderKL | None = None,
        text_encoder: nn.Module | None = None,
        image_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        prediction: Prediction = "epsilon",
        zero_terminal_snr: bool = False,
        least_scale: float = 1.0,
        rate: Rate = "frame_stride",
        default_rate: int = 3,
        interpolation: bool = False,
        sample_size: tuple[int, int] = (32, 32),
        space: str | None = None,
    ):
        """least_scale: as in VideoCrafter. default_rate: where nothing is said. sample_size: the latents' height and
        width. space: names the latents where there is no autoencoder."""
        super().__init__()
        config: Any = network.config
        if config.in_channels != 8 or not config.image_width or not config.rate:
            raise ValueError(
                "DynamiCrafter takes 8 input channels, a picture and a rate: this network is VideoCrafter's"
            )
        self.network, self.vae, self.tokenizer = network, vae, tokenizer
        self.text_encoder, self.image_encoder = text_encoder, image_encoder
        self.register_buffer("null_text", null_text)
        self.register_buffer("null_image", null_image)
        self.zero_terminal_snr, self.least_scale = zero_terminal_snr, least_scale
        # The authors' sampler leaves its result scaled as at its last time.
        self.path = DiscretePath.scaled_linear().scaling(
            least_scale, zero_terminal_snr=zero_terminal_snr, ends_scaled=True
        )
        self.prediction, self.rate, self.default_rate = prediction, rate, default_rate
        self.ladder = (frozenset({"image"}), frozenset({"image", "text"}))
        self.always, self.interpolation = frozenset({"frame", rate}), interpolation
        self.shape = (4, config.frames, *sample_size)
        self.space = space_of(vae, space)

    @classmethod
    def from_base(
        cls,
        base: DiffusionModel,
        image_encoder: nn.Module | str | None = None,
        resolution: tuple[int, int] = (256, 256),
        interpolation: bool = False,
    ) -> "DynamiCrafter":
        """A model to fine-tune from VideoCrafter, which is left as it is; they share all but the network.

        The new input channels, the picture's values in each layer, and (where the base has none) the rate's embedding
        start at zero, so that every first prediction is the base's with the same text. Schedule, scaling of the data
        and the layers along time stay the base's. image_encoder: open_clip's image tower (ViT-H/14), or a folder, Hub
        id or original file that has it. ValueError where the base is no VideoCrafter, or came without its encoders.
        """
        if not isinstance(base, VideoCrafter):
            raise ValueError(f"DynamiCrafter starts from VideoCrafter, got {type(base).__name__}")
        tower = video.image_tower_from(image_encoder) if isinstance(image_encoder, str) else image_encoder
        if base.vae is None or base.text_encoder is None or tower is None:
            raise ValueError("the base came without its encoders: load it without prior_only, and give image_encoder")
        assert isinstance(base.network, VideoNetwork)
        network = with_picture(base.network, tower.config.hidden_size)  # type: ignore[union-attr, arg-type]
        rate: dict[str, Any] = {"rate": "fps", "default_rate": 16} if base.always else VERSIONS["256"]
        model = cls(
            network,
            base.null_text.clone(),
            encode_tokens(tower, video.grey(tower)),
            base.vae,
            base.text_encoder,
            tower,
            base.tokenizer,
            least_scale=base.least_scale,
            interpolation=interpolation,
            sample_size=video.latent_size(base.vae, network, resolution),
            **rate,
        )
        model.licence = base.licence
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | File,
        *,
        revision: str | None = None,
        version: Version | None = None,
        resolution: tuple[int, int] | None = None,
        interpolation: bool = False,
        weights: Literal["ema", "model"] | None = None,
        tokenizer: str | None = None,
        prior_only: bool = False,
        projection_heads: int | None = None,
        text_heads: int | None = None,
        image_heads: int | None = None,
    ) -> "DynamiCrafter":
        """The model from an original file, here or on the Hub ("Doubiiu/DynamiCrafter_512/model.ckpt"); the other
        arguments are those of `video.read_video_parts`.

        version: needed where the file has no table of its schedule. resolution: height and width, by default the
        version's. interpolation: the file was trained for it, which it does not tell. prior_only: keeps the network and
        its nulls alone. FileNotFoundError; ValueError says what does not fit.
        """
        name = pretrained_model_name_or_path
        parts = video.read_video_parts(
            name,
            picture=True,
            revision=revision,
            weights=weights,
            tokenizer=tokenizer,
            projection_heads=projection_heads,
            text_heads=text_heads,
            image_heads=image_heads,
        )
        told = _version(parts)
        if told is None and version is None:
            raise ValueError(
                f"{name} has no table of what it scales the data by (scale_arr): give version, 512 or 1024"
            )
        if told is not None and version not in (None, told):
            raise ValueError(f"{name} is DynamiCrafter {told}, not {version}")
        version = told or version
        assert version is not None
        if parts.zero_terminal_snr not in (None, VERSIONS[version].get("zero_terminal_snr", False)):
            raise ValueError(f"{name} has another noise schedule than DynamiCrafter {version}")
        size = video.latent_size(parts.vae, parts.network, resolution or RESOLUTIONS[version])
        options: dict[str, Any] = {**VERSIONS[version], "interpolation": interpolation, "sample_size": size}
        if prior_only:
            options["space"] = latent_space(parts.vae)
        else:
            options |= {"vae": parts.vae, "text_encoder": parts.text_encoder, "tokenizer": parts.tokenizer}
            options["image_encoder"] = parts.image_encoder
        assert parts.null_image is not None
        model = cls(parts.network, parts.null_text, parts.null_image, **options)
        model.licence = LICENCE
        return model

    @classmethod
    def load_network(cls, folder: str) -> nn.Module:
        return load_video_network(folder)

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        shapes = {video_layouts.unwrapped(name): shape for name, shape in shapes.items()}
        if not video_layouts.is_video(shapes) or not video_layouts.takes_picture(shapes):
            return None
        return f"DynamiCrafter {'256' if video_layouts.is_256(shapes) else '512 or 1024, or 512 for interpolation'}"

    @classmethod
    def tiny(cls, version: Version = "256", interpolation: bool = False) -> "DynamiCrafter":
        parts = video.tiny_video_parts(image=True, rate=True, learned_gain=version == "256")
        assert parts.null_image is not None
        encoders = (parts.vae, parts.text_encoder, parts.image_encoder, parts.tokenizer)
        options: dict[str, Any] = {**VERSIONS[version], "interpolation": interpolation, "sample_size": (8, 8)}
        return cls(parts.network, parts.null_text, parts.null_image, *encoders, **options)

    def config(self) -> dict[str, Any]:
        return {
            "prediction": self.prediction,
            "zero_terminal_snr": self.zero_terminal_snr,
            "least_scale": self.least_scale,
            "rate": self.rate,
            "default_rate": self.default_rate,
            "interpolation": self.interpolation,
            "sample_size": list(self.shape[2:]),
            "space": self.space,
        }

    def posterior(self, pixels: Tensor) -> Tensor:
        """Of clips (B, 3, F, H, W) in [0, 1]."""
        return video.clip_posterior(needed(self.vae), pixels)

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        """ "image": the picture, pixels (B, 3, H, W) in [0, 1], for interpolation with "last", or its tokens (B, M, D')
        beside its latents "frame"; where there is none, the first frame of "pixels", and the last. "text": prompts,
        token ids (B, N), or contexts (B, N, D). "frame_stride" or "fps" (B,): `default_rate` where there is none."""
        text = encode_text(batch["text"], self.text_encoder, self.tokenizer)
        rate = batch.get(self.rate, self._absent(self.rate).to(text.device).expand(len(text))).float()
        image = batch["image"] if "image" in batch else batch["pixels"][:, :, 0]
        if image.ndim == 3:
            if "frame" not in batch:
                raise ValueError("a picture given as tokens needs its latents too, as frame (B, 4, 1 or F, h, w)")
            return {"text": text, "image": image, "frame": batch["frame"], self.rate: rate}
        frame = self._latents(image)
        if self.interpolation:
            if "last" not in batch and "pixels" not in batch:
                raise ValueError("interpolation needs the last picture too, as last (B, 3, H, W)")
            last = self._latents(batch["last"] if "last" in batch else batch["pixels"][:, :, -1])
            between = torch.zeros_like(frame).expand(-1, -1, self.shape[1] - 2, -1, -1)
            frame = torch.cat([frame, between, last], 2)
        return {"text": text, "image": encode_tokens(self.image_encoder, image), "frame": frame, self.rate: rate}

    def read_condition(self, **values: str) -> dict[str, Any]:
        """image=FILE, resized to cover the frame and its centre cut out; last=FILE for interpolation; text=PROMPT; and
        frame_stride=NUMBER or fps=NUMBER, whichever the model takes, or neither."""
        pictures = ("image", "last") if self.interpolation else ("image",)
        if set(values) - {self.rate} != {"text", *pictures}:
            wanted = ", ".join(["text", *pictures])
            raise ValueError(f"the conditions to give are {wanted}, and {self.rate} or not, got {sorted(values)}")
        rate: dict[str, Any] = {self.rate: video.read_rate(self.rate, values[self.rate])} if self.rate in values else {}
        frames = {name: video.read_frame(values[name], self._resolution()) for name in pictures}
        return {"text": [values["text"]], **frames, **rate}

    def null(self, condition: Condition) -> Condition:
        text, image = condition.get("text", self.null_text), condition.get("image", self.null_image)
        kept = {name: condition[name] if name in condition else self._absent(name) for name in self.always}
        return {
            "text": self.null_text.to(text).expand_as(text),
            "image": self.null_image.to(image).expand_as(image),
            **kept,
        }

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        frame = condition["frame"].to(x_t.dtype).expand(-1, -1, self.shape[1], -1, -1)
        text, image = (condition[name].to(x_t.dtype) for name in ("text", "image"))
        return self.network(torch.cat([x_t, frame], 1), t, text, condition[self.rate], image)

    def decode(self, x_0: Tensor) -> Tensor:
        return video.decode_clips(needed(self.vae), x_0)

    def _absent(self, name: str) -> Tensor:
        """A part that is never dropped, where nothing is said: an empty frame, the default rate."""
        if name == self.rate:
            return self.null_text.new_tensor([float(self.default_rate)])
        return self.null_text.new_zeros(1, 4, self.shape[1] if self.interpolation else 1, *self.shape[2:])

    def _latents(self, picture: Tensor) -> Tensor:
        if picture.shape[1:] != (3, *self._resolution()):
            wanted = ", ".join(map(str, ("B", 3, *self._resolution())))
            raise ValueError(f"a picture must have shape ({wanted}), got {tuple(picture.shape)}")
        return to_latents(needed(self.vae), picture)[:, :, None]

    def _resolution(self) -> video.Size:
        side = factor(needed(self.vae))
        return self.shape[2] * side, self.shape[3] * side


def _version(parts: video.VideoParts) -> Version | None:
    """Which of the published models a file is; None where it does not tell."""
    if parts.rate == "framestride_embed" or parts.network.config["learned_gain"]:
        return "256"
    versions: dict[float, Version] = {0.7: "512", 0.3: "1024"}
    return None if parts.least_scale is None else versions.get(parts.least_scale)
