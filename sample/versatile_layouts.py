"""Versatile Diffusion's image flow in the authors' checkpoint files and in diffusers' folder: which tensor is which.

The authors' layouts are told by names, never by the order of keys. A U-Net of this flow is Stable Diffusion's, with
cross-attention of the image context, of the text context, or of both, which diffusers calls dual.
"""

from collections.abc import Collection, Mapping
from pathlib import Path as File
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from . import ldm
from .checkpoint import choose_weights, read_checkpoint, read_folder
from .hub import locate
from .latents import read_autoencoder
from .published import read_encoder, read_tokenizer

Context = Literal["image", "text", "dual"]
KINDS = ("image", "text")
"""In the order of diffusers' DualTransformer2DModel.transformers."""

_TELLS = {
    "current": "diffuser.image.data_blocks.0.0.weight",
    "2022": "model.diffusion_model.unet_image.input_blocks.0.0.weight",
}
_VAE_PREFIXES = ("vae.image.", "autokl.", ldm.VAE, "")
_DEPTH = {"input_blocks": 3, "output_blocks": 3, "middle_block": 2}


def layout(names: Any) -> str | None:
    """ "current", "2022", or None for another file."""
    return next((kind for kind, tell in _TELLS.items() if tell in names), None)


def kinds_of(context: Context) -> tuple[str, ...]:
    """The contexts that a U-Net attends to. ValueError for another word."""
    if context not in get_args(Context):
        raise ValueError(f"context must be one of {get_args(Context)}, got {context!r}")
    return KINDS if context == "dual" else (context,)


def modules(levels: int, layers: int) -> tuple[list[str], list[str]]:
    """Latent diffusion's modules in the order in which the current layout numbers its data and its context blocks.

    All levels attend but the innermost.
    """
    data, context, number = ["input_blocks.0.0"], [], 1
    for level in range(levels):
        for _ in range(layers):
            data.append(f"input_blocks.{number}.0")
            context += [f"input_blocks.{number}.1"] if level < levels - 1 else []
            number += 1
        if level < levels - 1:
            data.append(f"input_blocks.{number}.0")
            number += 1
    data += ["middle_block.0", "middle_block.2"]
    context.append("middle_block.1")
    for number in range(levels * (layers + 1)):
        level = levels - 1 - number // (layers + 1)
        data.append(f"output_blocks.{number}.0")
        context += [f"output_blocks.{number}.1"] if level < levels - 1 else []
        if number % (layers + 1) == layers and level > 0:
            data.append(f"output_blocks.{number}.{2 if level < levels - 1 else 1}")
    return [*data, "out"], context


class Names:
    """The names that the tensors of one file have, in its own layout."""

    def __init__(self, state: Mapping[str, Tensor], path: str | File):
        """ValueError unless this is one of the authors' files."""
        self.layout, self.path = layout(state), path
        if self.layout is None:
            first = ", ".join([*state][:4])
            raise ValueError(
                f"{path} is no Versatile Diffusion checkpoint: it has neither {' nor '.join(_TELLS.values())}; "
                f"it begins with {first}"
            )
        blocks = _TELLS[self.layout].removesuffix("0.0.weight")
        where = len(blocks.split(".")) - 1
        halvings = [
            int(name.split(".")[where]) for name in state if name.startswith(blocks) and name.endswith(".0.op.weight")
        ]
        if not halvings:
            raise ValueError(f"{path} is no whole Versatile Diffusion checkpoint: it has no {blocks}*.0.op.weight")
        self.levels, self.layers = 1 + len(halvings), min(halvings) - 1

    def module(self, kind: str, part: str) -> dict[str, str]:
        """Latent diffusion's module -> this file's, of one flow's "data" or "context" part."""
        listed = modules(self.levels, self.layers)[("data", "context").index(part)]
        if self.layout == "2022":
            return {module: f"model.diffusion_model.unet_{kind}.{module}" for module in listed}
        return {module: f"diffuser.{kind}.{part}_blocks.{number}.0" for number, module in enumerate(listed)}

    def tensor(self, name: str, kind: str) -> str:
        """This file's name of a tensor that latent diffusion calls `name`, with attention to the `kind` context."""
        if name.startswith("time_embed."):
            return f"{'model.diffusion_model' if self.layout == '2022' else 'diffuser.image'}.{name}"
        parts = name.split(".")
        depth = _DEPTH.get(parts[0], 1)
        known = self.module("image", "data") | self.module(kind, "context")
        return ".".join([known[".".join(parts[:depth])], *parts[depth:]])

    def own(self, name: str, context: Context) -> str:
        """This file's name of a tensor of diffusers' U-Net with that context."""
        kind: str = "image" if context == "dual" else context
        for number, of in enumerate(KINDS):
            if f".transformers.{number}." in name:
                name, kind = name.replace(f".transformers.{number}.", "."), of
        return self.tensor(ldm.unet_name(name, self.layers, self.levels), kind)

    def others(self, context: Context) -> tuple[str, ...]:
        """Prefixes of what the image flow with that context does not need: other contexts, and the text flow."""
        unused = [self.module("text", "data")]
        unused += [self.module(kind, "context") for kind in KINDS if kind not in kinds_of(context)]
        return tuple(f"{module}." for part in unused for module in part.values())

    def size(self, state: Mapping[str, Tensor], name: str, kind: str, dim: int = 0) -> int:
        """One size of the tensor that latent diffusion calls `name`. ValueError where the file lacks it."""
        if (theirs := self.tensor(name, kind)) not in state:
            raise ValueError(f"{self.path} is no whole Versatile Diffusion checkpoint: it lacks {theirs}")
        return state[theirs].shape[dim]


