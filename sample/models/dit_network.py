"""DiT's transformer (Peebles & Xie 2022, arXiv 2212.09748), written from the paper, and read from original files."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import load_exactly

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, layers and attention heads of DiT-S to DiT-XL (the paper's table 1)."""
HEADS = {width: heads for width, _, heads in SIZES.values()}
"""Attention heads by width: no tensor's shape tells their number."""


def time_features(t: Tensor, features: int = 256) -> Tensor:
    """[cos, sin] of t (B,) at `features` / 2 frequencies 10000^(-k / half), as (B, features) float32."""
    half = features // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


def position_table(side: int, width: int) -> Tensor:
    """The fixed (1, side^2, width) float32 table: half the channels for the column, half for the row."""
    quarter = width // 4  # each half is [sin, cos]
    frequencies = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, 0)
    return torch.cat([columns, rows], 1).float()[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def modulation(width: int, parts: int) -> nn.Sequential:
    """`parts` vectors of `width` from the embedding of time and label."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class PatchEmbedder(nn.Module):
    """x (B, C, H, W) to tokens (B, N, width), row by row."""

    def __init__(self, channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        dtype = next(p.dtype for p in self.mlp.parameters() if p.is_floating_point())  # weights in few bits are bytes
        return self.mlp(time_features(t).to(dtype))


class LabelEmbedder(nn.Module):
    """Class rows, and the null row last. Nothing is dropped here: a dropped label arrives as `num_classes`."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, label: Tensor) -> Tensor:
        return self.embedding_table(label)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the embedding (adaLN-zero, the paper's section 3.2)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU("tanh"), fc2=nn.Linear(4 * width, width))
        )
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(embedding).chunk(6, 1)
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), shift, scale))
        return x + mlp_gate[:, None] * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))


class FinalLayer(nn.Module):
    def __init__(self, width: int, features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(embedding).chunk(2, 1)))


class DiTNetwork(ModelMixin, ConfigMixin):
    """The transformer, with the original's names for its weights; `hidden_size` must be a multiple of 4."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]

    @register_to_config
    def __init__(
        self,
        *,  # what is given by position, diffusers would take for a default when it copies the config
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"input_size must be a multiple of patch_size, and hidden_size of 4 and of num_heads, got {input_size} "
                f"and {patch_size}, {hidden_size} and {num_heads}"
            )
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbedder(in_channels, hidden_size, patch_size)
        self.t_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.register_buffer("pos_embed", position_table(input_size // patch_size, hidden_size))
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels * (2 if learn_sigma else 1))

    def initialise(self, zero_std: float = 0.0) -> None:
        """Fresh weights as the paper has them: blocks that start as the identity and an output that starts at zero.

        `zero_std`: in place of those zeros, normals of this standard deviation.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("adaLN_modulation.1.weight", "final_layer.linear.weight")):
                nn.init.normal_(parameter, std=zero_std)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,) in [0, 1000), label (B,) in [0, num_classes]: (B, C or 2 C, H, W), epsilon first."""
        size, patch = self.config["input_size"], self.config["patch_size"]
        if x.shape[1:] != (expected := (self.config["in_channels"], size, size)):
            raise ValueError(f"x must have shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        tokens = self.x_embedder(x) + self.pos_embed
        embedding = self.t_embedder(t) + self.y_embedder(label)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens, embedding)
            else:
                tokens = block(tokens, embedding)
        tokens = self.final_layer(tokens, embedding)
        patches = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (size // patch, size // patch))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, size, size)


def published(name: str = "XL/2", resolution: int = 256, num_classes: int = 1000) -> dict[str, Any]:
    """DiTNetwork's arguments for one of the paper's models, "S/8" to "XL/2", on pictures of `resolution`, whose latents
    are an eighth as wide. ValueError for another name."""
    size, _, patch_size = name.partition("/")
    if size not in SIZES or patch_size not in ("2", "4", "8"):
        raise ValueError(f"name must be one of {', '.join(SIZES)} with a patch of 2, 4 or 8, as in XL/2, got {name!r}")
    width, depth, num_heads = SIZES[size]
    return {
        "input_size": resolution // 8,
        "patch_size": int(patch_size),
        "hidden_size": width,
        "depth": depth,
        "num_heads": num_heads,
        "num_classes": num_classes,
    }


NEEDED = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.attn.qkv.weight": 2,
    "final_layer.linear.weight": 2,
}
"""Tensors that tell a DiT's sizes, and that it is one, with their dimensions."""


def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """DiTNetwork's arguments but the heads, off the original's names and shapes; None where they are no DiT's.

    The class table's last row is taken for the null, as in every published file.
    """
    if any(len(shapes.get(name, ())) != dimensions for name, dimensions in NEEDED.items()):
        return None
    width, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    return {
        "input_size": math.isqrt(shapes["pos_embed"][1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * channels * patch_size**2,
    }


def network_from_state(state: Mapping[str, Tensor], path: str | File, num_heads: int | None = None) -> DiTNetwork:
    """The network whose original weights these are, its sizes read off their names and shapes.

    The tensors become the network's own; nothing is copied but what is not in float32. ValueError where it is no DiT.
    """
    sizes = sizes_of({name: tuple(tensor.shape) for name, tensor in state.items()})
    if sizes is None:
        missing = [name for name, dimensions in NEEDED.items() if name not in state or state[name].ndim != dimensions]
        raise ValueError(f"{path} is no DiT: it lacks {', '.join(missing)}; it begins with {', '.join([*state][:4])}")
    if num_heads is None and (width := sizes["hidden_size"]) not in HEADS:
        raise ValueError(f"num_heads cannot be read off {path}, whose width {width} is none of {[*HEADS]}: give it")
    with torch.device("meta"):
        network = DiTNetwork(**sizes, num_heads=num_heads or HEADS[sizes["hidden_size"]])
    load_exactly(network, state, path)
    return network
