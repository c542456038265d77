"""VideoCrafter1 and 2 (arXiv 2310.19512, 2401.09047): text to video, and DynamiCrafter's base and prior."""

from collections.abc import Mapping
from pathlib import Path as File
from typing import Any, Literal

from diffusers import AutoencoderKL
from torch import Tensor, nn

from .. import video, video_layouts
from ..latents import latent_space
from ..model import Condition, DiffusionModel
from ..noise import DiscretePath
from ..published import needed, space_of
from ..text import encode_text
from ..video_network import VideoNetwork, load_video_network

LICENCE = "VideoCrafter (research only)"
"""Of the published weights."""
FPS = 16
"""What the network is given where nothing is said, as its authors have it."""


class VideoCrafter(DiffusionModel):
    """Scaled latents of a frozen `vae`, frame by frame; scaled_linear path; epsilon.

    Condition parts: "text" (B, N, D), open_clip's text context (ViT-H/14, its last layer but one after the final norm;
    N = 77, D = 1024), null that of the empty prompt, `null_text`; and where the network takes it, which that of
    VideoCrafter1 512 does not, "fps" (B,), never dropped.

    least_scale: the data are multiplied by 1 at t = 0 down to this at t = 399 and above: 1 for VideoCrafter1 512, 0.3
    for its 1024, 0.7 for VideoCrafter2.
    """

    null_text: Tensor

    def __init__(
        self,
        network: VideoNetwork,
        null_text: Tensor,
        vae: AutoencoderKL | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        least_scale: float = 1.0,
        sample_size: tuple[int, int] = (40, 64),
        space: str | None = None,
    ):
        """sample_size: the latents' height and width. space: names the latents where there is no autoencoder."""
        super().__init__()
        config: Any = network.config
        if config.in_channels != 4 or config.image_width:
            raise ValueError("VideoCrafter takes 4 input channels and no picture: this network is DynamiCrafter's")
        self.network, self.vae, self.text_encoder, self.tokenizer = network, vae, text_encoder, tokenizer
        self.register_buffer("null_text", null_text)
        self.least_scale = least_scale
        self.path = DiscretePath.scaled_linear().scaling(least_scale)
        self.prediction = "epsilon"
        self.ladder = (frozenset({"text"}),)
        self.always = frozenset({"fps"} if config.rate else ())
        self.shape = (4, config.frames, *sample_size)
        self.space = space_of(vae, space)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | File,
        *,
        revision: str | None = None,
        resolution: tuple[int, int] = (320, 512),
        frames: int = 16,
        least_scale: float | None = None,
        weights: Literal["ema", "model"] | None = None,
        tokenizer: str | None = None,
        prior_only: bool = False,
        text_heads: int | None = None,
    ) -> "VideoCrafter":
        """The model from an original file, here or on the Hub ("VideoCrafter/VideoCrafter2/model.ckpt"); the other
        arguments are those of `video.read_video_parts`.

        resolution: height and width of its frames. least_scale: needed where the file has no table of it (scale_arr)
        but takes frames per second, as VideoCrafter1 1024 (0.3) and VideoCrafter2 (0.7) do. prior_only: keeps the
        network and its null alone. FileNotFoundError; ValueError says what does not fit.
        """
        name = pretrained_model_name_or_path
        parts = video.read_video_parts(
            name,
            picture=False,
            revision=revision,
            weights=weights,
            tokenizer=tokenizer,
            frames=frames,
            text_heads=text_heads,
        )
        config: Any = parts.network.config
        if parts.zero_terminal_snr:
            raise ValueError(f"{name} ends at an SNR of 0, as no VideoCrafter does")
        if parts.least_scale is not None and least_scale not in (None, parts.least_scale):
            raise ValueError(f"{name} scales the data down to {parts.least_scale}, not {least_scale}")
        least = least_scale if parts.least_scale is None else parts.least_scale
        if least is None and config.rate:
            raise ValueError(
                f"{name} has no table of what it scales the data by (scale_arr): give least_scale, 0.3 for "
                "VideoCrafter1 1024, 0.7 for VideoCrafter2"
            )
        size = video.latent_size(parts.vae, parts.network, resolution)
        options: dict[str, Any] = {"least_scale": 1.0 if least is None else least, "sample_size": size}
        if prior_only:
            options["space"] = latent_space(parts.vae)
        else:
            options |= {"vae": parts.vae, "text_encoder": parts.text_encoder, "tokenizer": parts.tokenizer}
        model = cls(parts.network, parts.null_text, **options)
        model.licence = LICENCE
        return model

    @classmethod
    def load_network(cls, folder: str) -> nn.Module:
        return load_video_network(folder)

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        shapes = {video_layouts.unwrapped(name): shape for name, shape in shapes.items()}
        if not video_layouts.is_video(shapes) or video_layouts.takes_picture(shapes):
            return None
        if not video_layouts.rate_in(shapes):
            return "VideoCrafter1 512"
        return "VideoCrafter1 1024" if video_layouts.is_relative(shapes) else "VideoCrafter2"

    @classmethod
    def tiny(cls, least_scale: float = 1.0) -> "VideoCrafter":
        """As VideoCrafter1 512, or where the data are scaled, VideoCrafter2."""
        sizes = {"rate": True} if least_scale < 1 else {"temporal_conv": False, "relative": 4}
        parts = video.tiny_video_parts(image=False, **sizes)
        options: dict[str, Any] = {"least_scale": least_scale, "sample_size": (8, 8)}
        return cls(parts.network, parts.null_text, parts.vae, parts.text_encoder, parts.tokenizer, **options)

    def config(self) -> dict[str, Any]:
        return {"least_scale": self.least_scale, "sample_size": list(self.shape[2:]), "space": self.space}

    def posterior(self, pixels: Tensor) -> Tensor:
        """Of clips (B, 3, F, H, W) in [0, 1]."""
        return video.clip_posterior(needed(self.vae), pixels)

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        """ "text": prompts, token ids (B, N), or contexts (B, N, D); "fps" (B,), 16 where there is none."""
        text = encode_text(batch["text"], self.text_encoder, self.tokenizer)
        if not self.always:
            return {"text": text}
        fps = batch.get("fps", self._absent().to(text.device).expand(len(text)))
        return {"text": text, "fps": fps.float()}

    def read_condition(self, **values: str) -> dict[str, Any]:
        """text=PROMPT, and fps=NUMBER where the network takes it."""
        if "text" not in values or set(values) - {"text", *self.always}:
            raise ValueError(f"the conditions to give are {sorted({'text', *self.always})}, got {sorted(values)}")
        rate = {"fps": video.read_rate("fps", values["fps"])} if "fps" in values else {}
        return {"text": [values["text"]], **rate}

    def null(self, condition: Condition) -> Condition:
        text = condition.get("text", self.null_text)
        null = {"text": self.null_text.to(text).expand_as(text)}
        return {**null, "fps": condition.get("fps", self._absent())} if self.always else null

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network(x_t, t, condition["text"].to(x_t.dtype), condition.get("fps"))

    def decode(self, x_0: Tensor) -> Tensor:
        return video.decode_clips(needed(self.vae), x_0)

    def _absent(self) -> Tensor:
        return self.null_text.new_tensor([float(FPS)])
