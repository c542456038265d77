"""LoRA (Hu et al. 2021, arXiv 2106.09685) through peft: what is trained, and the adapter that it leaves behind."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..sample.adapter import Adapter
from ..sample.adapter_rows import UNTUNED, keep_untuned
from ..sample.bits import Bits, in_few_bits, reduce_bits, restore_bits

GROUPS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "attn.qkv", "attn.proj"),
    "projections": ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2"),
    "convolutions": ("conv1", "conv2", "conv3", "conv4", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
}
"""Names for the layers of diffusers' U-Nets and of transformers: of attention, of the feed-forward parts and what leads
into a transformer, and of residual blocks."""


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter on the layers whose names end in one of `target_modules`, or are of a group in GROUPS; scaled
    by lora_alpha / rank, which is 1 where lora_alpha is absent. base_bits: holds the linear layers below it in 8 bits
    ("int8") or 4 ("nf4"), by bitsandbytes."""

    rank: int = 16
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] = ("attention",)
    base_bits: Bits | None = None


def add_adapter(network: nn.Module, lora: Lora, in_full: Sequence[str]) -> None:
    """Freezes the network but for a new adapter, which changes nothing yet, and for parameters whose names start with
    one of `in_full`: those that the base does not have. ValueError where nothing matches,
    or not every name in `target_modules` that is no group's."""
    from peft import LoraConfig, inject_adapter_in_model

    if lora.rank < 1:
        raise ValueError(f"rank must be at least 1, got {lora.rank}")
    network.requires_grad_(False)
    alpha = lora.rank if lora.lora_alpha is None else lora.lora_alpha
    ends = tuple(f".{end}" for name in lora.target_modules for end in GROUPS.get(name, (name,)))
    # What is trained in full has no adapter besides.
    found = {n: m for n, m in network.named_modules() if f".{n}".endswith(ends) and not n.startswith(tuple(in_full))}
    places = [place for name, module in found.items() for place in _layers(name, module)]
    own = [name for name in lora.target_modules if name not in GROUPS]
    missing = [name for name in own if not any(f".{n}".endswith(f".{name}") for n in found)]
    if missing or not places:
        raise ValueError(
            f"the network has no layers called {', '.join(missing or lora.target_modules)}, to be adapted: "
            f"lora.target_modules takes {', '.join(GROUPS)}, or how the names of layers end"
        )
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=places)  # type: ignore[arg-type]
    if lora.base_bits:
        reduce_bits(network, lora.base_bits, leave=in_full)
    flag = {"int8": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit"}.get(lora.base_bits or "")
    if flag:
        setattr(network, flag, True)  # by which peft chooses its layers
    inject_adapter_in_model(config, network, "default")
    if flag:
        delattr(network, flag)
    for start in in_full:
        parameters = [p for name, p in network.named_parameters() if name.startswith(start)]
        if not parameters:
            raise ValueError(f"the network has no parameters called {start}*, which are to be trained in full")
        for parameter in parameters:
            parameter.requires_grad_(True)
    tuned = [n for n, _ in network.named_modules() if n.startswith(tuple(in_full))]
    keep_untuned(network.get_submodule(n) for n in tuned if not any(n.startswith(f"{other}.") for other in tuned))


def _layers(name: str, module: nn.Module) -> list[str]:
    """The layer itself; of a sequence, as temporal convolutions are, those in it."""
    if not isinstance(module, nn.Sequential):
        return [name]
    return [f"{name}.{child}" for child, part in module.named_children() if isinstance(part, nn.Linear | nn.Conv3d)]


def adapter_of(network: nn.Module) -> Adapter:
    """The adapter in a network that peft has adapted, and the plain network below it, as copies on the CPU."""
    base, factors = _plain(network, tuned=True)
    return Adapter(base, factors)


def base_of(network: nn.Module) -> nn.Module:
    """The plain network that an adapter was trained on, what is trained in full as it was, as a copy on the CPU."""
    return _plain(network, tuned=False)[0]


def _plain(network: nn.Module, tuned: bool) -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    from peft.tuners.lora import LoraLayer

    plain, factors = copy.deepcopy(network, {id(layer): layer for _, layer in in_few_bits(network)}), {}
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            factor_a, factor_b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
            factors[name] = factor_a.cpu(), layer.scaling["default"] * factor_b.cpu()
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, layer.get_base_layer())
        elif (untuned := module._modules.pop(UNTUNED, None)) is not None and not tuned:
            module.load_state_dict(untuned.state_dict())
    restore_bits(plain)
    return plain.cpu().requires_grad_(False).eval(), factors