def read_unet(
    state: Mapping[str, Tensor], path: str | File, context: Context, num_heads: int | None = None
) -> UNet2DConditionModel:
    """The image flow's U-Net from one of the authors' files: nothing is copied, no shared tensor is there twice.

    ValueError names what is missing or left over, in the file's own words.
    """
    kind, names = kinds_of(context)[0], Names(state, path)
    levels, layers = names.levels, names.layers
    firsts = [f"input_blocks.{1 + i * (layers + 1)}.0.out_layers.3.weight" for i in range(levels)]
    sizes: dict[str, Any] = {
        "in_channels": names.size(state, "input_blocks.0.0.weight", kind, 1),
        "out_channels": names.size(state, "out.2.weight", kind),
        "block_out_channels": [names.size(state, first, kind) for first in firsts],
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
        "cross_attention_dim": names.size(state, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", kind, 1),
        "dual_cross_attention": context == "dual",
    }
    heads = ldm.head_counts(sizes, num_heads, None)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sizes, attention_head_dim=heads, sample_size=64)
    prefix = "model.diffusion_model." if names.layout == "2022" else "diffuser."
    others = names.others(context)
    wanted = {name: tensor for name, tensor in state.items() if name.startswith(prefix) and not name.startswith(others)}
    ldm.load_renamed(unet, wanted, lambda name: names.own(name, context), f"the image flow of {path}")
    return unet


def read_clip(state: Mapping[str, Tensor], path: str | File, kind: str, num_heads: int | None = None) -> nn.Module:
    """The tower of CLIP, with its projection, that encodes one kind of context: each kind has a whole CLIP in the file.

    Frozen, in float32. ValueError where the file has none, or one that does not fit.
    """
    prefix, (tower, other) = f"ctx.{kind}.model.", ("text", "vision") if kind == "text" else ("vision", "text")
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    tells = [
        f"{'text' if kind == 'text' else 'visual'}_projection.weight",
        f"{tower}_model.encoder.layers.0.mlp.fc1.weight",
        f"{tower}_model.embeddings.position_embedding.weight",
        f"{tower}_model.embeddings.{'token' if kind == 'text' else 'patch'}_embedding.weight",
    ]
    if missing := [f"{prefix}{name}" for name in tells if name not in own]:
        raise ValueError(f"{path} has no {', '.join(missing)}: give CLIP as `clip`, a folder or Hub id")
    out, inner, positions, embedding = (own[name] for name in tells)
    layers = len({name.split(".")[3] for name in own if name.startswith(f"{tower}_model.encoder.layers.")})
    patch = embedding.shape[-1]
    last = (len(embedding), len(positions)) if kind == "text" else (round((len(positions) - 1) ** 0.5) * patch, patch)
    width = out.shape[1]
    with torch.device("meta"):
        encoder = _tower(kind, width, len(inner), len(out), layers, num_heads or width // 64, last)
    left = rf"{other}_model\.|(text|visual)_projection\.|logit_scale|.*position_ids"
    ldm.load_renamed(encoder, own, lambda name: name, f"the {kind} context's CLIP of {path}", left)
    ldm.number_positions(encoder, len(positions))
    return encoder.float()


def _tower(kind: str, width: int, inner: int, out: int, layers: int, heads: int, last: tuple[int, int]) -> nn.Module:
    """Random weights, frozen. last: the vocabulary and the length of a text, or the sides of a picture and a patch."""
    import transformers

    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "projection_dim": out}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    if kind == "image":
        vision = transformers.CLIPVisionConfig(**sizes, image_size=last[0], patch_size=last[1])
        return transformers.CLIPVisionModelWithProjection(vision).requires_grad_(False).eval()
    sizes |= {"vocab_size": last[0], "bos_token_id": last[0] - 2, "eos_token_id": last[0] - 1}
    text = transformers.CLIPTextConfig(**sizes, max_position_embeddings=last[1])
    return transformers.CLIPTextModelWithProjection(text).requires_grad_(False).eval()


