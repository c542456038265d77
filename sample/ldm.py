"""Original checkpoint files of latent diffusion (CompVis' layout): which tensor is which, and the sizes they tell.

Networks are diffusers' and transformers' own, built without memory for weights; the file's tensors, which are mapped,
then take their places. Nothing is copied, and every name is accounted for in the file's own words.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path as File
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from .checkpoint import some

Shapes = Mapping[str, tuple[int, ...]]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "visual_projection.weight": "proj",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def unet_name(own: str, layers_per_block: int, levels: int) -> str:
    """The original's name of a UNet2DConditionModel's tensor."""
    for ours, theirs in _OUTER.items():
        if own.startswith(ours + "."):
            return theirs + own[len(ours) :]
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", own):
        kind, j, rest = match.groups()
        return f"middle_block.{2 * int(j) if kind == 'resnets' else 1}.{_inside(kind, rest)}"
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", own)
    if match is None:
        return own
    way, i, kind, j, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    per = layers_per_block + 1
    if kind == "downsamplers":
        return f"input_blocks.{(i + 1) * per}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":  # after the attention, which the innermost level does not have
        return f"output_blocks.{i * per + layers_per_block}.{1 if i == 0 else 2}.{rest}"
    number = f"input_blocks.{1 + i * per + j}" if way == "down" else f"output_blocks.{i * per + j}"
    return f"{number}.{0 if kind == 'resnets' else 1}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    part, _, end = rest.partition(".")
    return f"{_RESNET[part]}.{end}" if kind == "resnets" else rest


def vae_name(own: str, levels: int) -> str:
    """The original's name of an AutoencoderKL's tensor."""
    name = own.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if ".mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
        name = name.replace("to_out.0", "proj_out")
        name = re.sub(r"to_([qkv])\.", r"\1.", name)
    return name


def open_clip_name(own: str) -> str:
    """OpenAI's and open_clip's name of a tensor of CLIP's text or image tower, with queries, keys and values apart."""
    name = own.removeprefix("text_model.").removeprefix("vision_model.")
    for ours, theirs in _OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name


def load_renamed(
    network: nn.Module, state: Mapping[str, Tensor], rename: Callable[[str], str], what: str, may_be_left: str = "$."
) -> None:
    """The tensors of `state`, under their original names, in the place of the network's own; nothing is copied.

    A linear layer may be stored as a 1x1 convolution. `may_be_left`: a pattern of names that are not needed.
    ValueError names what is missing, left over, or of another shape.
    """
    own = {name: (rename(name), tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [theirs for theirs, _ in own.values() if theirs not in state]
    known = {theirs for theirs, _ in own.values()}
    extra = [name for name in state if name not in known and not re.match(may_be_left, name)]
    taken, shapes = {}, []
    for name, (theirs, shape) in own.items():
        tensor = state.get(theirs)
        if tensor is None:
            continue
        if tensor.shape != shape and tensor.numel() == shape.numel() and set(tensor.shape[len(shape) :]) == {1}:
            tensor = tensor.reshape(shape)
        if tensor.shape != shape:
            shapes.append(f"{theirs} {tuple(tensor.shape)} in place of {tuple(shape)}")
        taken[name] = tensor
    faults = [
        f"{verb} {some(names)}"
        for verb, names in (("lacks", missing), ("has besides", extra), ("has", shapes))
        if names
    ]
    if faults:
        raise ValueError(f"{what} does not fit {type(network).__name__}: it {'; it '.join(faults)}")
    network.load_state_dict(taken, assign=True)


def _under(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def kind(shapes: Shapes, in_channels: int) -> str | None:
    """ "1.x" or "2.x" by the text encoder, and whether there are averaged weights; None for another U-Net, or no
    text encoder."""
    text = {CLIP: "1.x", f"{OPEN_CLIP}transformer.": "2.x"}
    found = next((text[prefix] for prefix in text if any(name.startswith(prefix) for name in shapes)), None)
    if found is None or shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 0))[1] != in_channels:
        return None
    if f"{UNET}init_attn.0.proj_in.weight" in shapes:  # a U-Net of clips
        return None
    averaged = any(name.startswith("model_ema.diffusion_model") for name in shapes)
    return f"{found}, live and averaged weights" if averaged else found


def unet_sizes(shapes: Shapes) -> dict[str, Any]:
    """A UNet2DConditionModel's sizes, attention heads apart, from the shapes of an original file. KeyError if none."""
    shapes = _under(shapes, UNET)
    levels = 1 + sum(name.endswith(".0.op.weight") for name in shapes)
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("input_blocks.")})
    per = blocks // levels  # layers_per_block + 1: conv_in counts for the downsampler that the last level lacks
    attends = [f"input_blocks.{1 + i * per}.1.norm.weight" in shapes for i in range(levels)]
    keys = next(name for name in shapes if name.endswith("attn2.to_k.weight"))
    projection = next(name for name in shapes if name.endswith(".1.proj_in.weight"))
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": [shapes[f"input_blocks.{1 + i * per}.0.out_layers.3.weight"][0] for i in range(levels)],
        "layers_per_block": per - 1,
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in attends[::-1]],
        "cross_attention_dim": shapes[keys][1],
        "use_linear_projection": len(shapes[projection]) == 2,
    }


