"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv 2112.10752): text to image, and a prior for its kin."""

from collections.abc import Mapping
from pathlib import Path as File
from typing import Any, Literal

from diffusers import AutoencoderKL
from torch import Tensor, nn

from .. import ldm
from ..latents import to_pixels, to_posterior
from ..model import Condition, DiffusionModel
from ..noise import DiscretePath, Prediction
from ..published import fits, latent_side, least_side, needed, read_parts, space_of, tiny_parts
from ..text import encode_text


class StableDiffusion(DiffusionModel):
    """Scaled latents of a frozen `vae`; scaled_linear path; epsilon (1.x, 2-base, 2.1-base) or v (2.0, 2.1).

    Condition part "text" (B, N, D): the text encoder's last hidden state (N = 77; D = 768 in 1.x, 1024 in 2.x). Null:
    that of the empty prompt, held as `null_text` (1, N, D), so that a prior needs no text encoder.
    """

    published_as = ("StableDiffusionPipeline",)
    null_text: Tensor

    def __init__(
        self,
        network: nn.Module,
        null_text: Tensor,
        vae: AutoencoderKL | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        prediction: Prediction = "epsilon",
        sample_size: int = 64,
        space: str | None = None,
    ):
        """sample_size: the latents' side. space: names the latents where there is no autoencoder, as for a prior."""
        super().__init__()
        fits(network, 4, "Stable Diffusion")
        self.network, self.vae, self.text_encoder, self.tokenizer = network, vae, text_encoder, tokenizer
        self.register_buffer("null_text", null_text)
        self.path = DiscretePath.scaled_linear()
        self.prediction = prediction
        self.ladder = (frozenset({"text"}),)
        self.shape = (4, sample_size, sample_size)
        self.space = space_of(vae, space)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | File,
        *,
        revision: str | None = None,
        prediction: Prediction | None = None,
        resolution: int = 512,
        weights: Literal["ema", "model"] | None = None,
        tokenizer: str | None = None,
        prior_only: bool = False,
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        text_heads: int | None = None,
    ) -> "StableDiffusion":
        """The model from a pipeline's folder, an original file, or either on the Hub; the other arguments are those of
        `published.read_parts`.

        prediction: needed for original files of 2.x, which do not tell. prior_only: keeps the network and its null
        alone. FileNotFoundError; ValueError says what does not fit.
        """
        parts = read_parts(
            pretrained_model_name_or_path,
            revision=revision,
            weights=weights,
            tokenizer=tokenizer,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            text_heads=text_heads,
        )
        if parts.prediction is None and prediction is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} is Stable Diffusion 2.x, whose files do not tell what they predict: "
                "give prediction, 'v_prediction' (2.0, 2.1) or 'epsilon' (2-base, 2.1-base)"
            )
        if prediction is not None and parts.prediction not in (None, prediction):
            raise ValueError(f"{pretrained_model_name_or_path} predicts {parts.prediction}, not {prediction}")
        parts.prediction = parts.prediction or prediction
        side = latent_side(parts.network, needed(parts.vae), resolution)
        model = cls(**vars(parts.alone() if prior_only else parts), sample_size=side)
        version_1 = parts.null_text.shape[-1] == 768
        model.licence = "CreativeML OpenRAIL-M" if version_1 else "CreativeML OpenRAIL++-M"
        return model

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        return f"Stable Diffusion {kind}" if (kind := ldm.kind(shapes, in_channels=4)) else None

    @classmethod
    def tiny(cls) -> "StableDiffusion":
        return cls(**vars(tiny_parts(in_channels=4)), sample_size=8)

    def config(self) -> dict[str, Any]:
        return {"prediction": self.prediction, "sample_size": self.shape[1], "space": self.space}

    @property
    def side_step(self) -> int:  # type: ignore[override]
        return least_side(self.network, needed(self.vae))

    def posterior(self, pixels: Tensor) -> Tensor:
        return to_posterior(needed(self.vae), pixels)

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        """ "text": prompts, token ids (B, N), or contexts (B, N, D)."""
        return {"text": encode_text(batch["text"], self.text_encoder, self.tokenizer)}

    def null(self, condition: Condition) -> Condition:
        text = condition.get("text", self.null_text)
        return {"text": self.null_text.to(text).expand_as(text)}

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network(x_t, t, condition["text"].to(x_t.dtype), return_dict=False)[0]

    def decode(self, x_0: Tensor) -> Tensor:
        return to_pixels(needed(self.vae), x_0)
