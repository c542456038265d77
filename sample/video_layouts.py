"""Original files of VideoCrafter and DynamiCrafter: which tensor is which, and the sizes that they tell."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path as File
from typing import Any, Literal

import torch
from torch import Tensor

from . import ldm
from .checkpoint import choose_weights, read_checkpoint
from .noise import DiscretePath
from .video_network import TOKENS, VideoNetwork, text_attentions

PROJECTION, EMBEDDER = "image_proj_model.", "embedder.model."
_AVERAGED = "model_ema.diffusion_model"
RATES = ("fps_embedding", "framestride_embed")
"""What files call the embedding of the rate; the second, DynamiCrafter-256's alone, that of a stride."""
_WRAPPERS = ("_forward_module.", "module.")
"""How DeepSpeed and DistributedDataParallel begin the names."""
_ENTRY_HEADS = 8
"""Of the first temporal attention, whatever the others have."""
_RESAMPLER = {
    "ln0": "0.norm1",
    "ln1": "0.norm2",
    "attn.to_q": "0.to_q",
    "attn.to_k": "0.to_k",
    "attn.to_v": "0.to_v",
    "attn.to_out.0": "0.to_out",
    "ff.0": "1.0",
    "ff.1.net.0.proj": "1.1",
    "ff.1.net.2": "1.3",
}


def read_state(path: File) -> dict[str, Tensor]:
    """The tensors of a file by their published names, without the wrappers that training left around them.

    ValueError where the file is no video model's.
    """
    held = read_checkpoint(path)
    state = choose_weights(held, "module" if "module" in held else "state_dict", path)
    state = {unwrapped(name): tensor for name, tensor in state.items()}
    if not is_video(state):
        first = ", ".join([*state][:4])
        raise ValueError(f"{path} is no VideoCrafter nor DynamiCrafter: it has no {ldm.UNET}init_attn.*, but {first}")
    return state


def unwrapped(name: str) -> str:
    """A tensor's published name."""
    while wrapper := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(wrapper)
    return name


def is_video(state: Mapping[str, Any]) -> bool:
    return f"{ldm.UNET}init_attn.0.proj_in.weight" in state


def takes_picture(state: Mapping[str, Any]) -> bool:
    """Whether a file with these names is DynamiCrafter's rather than VideoCrafter's."""
    return f"{PROJECTION}latents" in state


def is_relative(state: Mapping[str, Any]) -> bool:
    """Whether the file's temporal attention has relative positions, as VideoCrafter1's has."""
    return any(name.endswith("relative_position_k.embeddings_table") for name in state)


def is_256(state: Mapping[str, Any]) -> bool:
    """Whether a DynamiCrafter's file is the 256 model's, which weighs the picture by a learned gain."""
    return any(name.endswith("attn2.alpha") for name in state)


def rate_in(state: Mapping[str, Any]) -> str | None:
    """What the file calls the embedding of its rate; None where it has none."""
    return next((rate for rate in RATES if f"{ldm.UNET}{rate}.0.weight" in state), None)


