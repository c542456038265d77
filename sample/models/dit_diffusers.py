"""DiT in diffusers' own class, read and written: another network than the original's, by its time frequencies.

There the frequencies are 10000^(-k / 127) where the original has 10000^(-k / 128), and the norms' epsilon is 1e-5
unless the config says 1e-6; every block embeds time and label by itself; DiTPipeline's null is label 1000, however few
classes there are.
"""

import math
from pathlib import Path as File

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from .dit_network import DiTNetwork, network_from_state, position_table, time_features

NULL = 1000
"""The label that DiTPipeline takes for the null."""
EXACT = 64
"""Up to so many times the 256 time features can be fitted at every one of them."""
RIDGE = 1e-3


def names_in_diffusers(layers: int) -> tuple[dict[str, str], dict[str, str]]:
    """diffusers' names of every layer but qkv, by ours; those of the embeddings are below every block's `norm1.emb.`"""
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for i in range(layers):
        block = {
            "attn.proj": "attn1.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm1.linear",
        }
        names |= {f"blocks.{i}.{own}": f"transformer_blocks.{i}.{theirs}" for own, theirs in block.items()}
    embeddings = {
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder.embedding_table": "class_embedder.embedding_table",
    }
    return names, embeddings


def network_from_diffusers(other: DiTTransformer2DModel, path: str | File) -> DiTNetwork:
    """A diffusers DiT's weights in the original's module: with its frequencies and its norms, which diffusers changed.

    Every block there embeds time and label by itself: ValueError unless all do so alike, as in converted files.
    """
    state, config = other.state_dict(), other.config
    inner = "transformer_blocks.{}.norm1.emb."
    for name in state:
        if ".norm1.emb." in name and not torch.equal(state[name], state[inner.format(0) + name.split(".emb.")[1]]):
            raise ValueError(f"{path} embeds time or label differently in each block ({name}): a DiT has one embedding")
    if config.activation_fn != "gelu-approximate":
        raise ValueError(f"{path} has activation {config.activation_fn!r}, a DiT has 'gelu-approximate'")
    names, embeddings = names_in_diffusers(config.num_layers)
    names |= {own: inner.format(0) + theirs for own, theirs in embeddings.items()}
    own = {"pos_embed": position_table(config.sample_size // config.patch_size, other.inner_dim)}
    for end in ("weight", "bias"):
        own |= {f"{a}.{end}": state[f"{b}.{end}"] for a, b in names.items() if f"{b}.{end}" in state}
        for i in range(config.num_layers):
            qkv = [state[f"transformer_blocks.{i}.attn1.to_{part}.{end}"] for part in "qkv"]
            own[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(qkv)
    return network_from_state(own, path, config.num_attention_heads)


def network_to_diffusers(network: DiTNetwork, times: Tensor) -> DiTTransformer2DModel:
    """The network in diffusers' class: the original's epsilon by the config, the null row at NULL and at every label
    beyond the classes, and the time embedding fitted to the original's by least squares, in the first place at `times`.

    Up to EXACT of these, such as a sampler's, it is met to rounding there. ValueError for more than NULL classes.
    """
    config, state = network.config, {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    width, classes, layers = config["hidden_size"], config["num_classes"], config["depth"]
    if classes > NULL:
        raise ValueError(f"DiTPipeline takes label {NULL} for the null: it has no place for {classes} classes")
    other = DiTTransformer2DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=width // config["num_heads"],
        in_channels=config["in_channels"],
        out_channels=config["in_channels"] * (2 if config["learn_sigma"] else 1),
        num_layers=layers,
        sample_size=config["input_size"],
        patch_size=config["patch_size"],
        num_embeds_ada_norm=NULL,
        norm_eps=1e-6,
    )
    table = state["y_embedder.embedding_table.weight"]
    state["y_embedder.embedding_table.weight"] = torch.cat([table[:-1], table[-1:].expand(NULL + 1 - classes, -1)])
    state["t_embedder.mlp.0.weight"] = refitted(state["t_embedder.mlp.0.weight"], times)
    names, embeddings = names_in_diffusers(layers)
    theirs: dict[str, Tensor] = {}
    for end in ("weight", "bias"):
        theirs |= {f"{b}.{end}": state[f"{a}.{end}"] for a, b in names.items()}
        for i in range(layers):
            block = f"transformer_blocks.{i}"
            for part, tensor in zip("qkv", state[f"blocks.{i}.attn.qkv.{end}"].chunk(3), strict=True):
                theirs[f"{block}.attn1.to_{part}.{end}"] = tensor
            for a, b in embeddings.items():
                if f"{a}.{end}" in state:
                    theirs[f"{block}.norm1.emb.{b}.{end}"] = state[f"{a}.{end}"]
    other.load_state_dict(theirs)
    return other.eval()


def refitted(weight: Tensor, times: Tensor) -> Tensor:
    """The first layer (width, 256) of the time embedding, for diffusers' time features in place of the original's: by
    ridge regression over all whole times below 1000, with up to EXACT `times` weighing a thousand times as much."""
    every = torch.cat([torch.arange(1000, dtype=torch.float64), times.double().cpu()])
    scale = torch.ones(len(every), 1, dtype=torch.float64)
    scale[1000:] = 1000 if len(times) <= EXACT else 1
    half = torch.arange(128, dtype=torch.float64)
    angles = every[:, None] * torch.exp(-math.log(10000) * half / 127)
    theirs = scale * torch.cat([angles.cos(), angles.sin()], 1)
    normal = theirs.T @ theirs + RIDGE * torch.eye(256, dtype=torch.float64)
    change = torch.linalg.solve(normal, theirs.T @ (scale * time_features(every).double()))
    return (weight.double() @ change.T).to(weight.dtype)
