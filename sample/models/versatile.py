"""Versatile Diffusion's image flow (Xu et al. 2022, arXiv 2211.08332): pictures from a picture, from text, or both."""

from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models import DualTransformer2DModel
from PIL import Image
from torch import Tensor, nn

from .. import published
from .. import versatile_layouts as layouts
from ..checkpoint import choose_weights, read_checkpoint
from ..clip_image import MEAN, STD
from ..hub import locate
from ..latents import latent_space, to_pixels, to_posterior
from ..model import Condition, DiffusionModel
from ..noise import DiscretePath, Prediction
from ..published import check_schedule, fits, latent_side, needed, read_tokenizer, space_of, tiny_parts, tiny_unet
from ..text import encode_text, null_tokens
from .stable_diffusion import StableDiffusion

LICENCE = "MIT"
"""Of the published weights."""


class VersatileDiffusion(DiffusionModel):
    """Scaled latents of a frozen `vae`; scaled_linear path; epsilon. `context`: what it is conditioned on.

    "image" (variations): part "image" (B, 257, D), CLIP's projected picture tokens over the norm of the first one; null
    zeros, `null_image`. "text": part "text" (B, 77, D), CLIP's projected word tokens over the norm of the projected
    pooled one; null that of the empty prompt, `null_text`. "dual": both, whose attention blocks' outputs are averaged
    with `text_weight` and 1 - `text_weight`; one scale guides them together.

    The authors' autoencoder takes [0, 1] and maps it to [-1, 1] itself, so that the latents are Stable Diffusion's, and
    `space` names its encoder's weights alone: with SD 1.x's own, SD 1.x and its kin fit as priors.
    """

    published_as = (
        "VersatileDiffusionPipeline",
        "VersatileDiffusionImageVariationPipeline",
        "VersatileDiffusionTextToImagePipeline",
        "VersatileDiffusionDualGuidedPipeline",
    )
    null_text: Tensor | None
    null_image: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        null_text: Tensor | None = None,
        null_image: Tensor | None = None,
        vae: AutoencoderKL | None = None,
        text_encoder: nn.Module | None = None,
        image_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        context: layouts.Context = "image",
        text_weight: float = 0.5,
        sample_size: int = 64,
        space: str | None = None,
    ):
        """The nulls (1, N, D) are those of the context's parts. sample_size: the latents' side. space: names the
        latents where there is no autoencoder, as for a prior. ValueError for a network of another context."""
        super().__init__()
        fits(network, 4, "Versatile Diffusion")
        parts = layouts.kinds_of(context)
        both = bool(network.config["dual_cross_attention"])  # type: ignore[index, union-attr]
        if both != (context == "dual"):
            raise ValueError(f"context is {context!r}, but the U-Net attends to {'both' if both else 'one'}")
        if not 0 <= text_weight <= 1:
            raise ValueError(f"text_weight must lie in [0, 1], got {text_weight}")
        self.network, self.vae, self.tokenizer = network, vae, tokenizer
        self.text_encoder, self.image_encoder = text_encoder, image_encoder
        for name, null in (("text", null_text), ("image", null_image)):
            if (null is None) == (name in parts):
                raise ValueError(f"null_{name} must be {'given' if name in parts else 'left out'} with {context=}")
            self.register_buffer(f"null_{name}", null)
        self.path = DiscretePath.scaled_linear()
        self.prediction: Prediction = "epsilon"
        self.context, self.text_weight = context, text_weight
        self.ladder = (frozenset(parts),)
        self.shape = (4, sample_size, sample_size)
        self.space = space_of(vae, space)
        for block in _dual(network):
            block.register_forward_pre_hook(_without_mask, with_kwargs=True)

    @classmethod
    def from_base(
        cls,
        base: DiffusionModel,
        clip: str,
        context: layouts.Context = "image",
        text_weight: float = 0.5,
        resolution: int = 512,
    ) -> "VersatileDiffusion":
        """A model to fine-tune from Stable Diffusion 1.x, which is left as it is; they share the autoencoder.

        clip: a folder or Hub id with CLIP's towers and tokenizer (openai/clip-vit-large-patch14). The null text is the
        base's own context of the empty prompt, so that with text the first unconditional predictions are the base's;
        the null picture is zeros, which the base does not know. ValueError where the base is no Stable Diffusion, came
        without its autoencoder, or takes contexts of another width than this CLIP makes.
        """
        if not isinstance(base, StableDiffusion):
            raise ValueError(f"Versatile Diffusion starts from Stable Diffusion, got {type(base).__name__}")
        if base.vae is None:
            raise ValueError("the base came without its autoencoder: load it without prior_only")
        old: Any = base.network
        encoders = layouts.read_encoders(locate(clip), layouts.kinds_of(context))
        nulls, width = _nulls(encoders), old.config["cross_attention_dim"]
        for name, null in nulls.items():
            if null.shape[-1] != width:
                raise ValueError(f"the base takes contexts of width {width}, {clip} makes ones of {null.shape[-1]}")
            nulls[name] = base.null_text.clone() if name == "null_text" else null
        network = layouts.with_contexts(old, dict.fromkeys(layouts.KINDS, old.state_dict()), context)
        copies = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.load_state_dict(copies, assign=True)
        side = latent_side(network, base.vae, resolution)
        options: dict[str, Any] = {"context": context, "text_weight": text_weight, "sample_size": side}
        model = cls(network, vae=base.vae, **nulls, **encoders, **options)
        model.licence = base.licence
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | File,
        *,
        revision: str | None = None,
        context: layouts.Context = "image",
        text_weight: float = 0.5,
        resolution: int = 512,
        vae: str | None = None,
        clip: str | None = None,
        tokenizer: str | None = None,
        prior_only: bool = False,
        num_heads: int | None = None,
        text_heads: int | None = None,
        image_heads: int | None = None,
    ) -> "VersatileDiffusion":
        """The image flow from the authors' file, of 2022 or current, or a diffusers pipeline's folder, or the Hub's.

        vae: a folder, a file or a Hub id, where a file lacks its autoencoder. clip: a folder or Hub id with CLIP's
        towers and tokenizer, where it lacks those. tokenizer: likewise; without it prompts cannot be encoded, the null
        can. Heads: where the sizes are not the published ones. prior_only: keeps the network and its nulls alone. All
        in float32. FileNotFoundError; ValueError says what does not fit.
        """
        path, kinds = locate(pretrained_model_name_or_path, revision=revision), layouts.kinds_of(context)
        if (path / "image_unet").is_dir():
            check_schedule(path / "scheduler" / "scheduler_config.json")
            network = layouts.read_folder_unet(path, context)
            autoencoder = layouts.read_vae(vae or path / "vae")
            encoders = layouts.read_encoders(locate(clip) if clip else path, kinds)
        else:
            state = choose_weights(read_checkpoint(path), "state_dict", path)
            network = layouts.read_unet(state, path, context, num_heads)
            autoencoder = layouts.read_vae(vae) if vae else layouts.vae_within(state, path)
            heads = {"text": text_heads, "image": image_heads}
            if clip:
                encoders = layouts.read_encoders(locate(clip), kinds)
            else:
                encoders = {f"{kind}_encoder": layouts.read_clip(state, path, kind, heads[kind]) for kind in kinds}
        if tokenizer is not None and "text" in kinds:
            encoders["tokenizer"] = read_tokenizer(locate(tokenizer))
        nulls = _nulls(encoders)
        side = latent_side(network, autoencoder, resolution)
        options: dict[str, Any] = {"context": context, "text_weight": text_weight, "sample_size": side}
        kept = {"space": latent_space(autoencoder)} if prior_only else {"vae": autoencoder.float(), **encoders}
        model = cls(network.float(), **nulls, **options, **kept)
        model.licence = LICENCE
        return model

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        return f"Versatile Diffusion, {kind} layout" if (kind := layouts.layout(shapes)) else None

    @classmethod
    def tiny(cls, context: layouts.Context = "image", text_weight: float = 0.5) -> "VersatileDiffusion":
        parts = tiny_parts(in_channels=4)
        unet: Any = parts.network
        attention = {kind: tiny_unet(4).state_dict() for kind in layouts.KINDS}
        network = layouts.with_contexts(unet, attention, context)
        width = unet.config["cross_attention_dim"]
        encoders = layouts.tiny_encoders(width, parts.tokenizer, layouts.kinds_of(context))
        nulls = _nulls(encoders)
        options: dict[str, Any] = {"context": context, "text_weight": text_weight, "sample_size": 8}
        return cls(network, vae=parts.vae, **nulls, **encoders, **options)

    def config(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "text_weight": self.text_weight,
            "sample_size": self.shape[1],
            "space": self.space,
        }

    @property
    def side_step(self) -> int:  # type: ignore[override]
        return published.least_side(self.network, needed(self.vae))

    def posterior(self, pixels: Tensor) -> Tensor:
        return to_posterior(needed(self.vae), pixels)

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        """ "image": pixels (B, 3 or 1, H, W) in [0, 1], of any size, or contexts (B, N, D); where there is none it is
        "pixels", so that a picture is asked for by itself. "text": prompts, token ids (B, N), or contexts (B, N, D)."""
        condition: Condition = {}
        if self.null_image is not None:
            condition["image"] = encode_pictures(
                batch["image"] if "image" in batch else batch["pixels"], self.image_encoder
            )
        if self.null_text is not None:
            condition["text"] = encode_text(batch["text"], self.text_encoder, self.tokenizer, encode_projected)
        return condition

    def null(self, condition: Condition) -> Condition:
        nulls = {"image": self.null_image, "text": self.null_text}
        return {
            name: null.to(part := condition.get(name, null)).expand_as(part)
            for name, null in nulls.items()
            if null is not None
        }

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        parts = [condition[name].to(x_t.dtype) for name in ("text", "image") if name in self.ladder[0]]
        for block in _dual(self.network):  # text is its first condition, and its second transformer
            block.mix_ratio, block.condition_lengths = self.text_weight, [part.shape[1] for part in parts]
        return self.network(x_t, t, torch.cat(parts, 1), return_dict=False)[0]

    def decode(self, x_0: Tensor) -> Tensor:
        return to_pixels(needed(self.vae), x_0)


