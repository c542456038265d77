"""A latent diffusion model as it is published: its parts from a Hub id, a diffusers folder, or an original file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from . import ldm
from .checkpoint import choose_weights, read_checkpoint, read_folder, some
from .hub import locate
from .latents import latent_space, read_autoencoder
from .noise import DiscretePath
from .text import encode_tokens, null_text, null_tokens, tiny_text

KNOWN = (
    *(ldm.UNET, ldm.VAE, "cond_stage_model.", "model_ema."),
    *("betas", "alphas_", "sqrt_", "log_one_", "posterior_", "logvar", "scale_factor"),
)
"""How the names of an original file's tensors begin: networks and averages, then buffers of the noise schedule."""


@dataclass
class Parts:
    """What a text-conditioned latent diffusion model is made of, as its class takes them.

    null_text (1, N, D): the empty prompt's context. prediction: None where it cannot be told.
    """

    network: nn.Module
    null_text: Tensor
    prediction: Any
    space: str
    vae: AutoencoderKL | None
    text_encoder: nn.Module | None
    tokenizer: Any

    def alone(self) -> "Parts":
        """Without what a prior does not need: no autoencoder, no text encoder."""
        return Parts(self.network, self.null_text, self.prediction, self.space, None, None, None)


def read_parts(
    name: str | File,
    *,
    revision: str | None = None,
    weights: Literal["ema", "model"] | None = None,
    tokenizer: str | None = None,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    text_heads: int | None = None,
) -> Parts:
    """The parts of what `name` names: a pipeline's folder, an original file, or either on the Hub.

    `weights`: an original file's live or averaged U-Net; by default the averaged where it has them, as the authors
    sample. `tokenizer`: a folder or Hub id, for original files, which have none; without it prompts cannot be encoded,
    the null can. Heads: where the sizes are not the published ones. All in float32.
    """
    path = locate(name, revision=revision)
    if (path / "model_index.json").is_file():
        parts = _from_folder(path)
    else:
        state = choose_weights(read_checkpoint(path), "state_dict", path)
        parts = _from_file(state, path, weights, num_heads, num_head_channels, text_heads)
    if tokenizer is not None:
        parts.tokenizer = read_tokenizer(locate(tokenizer))
    parts.network.float()
    return parts


def _from_folder(path: File) -> Parts:
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        if not (path / part).is_dir():
            raise ValueError(
                f"{path} must be a pipeline's folder with unet, vae, text_encoder and tokenizer: no {part}/"
            )
    check_schedule(path / "scheduler" / "scheduler_config.json")
    config = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    vae = read_autoencoder(path / "vae").requires_grad_(False).eval()
    text_encoder = read_text_encoder(path / "text_encoder")
    tokenizer = read_tokenizer(path / "tokenizer")
    return Parts(
        read_folder(UNet2DConditionModel, path / "unet"),
        null_text(text_encoder, tokenizer),
        config.get("prediction_type", "epsilon"),
        latent_space(vae),
        vae,
        text_encoder,
        tokenizer,
    )


def _from_file(
    state: Mapping[str, Tensor],
    path: File,
    weights: Literal["ema", "model"] | None,
    num_heads: int | None,
    num_head_channels: int | None,
    text_heads: int | None,
) -> Parts:
    if f"{ldm.UNET}input_blocks.0.0.weight" not in state:
        first = ", ".join([*state][:4])
        raise ValueError(f"{path} is no latent diffusion checkpoint: it has no {ldm.UNET}*; it begins with {first}")
    if weights not in (None, "ema", "model"):
        raise ValueError(f"weights must be 'ema' (averaged) or 'model' (live), got {weights!r}")
    weights = weights or ("ema" if any(name.startswith("model_ema.d") for name in state) else "model")
    network = ldm.read_unet(state, path, weights, num_heads, num_head_channels)
    vae = ldm.read_vae(state, path).float()
    text_encoder, pad = ldm.read_text_encoder(state, path, text_heads)
    if strange := [name for name in state if not name.startswith(KNOWN)]:
        raise ValueError(f"{path} has besides its networks {some(strange)}: not a file of this kind")
    text_encoder.float()
    vocabulary, length = text_encoder.config.vocab_size, text_encoder.config.max_position_embeddings
    ids = null_tokens(pad, length, vocabulary - 2, vocabulary - 1)
    prediction = "epsilon" if any(name.startswith(ldm.CLIP) for name in state) else None  # 2.x has either
    return Parts(network, encode_tokens(text_encoder, ids), prediction, latent_space(vae), vae, text_encoder, None)


