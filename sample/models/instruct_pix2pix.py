"""InstructPix2Pix (Brooks et al. 2022, arXiv 2211.09800): a picture edited as an instruction says."""

from collections.abc import Mapping
from pathlib import Path as File
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from .. import ldm
from ..latents import to_latents, to_pixels, to_posterior
from ..model import Condition, DiffusionModel, picture_sides, plain_config
from ..noise import DiscretePath, Prediction
from ..pictures import cover
from ..published import factor, fits, latent_side, least_side, needed, read_parts, space_of, tiny_parts
from ..text import encode_text
from .stable_diffusion import StableDiffusion

LICENCE = "MIT"
"""Of the published weights, whose base is under CreativeML OpenRAIL-M."""


class InstructPix2Pix(DiffusionModel):
    """Scaled latents of a frozen `vae`; scaled_linear path; epsilon, as its base has it.

    Condition parts: "image" (B, 4, h, w), the mode of the input picture's latents, NOT scaled, concatenated to x_t,
    null the zero latent; "text" (B, N, D), the instruction's context, null that of the empty prompt, `null_text`.
    Two scales: the image's first (the authors' 1.5), then the text's (7.5); the paper's equation 3.
    """

    added = ("conv_in",)
    published_as = ("StableDiffusionInstructPix2PixPipeline",)
    null_text: Tensor

    def __init__(
        self,
        network: nn.Module,
        null_text: Tensor,
        vae: AutoencoderKL | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        prediction: Prediction = "epsilon",
        sample_size: int = 32,
        space: str | None = None,
    ):
        """sample_size: the latents' side. space: names the latents where there is no autoencoder, as for a prior."""
        super().__init__()
        fits(network, 8, "InstructPix2Pix")
        self.network, self.vae, self.text_encoder, self.tokenizer = network, vae, text_encoder, tokenizer
        self.register_buffer("null_text", null_text)
        self.path = DiscretePath.scaled_linear()
        self.prediction = prediction
        self.ladder = (frozenset({"image"}), frozenset({"image", "text"}))
        self.shape = (4, sample_size, sample_size)
        self.space = space_of(vae, space)

    @classmethod
    def from_base(cls, base: DiffusionModel, resolution: int = 256) -> "InstructPix2Pix":
        """A model to fine-tune from Stable Diffusion, which is left as it is; they share all but the network.

        The four new input channels start at zero, so that every first prediction is the base's with the same text.
        ValueError where the base is no Stable Diffusion, or came without its encoders.
        """
        if not isinstance(base, StableDiffusion):
            raise ValueError(f"InstructPix2Pix starts from Stable Diffusion, got {type(base).__name__}")
        if base.vae is None or base.text_encoder is None:
            raise ValueError("the base came without its encoders: load it without prior_only")
        old: Any = base.network
        with torch.device("meta"):
            network = UNet2DConditionModel(**{**plain_config(old), "in_channels": 8})
        state = {name: tensor.clone() for name, tensor in old.state_dict().items()}
        kernel = state["conv_in.weight"]
        state["conv_in.weight"] = torch.cat([kernel, torch.zeros_like(kernel)], 1)
        network.load_state_dict(state, assign=True)
        null = base.null_text.clone()
        side = latent_side(network, base.vae, resolution)
        model = cls(network, null, base.vae, base.text_encoder, base.tokenizer, base.prediction, side)
        model.licence = base.licence
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | File,
        *,
        revision: str | None = None,
        resolution: int = 256,
        weights: Literal["ema", "model"] | None = None,
        tokenizer: str | None = None,
        prior_only: bool = False,
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        text_heads: int | None = None,
    ) -> "InstructPix2Pix":
        """The model from a pipeline's folder, an original file, or either on the Hub; the other arguments are those of
        `published.read_parts`. FileNotFoundError; ValueError says what does not fit, a Zero-1-to-3 file for one."""
        parts = read_parts(
            pretrained_model_name_or_path,
            revision=revision,
            weights=weights,
            tokenizer=tokenizer,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            text_heads=text_heads,
        )
        parts.prediction = parts.prediction or "epsilon"
        side = latent_side(parts.network, needed(parts.vae), resolution)
        model = cls(**vars(parts.alone() if prior_only else parts), sample_size=side)
        model.licence = LICENCE
        return model

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        return f"InstructPix2Pix on SD {kind}" if (kind := ldm.kind(shapes, in_channels=8)) else None

    @classmethod
    def tiny(cls) -> "InstructPix2Pix":
        return cls(**vars(tiny_parts(in_channels=8)), sample_size=8)

    def config(self) -> dict[str, Any]:
        return {"prediction": self.prediction, "sample_size": self.shape[1], "space": self.space}

    @property
    def side_step(self) -> int:  # type: ignore[override]
        return least_side(self.network, needed(self.vae))

    def posterior(self, pixels: Tensor) -> Tensor:
        return to_posterior(needed(self.vae), pixels)

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        """ "image": pixels (B, 3, R, R) in [0, 1], beside oblong "pixels" (B, 3, H, W) of their sides, or latents
        (B, 4, h, w); "text": prompts, token ids, or contexts."""
        image = batch["image"]
        if image.shape[1] != self.shape[0]:
            vae, (height, width) = needed(self.vae), picture_sides(batch, self._resolution())
            if image.shape[1:] != (3, height, width):
                expected = f"(B, 3, {height}, {width})"
                raise ValueError(f"the input picture must have shape {expected}, got {tuple(image.shape)}")
            image = to_latents(vae, image) / vae.config["scaling_factor"]
        return {"image": image, "text": encode_text(batch["text"], self.text_encoder, self.tokenizer)}

    def read_condition(self, **values: str) -> dict[str, Any]:
        """The picture is resized and its centre cut out; see DiffusionModel."""
        batch = super().read_condition(**values)
        picture = cover(batch["image"], self._resolution())
        return {**batch, "image": picture.expand(-1, 3, -1, -1)}

    def null(self, condition: Condition) -> Condition:
        text = condition.get("text", self.null_text)
        image = condition.get("image", torch.zeros(1, *self.shape, device=self.null_text.device))
        return {"image": torch.zeros_like(image), "text": self.null_text.to(text).expand_as(text)}

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x = torch.cat([x_t, condition["image"].to(x_t.dtype)], 1)
        return self.network(x, t, condition["text"].to(x_t.dtype), return_dict=False)[0]

    def decode(self, x_0: Tensor) -> Tensor:
        return to_pixels(needed(self.vae), x_0)

    def _resolution(self) -> int:
        return self.shape[1] * factor(needed(self.vae))