def unet_name(own: str, layers_per_block: int, levels: int, rate: str) -> str:
    """The original's name of a tensor of `VideoNetwork.unet`. It files temporal convolutions (which it misspells)
    inside the residual block before them, temporal attention after the spatial."""
    own = own.replace("time_embedding.rate.linear_1", f"{rate}.0").replace("time_embedding.rate.linear_2", f"{rate}.2")
    own = own.replace("time_embedding.time.", "time_embedding.")
    own = own.replace("processor.keys", "relative_position_k.embeddings_table")
    own = own.replace("processor.values", "relative_position_v.embeddings_table")
    if own.startswith("transformer_in."):
        return own.replace("transformer_in", "init_attn.0")
    if match := re.match(r"mid_block\.(resnets|temp_convs|attentions|temp_attentions)\.(\d)\.(.*)", own):
        kind, j, rest = match.groups()
        place = {"attentions": 1, "temp_attentions": 2}.get(kind, 3 * int(j))
    elif match := re.match(r"(\w+_blocks\.\d+)\.(resnets|temp_convs|attentions|temp_attentions)\.(\d)\.(.*)", own):
        block, kind, j, rest = match.groups()
        sibling = ldm.unet_name(f"{block}.attentions.{j}.", layers_per_block, levels)  # number.1.
        place = {"attentions": 1, "temp_attentions": 2}.get(kind, 0)
    elif re.match(r"up_blocks\.[1-9]\.upsamplers", own):  # after both attentions, which the innermost level lacks
        return ldm.unet_name(own, layers_per_block, levels).replace(".2.conv", ".3.conv")
    else:
        return ldm.unet_name(own, layers_per_block, levels)
    start = f"middle_block.{place}." if own.startswith("mid") else f"{sibling.removesuffix('1.')}{place}."
    if kind == "resnets":
        return start + ldm.unet_name(f"mid_block.resnets.0.{rest}", 0, 0).removeprefix("middle_block.0.")
    return start + (f"temopral_conv.{rest}" if kind == "temp_convs" else rest)


def projection_name(own: str) -> str:
    """The original's name of a tensor of the resampler, with its keys and values apart."""
    match = re.match(r"layers\.(\d+)\.(.*)\.(\w+)", own)
    return own if match is None else f"layers.{match[1]}.{_RESAMPLER[match[2]]}.{match[3]}"


def network_sizes(state: Mapping[str, Tensor], frames: int, projection_heads: int | None) -> dict[str, Any]:
    """A VideoNetwork's arguments from an original file. KeyError where a tensor that tells one is missing.

    frames: of VideoCrafter, whose files do not tell. projection_heads: of the resampler, whose file does not either; 12
    where its keys are 768 wide, as published. ValueError where they are not, and it is None.
    """
    shapes = {name.removeprefix(ldm.UNET): tuple(t.shape) for name, t in state.items() if name.startswith(ldm.UNET)}
    found = ldm.unet_sizes({f"{ldm.UNET}{name}": shape for name, shape in shapes.items()})
    entry = "init_attn.0.transformer_blocks.0.attn1"
    sizes: dict[str, Any] = {
        **{name: found[name] for name in ("in_channels", "out_channels", "block_out_channels", "layers_per_block")},
        "attends": [kind.startswith("CrossAttn") for kind in found["down_block_types"]],
        "head_channels": shapes["init_attn.0.proj_in.weight"][0] // _ENTRY_HEADS,
        "cross_attention_dim": found["cross_attention_dim"],
        "frames": frames,
        "relative": shapes.get(f"{entry}.relative_position_k.embeddings_table", (1,))[0] // 2,
        "temporal_conv": "middle_block.0.temopral_conv.conv1.0.weight" in shapes,
        "rate": rate_in(state) is not None,
    }
    if not takes_picture(state):
        return sizes
    own = {name.removeprefix(PROJECTION): tuple(t.shape) for name, t in state.items() if name.startswith(PROJECTION)}
    inner, width = own["layers.0.0.to_q.weight"]
    if projection_heads is None and inner != 768:
        raise ValueError(f"a resampler of keys {inner} wide is none of the published: give projection_heads")
    heads = projection_heads or 12
    return {
        **sizes,
        "frames": own["latents"][1] // TOKENS,
        "image_width": own["proj_in.weight"][1],
        "projection": {
            "hidden_dims": width,
            "depth": len({name.split(".")[1] for name in own if name.startswith("layers.")}),
            "heads": heads,
            "dim_head": inner // heads,
            "ffn_ratio": own["layers.0.1.1.weight"][0] // width,
        },
        "learned_gain": "middle_block.1.transformer_blocks.0.attn2.alpha" in shapes,
        "dropout": 0.1,  # the authors', of every DynamiCrafter
    }


