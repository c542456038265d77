"""CLIP's image embedding as a condition of latent diffusion, and the models that take it, as they are published."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from . import ldm
from .checkpoint import choose_weights, load_exactly, read_checkpoint, read_folder
from .hub import locate
from .latents import read_autoencoder
from .published import check_schedule, read_encoder, tiny_parts

VISUAL = "cond_stage_model.model.visual."
PROJECTION = "cc_projection."
"""Where original files keep the image tower, and Zero-1-to-3's projection."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP was trained on, by channel."""


def clip_pixels(pixels: Tensor, side: int = 224) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] as the image tower takes them, (B, 3, side, side).

    Resized as the authors of SD image variations and Zero-1-to-3 do: bicubic, corners aligned, no antialiasing.
    """
    resized = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return (resized - mean) / std


@torch.no_grad()
def embed_pictures(image_encoder: nn.Module | None, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] as embeddings (B, D), float32, not normalised. ValueError without an encoder."""
    if image_encoder is None:
        raise ValueError("this model came without its image encoder: give the pictures' CLIP embeddings as clip (B, D)")
    config: Any = image_encoder.config
    weight = next(image_encoder.parameters())
    return image_encoder(clip_pixels(pixels, config.image_size).to(weight)).image_embeds.float()


def read_image_encoder(
    state: Mapping[str, Tensor], path: str | File, num_heads: int | None = None, prefix: str = VISUAL
) -> nn.Module:
    """The image tower of an original file in OpenAI's layout, as a CLIPVisionModelWithProjection, frozen, in float32.

    Its heads are 64 wide unless `num_heads` says otherwise. ValueError where there is none."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if "conv1.weight" not in own:
        raise ValueError(f"{path} has no CLIP image tower ({prefix}*)")
    own["proj"] = own["proj"].T.contiguous()
    width, _, patch_size, _ = own["conv1.weight"].shape
    positions = len(own["positional_embedding"])
    with torch.device("meta"):
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=len(own["transformer.resblocks.0.mlp.c_fc.weight"]),
                projection_dim=len(own["proj"]),
                num_hidden_layers=ldm.layers_of(own),
                num_attention_heads=num_heads or width // 64,
                image_size=math.isqrt(positions - 1) * patch_size,
                patch_size=patch_size,
                hidden_act="quick_gelu",
            )
        )
    ldm.load_renamed(encoder, ldm.apart(own), ldm.open_clip_name, f"the image tower of {path}")
    ldm.number_positions(encoder, positions)
    return encoder.float().requires_grad_(False).eval()


def image_encoder_from(name: str | File) -> nn.Module:
    """The image tower in a folder of transformers, or on the Hub ("openai/clip-vit-large-patch14")."""
    from transformers import CLIPVisionModelWithProjection

    return read_encoder(CLIPVisionModelWithProjection, locate(name))


@dataclass
class ImageParts:
    """What a latent diffusion model that is conditioned on CLIP's image embedding is made of.

    projection: Zero-1-to-3's, "weight" and "bias"; None where there is none.
    """

    network: UNet2DConditionModel
    vae: AutoencoderKL
    image_encoder: nn.Module
    projection: dict[str, Tensor] | None = None


def read_image_parts(
    name: str | File,
    *,
    revision: str | None = None,
    weights: Literal["ema", "model"] | None = None,
    num_heads: int | None = None,
    image_heads: int | None = None,
) -> ImageParts:
    """The parts of what `name` names: a pipeline's folder, an original file, or either on the Hub, in float32.

    `weights`: an original file's live or averaged U-Net (a projection has one set); by default the averaged where it
    has them. Heads: where the sizes are not the published ones. FileNotFoundError; ValueError says what does not fit.
    """
    path = locate(name, revision=revision)
    if path.is_dir() and not any(path.rglob("*.safetensors")):
        # Some uploads are of torch's files alone; they are read with weights only.
        path = locate(name, revision=revision, allow_patterns=["*.json", "*.bin"])
    if path.is_dir():
        parts = _from_folder(path)
    else:
        state = choose_weights(read_checkpoint(path), "state_dict", path)
        parts = _from_file(state, path, weights, num_heads, image_heads)
    for part in (parts.network, parts.vae):
        part.float()
    if parts.projection is not None:
        parts.projection = {name: tensor.float() for name, tensor in parts.projection.items()}
    return parts


def _from_folder(path: File) -> ImageParts:
    for part in ("unet", "vae", "image_encoder"):
        if not (path / part).is_dir():
            raise ValueError(f"{path} must be a pipeline's folder with unet, vae and image_encoder: no {part}/")
    check_schedule(path / "scheduler" / "scheduler_config.json")
    network = read_folder(UNet2DConditionModel, path / "unet")
    vae = read_autoencoder(path / "vae").requires_grad_(False).eval()
    folder = next((path / name for name in ("cc_projection", "clip_camera_projection") if (path / name).is_dir()), None)
    projection = None if folder is None else _projection(folder)
    return ImageParts(network, vae, image_encoder_from(path / "image_encoder"), projection)


def _projection(folder: File) -> dict[str, Tensor]:
    """The projection in a pipeline's folder: a linear layer called `projection` or `proj`."""
    file = next((file for kind in ("*.safetensors", "*.bin") for file in sorted(folder.glob(kind))), None)
    if file is None:
        raise ValueError(f"{folder} holds no weights (.safetensors or .bin)")
    state = read_checkpoint(file)
    found = {name.removeprefix("projection.").removeprefix("proj."): tensor for name, tensor in state.items()}
    return _linear(found, file)


