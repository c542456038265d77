"""PixArt-alpha's transformer and its learned null, from original files and from diffusers' folders."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path as File
from typing import Literal

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from ..checkpoint import choose_weights, read_checkpoint, read_folder
from ..ldm import load_renamed

HEADS = {1152: 16}
"""Attention heads by width, XL's alone: no tensor's shape tells their number."""

_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
    "adaln_single.emb.resolution_embedder.linear_2": "csize_embedder.mlp.2",
    "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
    "adaln_single.emb.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "attn1.to_q": "attn.qkv[0]",
    "attn1.to_k": "attn.qkv[1]",
    "attn1.to_v": "attn.qkv[2]",
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_k": "cross_attn.kv_linear[0]",
    "attn2.to_v": "cross_attn.kv_linear[1]",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
"""The original's modules by diffusers'. One that the original stores joined with others is a part of it, by number."""


def network_from_file(
    path: File, weights: Literal["ema", "model"] | None = None, num_heads: int | None = None
) -> tuple[PixArtTransformer2DModel, Tensor]:
    """`network_from_state` of an original file: {state_dict, state_dict_ema, ...}, or flat. `weights`: which set, by
    default the averaged where there is one."""
    held = read_checkpoint(path)
    weights = weights or ("ema" if "state_dict_ema" in held else "model")
    state = choose_weights(held, {"ema": "state_dict_ema", "model": "state_dict"}[weights], path)
    return network_from_state(state, path, num_heads)


def network_from_state(
    state: Mapping[str, Tensor], path: str | File, num_heads: int | None = None
) -> tuple[PixArtTransformer2DModel, Tensor]:
    """The network whose original weights these are, from `path`, and its null text (1, N, D), both in float32.

    Sizes are read off names and shapes; names may share a prefix. The tensors become the network's own: nothing is
    copied but what is of another type. ValueError where it is no PixArt, names what is missing, left over or of another
    shape, and asks for the heads of other widths than the published.
    """
    first = "x_embedder.proj.weight"
    prefix = next((name.removesuffix(first) for name in state if name.endswith(first)), "")
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    needed = (first, "pos_embed", "y_embedder.y_embedding", "final_layer.linear.weight")
    if missing := [name for name in needed if name not in own]:
        raise ValueError(f"{path} is no PixArt: it lacks {', '.join(missing)}; it begins with {', '.join([*own][:4])}")
    null, table = own.pop("y_embedder.y_embedding"), own.pop("pos_embed").float()
    width, channels, patch, _ = own[first].shape
    num_heads = num_heads or HEADS.get(width)
    if num_heads is None or width % num_heads:
        raise ValueError(f"num_heads cannot be read off {path}: give a divisor of its width {width}, got {num_heads}")
    side, scale = max(1, math.isqrt(table.shape[1])) if table.ndim == 3 else 1, interpolation_scale(table)
    computed = get_2d_sincos_pos_embed(width, side, base_size=side, interpolation_scale=scale)[None].float()
    if table.shape != computed.shape or not torch.allclose(table, computed, atol=1e-2):  # half precision would do
        raise ValueError(f"{path} has a pos_embed that is not PixArt's fixed square table of sines and cosines")
    with torch.device("meta"):
        network = PixArtTransformer2DModel(
            num_attention_heads=num_heads,
            attention_head_dim=width // num_heads,
            in_channels=channels,
            out_channels=len(own["final_layer.linear.weight"]) // patch**2,
            num_layers=len({name.split(".")[1] for name in own if name.startswith("blocks.")}),
            cross_attention_dim=width,
            sample_size=side * patch,
            patch_size=patch,
            interpolation_scale=scale,
            use_additional_conditions="csize_embedder.mlp.0.weight" in own,
            caption_channels=null.shape[-1],
        )
    load_renamed(network, _apart(own), original_name, str(path))
    network.pos_embed.pos_embed = computed  # in no state dict of diffusers'
    return network.float(), null[None].float()


def network_from_folder(folder: str | File) -> PixArtTransformer2DModel:
    """The network from its folder, under either of the names that diffusers has had for it.

    FileNotFoundError; ValueError where the folder is another network's, or damaged.
    """
    if not (file := File(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no network's folder: it has no config.json")
    config = json.loads(file.read_text())
    name, norm = config.get("_class_name"), config.get("norm_type")
    if name != "PixArtTransformer2DModel" and (name, norm) != ("Transformer2DModel", "ada_norm_single"):
        raise ValueError(f"{file} must name PixArtTransformer2DModel, got {name!r}")
    return read_folder(PixArtTransformer2DModel, folder)


def read_null(given: Tensor | str | File) -> Tensor:
    """A null text (1, N, D) float32 from a tensor, (N, D) too, or from a file that holds it: alone, or as an original
    checkpoint's `y_embedding`. ValueError where the file holds neither."""
    if not isinstance(given, Tensor):
        tensors = choose_weights(read_checkpoint(given), "state_dict", given)
        found = [tensor for name, tensor in tensors.items() if name.endswith("y_embedding")] or [*tensors.values()]
        if len(found) != 1:
            raise ValueError(f"{given} must hold the null text alone, or be an original checkpoint with y_embedding")
        given = found[0]
    return (given[None] if given.ndim == 2 else given).float()


def interpolation_scale(table: Tensor) -> float:
    """By what the positions in a table (1, side^2, width) were divided, to a tenth.

    The first frequency is 1: the second token lies at sin, cos of 1 / scale.
    """
    if table.ndim != 3 or table.shape[1] < 2:
        return 1.0
    angle = math.atan2(table[0, 1, 0], table[0, 1, table.shape[2] // 4])
    return round(1 / angle, 1) if angle > 0.01 else 1.0


def original_name(own: str) -> str:
    """The original's name of a PixArtTransformer2DModel's tensor, or of its part: `attn.qkv[0]` are the queries."""
    if own == "scale_shift_table":
        return "final_layer.scale_shift_table"
    stem, _, end = own.rpartition(".")
    if match := re.fullmatch(r"transformer_blocks\.(\d+)(?:\.(.*))?", stem):
        return ".".join(["blocks", match[1], *([_BLOCK[match[2]]] if match[2] else []), end])
    return f"{_OUTER[stem]}.{end}"


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's tensors, the joined ones as views of their parts."""
    parts: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, end = name.rpartition(".")
        count = {"qkv": 3, "kv_linear": 2}.get(stem.rpartition(".")[2])
        if count:
            parts |= {f"{stem}[{i}].{end}": part for i, part in enumerate(tensor.chunk(count))}
        else:
            parts[name] = tensor
    return parts
