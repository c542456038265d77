"""Clips as latents, and the parts that VideoCrafter and DynamiCrafter are made of."""

from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from . import ldm
from .checkpoint import choose_weights, read_checkpoint
from .hub import locate
from .latents import SLICE, to_pixels, to_posterior
from .open_clip import encode_tokens, read_image_tower, tiny_tower
from .pictures import read_picture
from .published import factor, read_encoder, read_tokenizer, tiny_parts
from .text import encode_tokens as encode_words
from .text import null_tokens
from .video_layouts import EMBEDDER, check_names, rate_in, read_network, read_state, schedule_in, takes_picture
from .video_network import VideoNetwork

Size = tuple[int, int]
"""Height and width."""


@dataclass
class VideoParts:
    """What a video model is made of.

    null_text (1, N, D): the empty prompt's context. null_image (1, M, D'): the tokens of a picture that is 0 in
    [-1, 1]. zero_terminal_snr, least_scale: what the file says of its schedule; None where it is silent. rate: what the
    file calls the embedding of its rate.
    """

    network: VideoNetwork
    null_text: Tensor
    vae: AutoencoderKL
    text_encoder: nn.Module
    tokenizer: Any = None
    null_image: Tensor | None = None
    image_encoder: nn.Module | None = None
    zero_terminal_snr: bool | None = None
    least_scale: float | None = None
    rate: str | None = None


def read_video_parts(
    name: str | File,
    picture: bool,
    *,
    revision: str | None = None,
    weights: Literal["ema", "model"] | None = None,
    tokenizer: str | None = None,
    frames: int = 16,
    projection_heads: int | None = None,
    text_heads: int | None = None,
    image_heads: int | None = None,
) -> VideoParts:
    """The parts of an original file, here or on the Hub ("Doubiiu/DynamiCrafter/model.ckpt"), in float32.

    picture: DynamiCrafter is wanted, which takes one, or VideoCrafter, which does not. tokenizer: a folder or Hub id,
    for files have none; without it prompts cannot be encoded, the null can. Heads: where the sizes are not the
    published ones. FileNotFoundError; ValueError says what does not fit.
    """
    path = locate(name, revision=revision)
    state = read_state(path)
    check_names(state, path)
    if takes_picture(state) != picture:
        wanted, found = ("DynamiCrafter", "VideoCrafter") if picture else ("VideoCrafter", "DynamiCrafter")
        raise ValueError(f"{path} is {found}, not {wanted}")
    network = read_network(state, path, weights, frames, projection_heads).float()
    # A whole open_clip is filed, and both models use its text tower.
    words = {name: t for name, t in state.items() if not name.startswith(f"{ldm.OPEN_CLIP}visual.")}
    text_encoder, pad = ldm.read_text_encoder(words, path, text_heads)
    text_encoder.float()
    vocabulary, length = text_encoder.config.vocab_size, text_encoder.config.max_position_embeddings
    null_text = encode_words(text_encoder, null_tokens(pad, length, vocabulary - 2, vocabulary - 1))
    zero, least = schedule_in(state, path)
    parts = VideoParts(network, null_text, ldm.read_vae(state, path).float(), text_encoder)
    parts.tokenizer = None if tokenizer is None else read_tokenizer(locate(tokenizer))
    parts.zero_terminal_snr, parts.least_scale, parts.rate = zero, least, rate_in(state)
    if picture:
        parts.image_encoder = read_image_tower(state, path, EMBEDDER, image_heads)
        parts.null_image = encode_tokens(parts.image_encoder, grey(parts.image_encoder))
    return parts


def image_tower_from(name: str | File) -> nn.Module:
    """open_clip's image tower from a folder of transformers, or the Hub's ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K"); or
    from an original file of DynamiCrafter or of open_clip."""
    from transformers import CLIPVisionModel

    path = locate(name)
    if path.is_dir():
        return read_encoder(CLIPVisionModel, path)
    state = choose_weights(read_checkpoint(path), "state_dict", path)
    return read_image_tower(state, path, EMBEDDER if takes_picture(state) else "")


def grey(image_encoder: nn.Module) -> Tensor:
    """The picture whose tokens are the null: 0 in [-1, 1]."""
    config: Any = image_encoder.config
    return torch.full((1, 3, config.image_size, config.image_size), 0.5)


def latent_size(vae: AutoencoderKL, network: VideoNetwork, resolution: Size) -> Size:
    """The latents' height and width for frames of `resolution`. ValueError unless each level can halve them."""
    config: Any = network.config
    least = factor(vae) * 2 ** (len(config.block_out_channels) - 1)
    height, width = resolution
    if height % least or width % least:
        raise ValueError(f"height and width must be multiples of {least}, got {height} x {width}")
    return height // factor(vae), width // factor(vae)


def clip_posterior(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, F, H, W) in [0, 1] as mean and deviation (B, 8, F, h, w) of scaled latents, frame by frame."""
    parts = pixels.transpose(1, 2).flatten(0, 1).split(SLICE)
    posterior = torch.cat([to_posterior(vae, part) for part in parts])
    return posterior.unflatten(0, (len(pixels), -1)).transpose(1, 2)


def decode_clips(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents (B, 4, F, h, w) as pixels (B, 3, F, H, W) in [0, 1]; a few frames at a time."""
    pixels = to_pixels(vae, latents.transpose(1, 2).flatten(0, 1))
    return pixels.unflatten(0, (len(latents), -1)).transpose(1, 2)


def filling(pixels: Tensor, size: Size) -> Tensor:
    """Pixels (B, C, H, W) resized (bicubic) until they cover `size`, the centre cut out: (B, 3, *size)."""
    height, width = size
    scale = max(height / pixels.shape[-2], width / pixels.shape[-1])
    covering = [max(least, round(have * scale)) for have, least in zip(pixels.shape[-2:], size, strict=True)]
    if covering != [*pixels.shape[-2:]]:
        pixels = F.interpolate(pixels, covering, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return pixels[..., top : top + height, left : left + width].expand(-1, 3, -1, -1)


def read_frame(file: str, size: Size) -> Tensor:
    """A picture's file as (1, 3, *size) in [0, 1]."""
    return filling(read_picture(file)[None], size)


def read_rate(name: str, text: str) -> Tensor:
    """A rate from the command line (1,). ValueError unless it is a whole number above 0."""
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"{name} must be a whole number above 0, got {text!r}")
    return torch.tensor([int(text)])


def tiny_video_parts(image: bool, **sizes: Any) -> VideoParts:
    """Random weights for clips of 4 frames of 16 x 16, latents of 8 x 8; the autoencoder and the text encoder are those
    of all tiny models. sizes: arguments of VideoNetwork."""
    shared = tiny_parts(in_channels=4)
    assert shared.vae is not None and shared.text_encoder is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        projection = {"hidden_dims": 16, "depth": 1, "heads": 2, "dim_head": 8, "ffn_ratio": 2}
        tower = tiny_tower() if image else None
        network = VideoNetwork(
            in_channels=8 if image else 4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            attends=(True, False),
            head_channels=8,
            cross_attention_dim=16,
            norm_num_groups=8,
            frames=4,
            image_width=16 if image else 0,
            projection=projection if image else None,
            **sizes,
        )
    parts = VideoParts(network, shared.null_text, shared.vae, shared.text_encoder, shared.tokenizer)
    if tower is not None:
        parts.image_encoder, parts.null_image = tower, encode_tokens(tower, grey(tower))
    return parts