def _linear(found: Mapping[str, Tensor], path: str | File) -> dict[str, Tensor]:
    """The layer's tensors themselves. ValueError unless they are a linear layer's and nothing else."""
    out, into = found["weight"].shape if "weight" in found and found["weight"].ndim == 2 else (768, 772)
    load_exactly(nn.Linear(into, out, device="meta"), found, path)
    return dict(found)


def _from_file(
    state: Mapping[str, Tensor],
    path: File,
    weights: Literal["ema", "model"] | None,
    num_heads: int | None,
    image_heads: int | None,
) -> ImageParts:
    if f"{ldm.UNET}input_blocks.0.0.weight" not in state:
        first = ", ".join([*state][:4])
        raise ValueError(f"{path} is no latent diffusion checkpoint: it has no {ldm.UNET}*; it begins with {first}")
    weights = weights or ("ema" if any(name.startswith("model_ema.d") for name in state) else "model")
    network = ldm.read_unet(state, path, weights, num_heads)
    encoder = read_image_encoder(state, path, image_heads)
    own = {name.removeprefix(PROJECTION): tensor for name, tensor in state.items() if name.startswith(PROJECTION)}
    return ImageParts(network, ldm.read_vae(state, path), encoder, _linear(own, path) if own else None)


def recognise(shapes: Mapping[str, tuple[int, ...]], in_channels: int) -> str | None:
    """The weights of an original file whose U-Net takes `in_channels` and CLIP's image embedding; None for another."""
    if shapes.get(f"{ldm.UNET}input_blocks.0.0.weight", (0, 0))[1] != in_channels or f"{VISUAL}proj" not in shapes:
        return None
    averaged = any(name.startswith("model_ema.diffusion_model") for name in shapes)
    return "live and averaged weights" if averaged else "one set of weights"


def tiny_image_parts(in_channels: int) -> ImageParts:
    """Random weights for pictures of 16 x 16, latents of 8 x 8."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    parts = tiny_parts(in_channels)
    about: Any = parts.network.config
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=about.cross_attention_dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    encoder = CLIPVisionModelWithProjection(config).requires_grad_(False).eval()
    return ImageParts(parts.network, parts.vae, encoder)  # type: ignore[arg-type]
