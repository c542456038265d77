"""A frozen autoencoder: its latents, scaled, and the name of their space."""

import hashlib
from pathlib import Path as File

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .checkpoint import read_folder

SLICE = 8
"""Pictures that are decoded together: the decoder's activations are many times their size."""


def read_autoencoder(folder: str | File) -> AutoencoderKL:
    """The autoencoder from a folder that diffusers wrote; ValueError where it is damaged."""
    return read_folder(AutoencoderKL, folder)


def latent_space(vae: AutoencoderKL) -> str:
    """Names the autoencoder's latents by its encoder's weights and its scale.

    The decoder does not count: sd-vae-ft-ema and -mse changed only that. Weights count in half precision, so that
    copies stored in either precision are the same.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode() + weight.detach().cpu().half().contiguous().numpy().tobytes())
    return f"latents of AutoencoderKL {digest.hexdigest()[:12]} x {vae.config['scaling_factor']}"


@torch.no_grad()
def to_posterior(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pixels (B, C, H, W) in [0, 1] as mean and deviation (B, 2c, h, w) of their scaled latents, float32."""
    posterior = vae.encode(pixels.to(vae.dtype) * 2 - 1).latent_dist
    return torch.cat([posterior.mean, posterior.std], 1).float() * vae.config["scaling_factor"]


def to_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pixels (B, C, H, W) in [0, 1] as scaled latents, float32: the posterior's mode."""
    return to_posterior(vae, pixels).chunk(2, 1)[0]


def to_pixels(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents as pixels (B, C, H, W) in [0, 1], float32."""
    scaled = latents.to(vae.dtype) / vae.config["scaling_factor"]
    decoded = torch.cat([vae.decode(part).sample for part in scaled.split(SLICE)])
    return (decoded.float() / 2 + 0.5).clamp(0, 1)