def check_schedule(file: File) -> None:
    """ValueError unless a pipeline's scheduler follows Stable Diffusion's noise schedule, whatever its sampler."""
    if not file.is_file():
        raise ValueError(f"{file.parent} must hold the pipeline's scheduler_config.json")
    config = json.loads(file.read_text())
    betas = (config.get("beta_schedule"), config.get("beta_start"), config.get("beta_end"))
    path = DiscretePath.scaled_linear()
    if betas != ("scaled_linear", 0.00085, 0.012) or config.get("num_train_timesteps", len(path)) != len(path):
        raise ValueError(f"{file} has betas {betas}, Stable Diffusion's are scaled_linear from 0.00085 to 0.012")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(f"{file} has zero terminal SNR, another noise schedule than Stable Diffusion's")


def read_text_encoder(folder: File) -> nn.Module:
    """A CLIP text encoder from its folder; see `read_encoder`."""
    from transformers import CLIPTextModel

    return read_encoder(CLIPTextModel, folder)


def read_encoder(encoder_class: Any, folder: File) -> nn.Module:
    """An encoder of transformers from its folder of safetensors, or, where it has none, of torch's own files, which are
    read with weights only; frozen, in float32. ValueError where weights are missing, which would be random."""
    pickled = any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))
    encoder, about = encoder_class.from_pretrained(
        folder, use_safetensors=not pickled, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(about["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} of a {encoder_class.__name__}'s weights, {missing[0]} for one")
    return encoder.float().requires_grad_(False).eval()


def read_tokenizer(folder: File) -> Any:
    """A CLIP tokenizer from its folder."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def factor(vae: AutoencoderKL) -> int:
    """How many pixels a side one latent stands for."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def least_side(network: Any, vae: AutoencoderKL) -> int:
    """What sides in pixels are multiples of, so that the U-Net can halve their latents at each level."""
    return factor(vae) * 2 ** (len(network.config["block_out_channels"]) - 1)


def latent_side(network: Any, vae: AutoencoderKL, resolution: int) -> int:
    """The latents' side for pictures of `resolution`. ValueError unless the U-Net can halve it at each level."""
    least = least_side(network, vae)
    if resolution % least:
        raise ValueError(f"resolution must be a multiple of {least}, got {resolution}")
    return resolution // factor(vae)


def fits(network: Any, in_channels: int, what: str) -> None:
    """ValueError unless the U-Net takes that many input channels."""
    if (found := network.config["in_channels"]) != in_channels:
        kinds = {4: "text to image", 8: "InstructPix2Pix or Zero-1-to-3", 9: "inpainting"}
        raise ValueError(
            f"{what} takes {in_channels} input channels, this U-Net {found} ({kinds.get(found, 'of an unknown kind')})"
        )


def space_of(vae: AutoencoderKL | None, space: str | None) -> str:
    """The latents' space: the autoencoder's own, which `space` must equal, or `space` where there is none."""
    if vae is None:
        if space is None:
            raise ValueError("give the autoencoder as vae, or name its space")
        return space
    if space not in (None, latent_space(vae)):
        raise ValueError(f"the network was trained on {space}, the autoencoder given makes {latent_space(vae)}")
    return latent_space(vae)


def needed(vae: AutoencoderKL | None) -> AutoencoderKL:
    """The autoencoder itself. ValueError where there is none."""
    if vae is None:
        raise ValueError("this model came as a prior, without its autoencoder: it cannot encode or decode pictures")
    return vae


def tiny_parts(in_channels: int) -> Parts:
    """Random weights for pictures of 16 x 16, latents of 8 x 8; the same ones always, so that tiny models share their
    autoencoder and text encoder, as published ones do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae, (text_encoder, tokenizer) = tiny_vae(), tiny_text(width=16)
        unet = tiny_unet(in_channels)
    context = null_text(text_encoder, tokenizer)
    return Parts(unet, context, "epsilon", latent_space(vae), vae, text_encoder, tokenizer)


def tiny_unet(in_channels: int, width: int = 16) -> UNet2DConditionModel:
    """Random weights, for latents of 8 x 8 and contexts of `width`."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def tiny_vae() -> AutoencoderKL:
    """Random weights; pictures are twice the size of their latents."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.18215,
    )
    return vae.requires_grad_(False).eval()