def read_network(
    state: Mapping[str, Tensor],
    path: File,
    weights: Literal["ema", "model"] | None = None,
    frames: int = 16,
    projection_heads: int | None = None,
) -> VideoNetwork:
    """The network of an original file, whose tensors take its parameters' places.

    weights: its live U-Net, or its averaged one (`model_ema.*`, names without dots), by default where it has it; the
    published files have live ones alone. ValueError names what is missing, left over or of another shape.
    """
    averaged = any(name.startswith(_AVERAGED) for name in state)
    if weights == "ema" and not averaged:
        raise ValueError(f"{path} has no averaged weights (model_ema.*): ask for its live ones, weights='model'")
    sizes = network_sizes(state, frames, projection_heads)
    with torch.device("meta"):
        network = VideoNetwork(**sizes)
    rename = _renaming(network, rate_in(state) or "")
    kept = {}
    for name, tensor in state.items():
        if name.startswith(PROJECTION) and name.endswith(".to_kv.weight"):
            for letter, half in zip("kv", tensor.chunk(2), strict=True):
                kept[name.replace("to_kv", f"to_{letter}")] = half
        elif name.startswith(ldm.UNET) and averaged and weights != "model":
            short = _AVERAGED + name.removeprefix(ldm.UNET).replace(".", "")
            kept |= {name: state[short]} if short in state else {}
        elif name.startswith((ldm.UNET, PROJECTION)):
            kept[name] = tensor
    for name, tensor in network.state_dict().items():  # 1x1 convolutions, stored as linear layers
        theirs = rename(name)
        if theirs in kept and kept[theirs].shape == tensor.shape[:2] and set(tensor.shape[2:]) == {1}:
            kept[theirs] = kept[theirs].reshape(tensor.shape)
    ldm.load_renamed(network, kept, rename, f"the network of {path}")
    return network


def _renaming(network: VideoNetwork, rate: str) -> Callable[[str], str]:
    """What gives the original's name of each of the network's tensors."""
    config: Any = network.config
    layers, levels, attentions = config.layers_per_block, len(config.attends), text_attentions(network.unet)

    def rename(own: str) -> str:
        part, _, rest = own.partition(".")
        if part == "image_projection":
            return PROJECTION + projection_name(rest)
        if part == "image_attention":  # image_attention.3.to_k_ip.weight
            number, _, rest = rest.partition(".")
            rest = f"{attentions[int(number)]}.{rest}"
        return ldm.UNET + unet_name(rest, layers, levels, rate)

    return rename


def check_names(state: Mapping[str, Any], path: File) -> None:
    """ValueError unless every name is of a part that is read, or known not to be needed."""
    known = re.compile(
        rf"{_AVERAGED}|model_ema\.|{'|'.join(map(re.escape, (ldm.UNET, ldm.VAE, ldm.OPEN_CLIP, EMBEDDER, PROJECTION)))}"
        r"|[a-z_0-9]+$"  # the schedule's tables
    )
    if extra := [name for name in state if not known.match(name)]:
        raise ValueError(
            f"{path} has besides {', '.join(sorted(extra)[:4])}, which no VideoCrafter or DynamiCrafter has"
        )


def schedule_in(state: Mapping[str, Tensor], path: File) -> tuple[bool | None, float | None]:
    """(Whether the file's schedule ends at an SNR of 0, what it scales the data down to), each None where it is silent.

    ValueError where its schedule is neither Stable Diffusion's nor that with zero terminal SNR.
    """
    table, scale = state.get("alphas_cumprod"), state.get("scale_arr")
    least = None if scale is None else round(float(scale[-1]), 6)
    if table is None:
        return None, least
    plain = DiscretePath.scaled_linear()
    for zero in (False, True):
        wanted = plain.scaling(zero_terminal_snr=zero).alphas_cumprod
        if table.shape == wanted.shape and torch.allclose(table.double(), wanted, rtol=1e-3, atol=1e-5):
            return zero, least
    raise ValueError(f"{path} has a noise schedule that is neither scaled_linear nor that with zero terminal SNR")