@torch.no_grad()
def encode_projected(text_encoder: Any, ids: Tensor) -> Tensor:
    """Token ids (B, N) as float32 contexts (B, N, D): all projected, over the norm of the projected pooled one."""
    out = text_encoder(ids.to(text_encoder.device))
    return (text_encoder.text_projection(out.last_hidden_state) / out.text_embeds.norm(dim=-1)[:, None, None]).float()


@torch.no_grad()
def encode_pictures(image: Tensor, image_encoder: Any) -> Tensor:
    """Pixels (B, 3 or 1, H, W) in [0, 1] as float32 contexts (B, N, D), or contexts as they are.

    All tokens after the final norm, projected, over the norm of the first. ValueError without an encoder.
    """
    if image.ndim == 3:
        return image
    if image_encoder is None:
        raise ValueError("this model came without its image encoder, so pictures must be given encoded (B, N, D)")
    pixels = clip_input(image, image_encoder.config.image_size).to(image_encoder.device, image_encoder.dtype)
    out = image_encoder(pixels).last_hidden_state
    tokens = image_encoder.visual_projection(image_encoder.vision_model.post_layernorm(out))
    return (tokens / tokens[:, :1].norm(dim=-1, keepdim=True)).float()


def clip_input(pixels: Tensor, side: int) -> Tensor:
    """Pixels (B, 3 or 1, H, W) in [0, 1] as CLIP's, normalised, (B, 3, side, side), on the CPU.

    Cut off to 8 bits, as the authors do, and resized by Pillow: no resizing of torch's gives the same pixels.
    """
    made = []
    for array in (pixels.detach().float().clamp(0, 1) * 255).to(torch.uint8).expand(-1, 3, -1, -1).movedim(1, -1).cpu():
        picture = Image.fromarray(array.numpy())
        short = min(picture.size)
        width, height = (side * length // short for length in picture.size)
        left, top = (width - side) // 2, (height - side) // 2
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        made.append(np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / 255)
    mean, std = (np.asarray(values, np.float32) for values in (MEAN, STD))
    return torch.from_numpy((np.stack(made) - mean) / std).movedim(-1, 1)


def _nulls(encoders: Mapping[str, Any]) -> dict[str, Any]:
    """Text: the empty prompt's context. Image: zeros, in drop-out and sampling alike; the authors' first script, and
    diffusers, take the context of a grey picture in sampling."""
    nulls: dict[str, Any] = {}
    if encoder := encoders.get("text_encoder"):
        length, words = encoder.config.max_position_embeddings, encoder.config.vocab_size
        nulls["null_text"] = encode_projected(encoder, null_tokens(words - 1, length, words - 2, words - 1))
    if encoder := encoders.get("image_encoder"):
        tokens = 1 + (encoder.config.image_size // encoder.config.patch_size) ** 2
        nulls["null_image"] = torch.zeros(1, tokens, encoder.config.projection_dim)
    return nulls


def _dual(network: nn.Module) -> list[Any]:
    return [block for block in network.modules() if isinstance(block, DualTransformer2DModel)]


def _without_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """diffusers' blocks hand each attention a mask (here None) which its DualTransformer2DModel does not take."""
    return args, {name: value for name, value in kwargs.items() if name != "encoder_attention_mask"}
