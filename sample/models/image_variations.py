"""Stable Diffusion image variations (Lambda Labs, from SD 1.4): variations of a picture, and Zero-1-to-3's own base."""

from collections.abc import Mapping
from pathlib import Path as File
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..clip_image import embed_pictures, read_image_parts, recognise, tiny_image_parts
from ..latents import to_pixels, to_posterior
from ..model import Condition, DiffusionModel
from ..noise import DiscretePath
from ..pictures import cover, read_picture
from ..published import factor, fits, latent_side, needed, space_of


class ImageVariations(DiffusionModel):
    """Scaled latents of a frozen `vae`; scaled_linear path; epsilon. The U-Net's context is one token.

    Condition part "clip" (B, D): the picture's CLIP image embedding (ViT-L/14, D = 768), not normalised; null zeros.
    """

    published_as = ("StableDiffusionImageVariationPipeline",)

    def __init__(
        self,
        network: nn.Module,
        vae: AutoencoderKL | None = None,
        image_encoder: nn.Module | None = None,
        sample_size: int = 32,
        space: str | None = None,
    ):
        """sample_size: the latents' side. space: names the latents where there is no autoencoder, as for a prior."""
        super().__init__()
        fits(network, 4, "SD image variations")
        self.network, self.vae, self.image_encoder = network, vae, image_encoder
        self.path = DiscretePath.scaled_linear()
        self.prediction = "epsilon"
        self.ladder = (frozenset({"clip"}),)
        self.shape = (4, sample_size, sample_size)
        self.space = space_of(vae, space)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | File,
        *,
        revision: str | None = None,
        resolution: int = 256,
        weights: Literal["ema", "model"] | None = None,
        prior_only: bool = False,
        num_heads: int | None = None,
        image_heads: int | None = None,
    ) -> "ImageVariations":
        """The model from a pipeline's folder, an original file, or either on the Hub
        ("lambdalabs/sd-image-variations-diffusers"); the other arguments are those of `clip_image.read_image_parts`.

        prior_only: keeps the network alone. FileNotFoundError; ValueError says what does not fit.
        """
        name = pretrained_model_name_or_path
        options: dict[str, Any] = {"num_heads": num_heads, "image_heads": image_heads}
        parts = read_image_parts(name, revision=revision, weights=weights, **options)
        side = latent_side(parts.network, parts.vae, resolution)
        model = cls(parts.network, parts.vae, parts.image_encoder, side)
        return cls(parts.network, sample_size=side, space=model.space) if prior_only else model

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        return f"SD image variations, {kind}" if (kind := recognise(shapes, in_channels=4)) else None

    @classmethod
    def tiny(cls) -> "ImageVariations":
        parts = tiny_image_parts(in_channels=4)
        return cls(parts.network, parts.vae, parts.image_encoder, sample_size=8)

    def config(self) -> dict[str, Any]:
        return {"sample_size": self.shape[1], "space": self.space}

    def posterior(self, pixels: Tensor) -> Tensor:
        return to_posterior(needed(self.vae), pixels)

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        """ "clip": embeddings (B, D), as they are; else "image": the pictures, pixels (B, 3, H, W) in [0, 1]."""
        return {"clip": batch["clip"] if "clip" in batch else embed_pictures(self.image_encoder, batch["image"])}

    def read_condition(self, **values: str) -> dict[str, Any]:
        """A batch of one from image=FILE; the picture is resized and its centre cut out."""
        if set(values) != {"image"}:
            raise ValueError(f"the conditions to give are ['image'], got {sorted(values)}")
        picture = cover(read_picture(values["image"])[None], self.shape[1] * factor(needed(self.vae)))
        return {"image": picture.expand(-1, 3, -1, -1)}

    def null(self, condition: Condition) -> Condition:
        config: Any = self.network.config
        absent = torch.empty(1, config.cross_attention_dim, device=next(self.network.parameters()).device)
        return {"clip": torch.zeros_like(condition.get("clip", absent))}

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network(x_t, t, condition["clip"][:, None].to(x_t.dtype), return_dict=False)[0]

    def decode(self, x_0: Tensor) -> Tensor:
        return to_pixels(needed(self.vae), x_0)