def head_counts(sizes: Mapping[str, Any], num_heads: int | None, num_head_channels: int | None) -> list[int]:
    """Attention heads by level, which no shape tells: 8 in SD 1.x, of 64 channels in SD 2.x. ValueError if unknown."""
    channels = sizes["block_out_channels"]
    if num_heads is None and num_head_channels is None and channels[0] == 320:
        num_heads, num_head_channels = {768: (8, None), 1024: (None, 64)}.get(
            sizes["cross_attention_dim"], (None, None)
        )
    if num_head_channels is not None:
        return [width // num_head_channels for width in channels]
    if num_heads is None:
        raise ValueError(
            f"the attention heads of a U-Net of widths {channels} and contexts of {sizes['cross_attention_dim']} are "
            "not in its file: give num_heads, or num_head_channels"
        )
    return [num_heads] * len(channels)


def read_unet(
    state: Mapping[str, Tensor],
    path: str | File,
    weights: Literal["ema", "model"] = "model",
    num_heads: int | None = None,
    num_head_channels: int | None = None,
) -> UNet2DConditionModel:
    """The U-Net of an original file; `weights`: its live or its averaged set (`model_ema.*`, names without dots)."""
    live = _under(state, UNET)
    sizes = unet_sizes({name: tuple(tensor.shape) for name, tensor in state.items()})
    heads = head_counts(sizes, num_heads, num_head_channels)
    with torch.device("meta"):
        # diffusers' attention_head_dim is, for this class, the number of heads
        unet = UNet2DConditionModel(**sizes, attention_head_dim=heads, sample_size=64)
    chosen = live
    if weights == "ema":
        averaged = _under(state, "model_ema.diffusion_model")
        if not averaged:
            raise ValueError(f"{path} has no averaged weights (model_ema.*): ask for its live ones, weights='model'")
        chosen = {name: averaged[short] for name in live if (short := name.replace(".", "")) in averaged}
        if alone := sorted(live.keys() - chosen.keys()):
            raise ValueError(f"{path} has no averages of {len(alone)} of its live weights, {UNET}{alone[0]} for one")
    names = (sizes["layers_per_block"], len(heads))
    load_renamed(unet, chosen, lambda own: unet_name(own, *names), f"the {weights} U-Net of {path}")
    return unet


def read_vae(state: Mapping[str, Tensor], path: str | File, scaling_factor: float = 0.18215) -> AutoencoderKL:
    """The autoencoder of an original file."""
    own = _under(state, VAE)
    if "post_quant_conv.weight" not in own:
        raise ValueError(f"{path} has no autoencoder ({VAE}*): give one as `vae`")
    levels = len({name.split(".")[2] for name in own if name.startswith("encoder.down.")})
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=[own[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)],
            layers_per_block=len({name.split(".")[4] for name in own if name.startswith("encoder.down.0.block.")}),
            latent_channels=own["post_quant_conv.weight"].shape[0],
            sample_size=512,
            scaling_factor=scaling_factor,
        )
    # some files keep their training loss here, a discriminator
    load_renamed(vae, own, lambda name: vae_name(name, levels), f"the autoencoder of {path}", r"loss\.|model_ema")
    return vae.requires_grad_(False).eval()


def read_text_encoder(state: Mapping[str, Tensor], path: str | File, num_heads: int | None = None) -> tuple[Any, int]:
    """(The text encoder of an original file, the token that its prompts are padded with).

    SD 1.x: OpenAI's CLIP, padded with its end token; SD 2.x: open_clip's, without its last layer, padded with 0.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    own, open_clip = _under(state, CLIP), _under(state, OPEN_CLIP)
    if not own and "transformer.resblocks.0.mlp.c_fc.weight" not in open_clip:  # an image tower may be there
        raise ValueError(f"{path} has no text encoder ({CLIP}* or {OPEN_CLIP}*): give one as `text_encoder`")
    if own:
        tokens, positions = own["embeddings.token_embedding.weight"], own["embeddings.position_embedding.weight"]
        inner, layers = own["encoder.layers.0.mlp.fc1.weight"], layers_of(own)
    else:
        tokens, positions = open_clip["token_embedding.weight"], open_clip["positional_embedding"]
        inner, layers = open_clip["transformer.resblocks.0.mlp.c_fc.weight"], layers_of(open_clip) - 1
        own = apart(open_clip)
    width = tokens.shape[1]
    with torch.device("meta"):
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokens),
                hidden_size=width,
                intermediate_size=len(inner),
                num_hidden_layers=layers,
                num_attention_heads=num_heads or width // 64,
                max_position_embeddings=len(positions),
                hidden_act="gelu" if open_clip else "quick_gelu",
            )
        )
    rename = open_clip_name if open_clip else lambda name: name.removeprefix("text_model.")
    left = (
        rf"text_projection|logit_scale|attn_mask|transformer\.resblocks\.{layers}\." if open_clip else r".*position_ids"
    )
    load_renamed(encoder, own, rename, f"the text encoder of {path}", left)
    number_positions(encoder, len(positions))
    return encoder.requires_grad_(False).eval(), 0 if open_clip else len(tokens) - 1


def number_positions(encoder: nn.Module, count: int) -> None:
    """Fills in CLIP's one buffer that is computed and in no file."""
    for module in encoder.modules():
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            module.position_ids = torch.arange(count)[None]


def layers_of(state: Mapping[str, Tensor]) -> int:
    """How many layers a CLIP tower has."""
    inside = r"(encoder\.layers|transformer\.resblocks)\."
    return len({name.split(".")[2] for name in state if re.match(inside, name)})


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tower with its joined queries, keys and values taken apart, as views, named as `open_clip_name` has them."""
    parts: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*\.attn)\.in_proj_(weight|bias)", name):
            thirds = zip("qkv", tensor.chunk(3), strict=True)
            parts |= {f"{match[1]}.{letter}_proj.{match[2]}": third for letter, third in thirds}
        else:
            parts[name] = tensor
    return parts