def read_encoders(folder: File, kinds: Collection[str]) -> dict[str, Any]:
    """CLIP's towers, with their projections, for those kinds of context, and for text the tokenizer, by their names.

    folder: CLIP's own, or a pipeline's with text_encoder/, image_encoder/, tokenizer/. ValueError for what is missing.
    """
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    classes = {"text": CLIPTextModelWithProjection, "image": CLIPVisionModelWithProjection}
    own = (folder / "config.json").is_file()
    found: dict[str, Any] = {}
    for part in [f"{kind}_encoder" for kind in kinds] + ["tokenizer"] * ("text" in kinds):
        place = folder if own else folder / part
        if not place.is_dir():
            raise ValueError(f"{folder} has neither CLIP's config.json nor a folder {part}/: give CLIP as `clip`")
        found[part] = read_tokenizer(place) if part == "tokenizer" else read_encoder(classes[part.split("_")[0]], place)
    return found


def read_vae(name: str | File) -> AutoencoderKL:
    """An autoencoder from a diffusers folder or an original file, here or on the Hub."""
    path = locate(name)
    if path.is_dir():
        return read_autoencoder(path).float().requires_grad_(False).eval()
    return vae_within(choose_weights(read_checkpoint(path), "state_dict", path), path).float()


def vae_within(state: Mapping[str, Tensor], path: str | File) -> AutoencoderKL:
    """The autoencoder of an original file, under any of the prefixes that it is published under. ValueError if none."""
    found = [prefix for prefix in _VAE_PREFIXES if f"{prefix}post_quant_conv.weight" in state]
    if not found:
        raise ValueError(f"{path} has no autoencoder (vae.image.*): give one as `vae`, a folder, a file or a Hub id")
    own = {name.removeprefix(found[0]): tensor for name, tensor in state.items() if name.startswith(found[0])}
    return ldm.read_vae({f"{ldm.VAE}{name}": tensor for name, tensor in own.items()}, path)


def read_folder_unet(path: File, context: Context) -> UNet2DConditionModel:
    """The U-Net of a diffusers folder: image_unet/, with the text context's attention from text_unet/.

    Of text_unet/ nothing else is read: its data blocks are the text flow's. ValueError for what is not there.
    """
    unet = read_folder(UNet2DConditionModel, path / "image_unet")
    if unet.config["dual_cross_attention"] and context != "dual":
        raise ValueError(f"{path}/image_unet attends to both contexts: load it with context='dual'")
    if context == "image" or unet.config["dual_cross_attention"]:
        return unet
    files = [path / "text_unet" / f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ValueError(
            f"the text context's attention is in text_unet/, which {path} lacks: only context='image' loads"
        )
    held = choose_weights(read_checkpoint(found), "state_dict", found)
    return with_contexts(unet, {"image": unet.state_dict(), "text": held}, context, found)


def with_contexts(
    unet: UNet2DConditionModel, attention: Mapping[str, Mapping[str, Tensor]], context: Context, path: str | File = ""
) -> UNet2DConditionModel:
    """A U-Net of `unet`'s tensors, with the attention that `attention` has for each kind of its context.

    `unet` attends to one context; `attention` may hold other tensors too. ValueError names what is missing.
    """
    kinds, state = kinds_of(context), {}
    for name, tensor in unet.state_dict().items():
        if ".attentions." not in name:
            state[name] = tensor
            continue
        if missing := [kind for kind in kinds if name not in attention[kind]]:
            raise ValueError(f"{path} lacks {name}, of the {missing[0]} context's attention")
        for kind in kinds:
            place = _placed(name, KINDS.index(kind)) if context == "dual" else name
            state[place] = attention[kind][name]
    # without what diffusers notes down of its own (_use_default_values), which would undo the change
    sizes = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        made = UNet2DConditionModel(**{**sizes, "dual_cross_attention": context == "dual"})
    made.load_state_dict(state, assign=True)
    return made


def _placed(name: str, number: int) -> str:
    head, tail = name.split(".attentions.")
    block, rest = tail.split(".", 1)
    return f"{head}.attentions.{block}.transformers.{number}.{rest}"


def tiny_encoders(out: int, tokenizer: Any, kinds: Collection[str]) -> dict[str, Any]:
    """Random towers for contexts of width `out`, of pictures of 16 x 16 in 5 tokens, for tests and trial runs."""
    last = {"text": (len(tokenizer), tokenizer.model_max_length), "image": (16, 8)}
    found: dict[str, Any] = {f"{kind}_encoder": _tower(kind, 16, 32, out, 2, 2, last[kind]) for kind in kinds}
    return found | ({"tokenizer": tokenizer} if "text" in kinds else {})
