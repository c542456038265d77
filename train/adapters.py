"""LoRA (Hu et al. 2021, arXiv 2106.09685) through peft: what is trained, and the adapter that it leaves behind."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..sample.adapter import Adapter


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter on the layers whose names end in one of `target_modules`; scaled by lora_alpha / rank, which
    is 1 where lora_alpha is absent."""

    rank: int = 16
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "attn.qkv", "attn.proj")


def add_adapter(network: nn.Module, lora: Lora, in_full: Sequence[str]) -> None:
    """Freezes the network but for a new adapter, which changes nothing yet, and for parameters whose names start with
    one of `in_full`: those that the base does not have. ValueError where nothing matches."""
    from peft import LoraConfig, inject_adapter_in_model

    if lora.rank < 1:
        raise ValueError(f"rank must be at least 1, got {lora.rank}")
    network.requires_grad_(False)
    alpha = lora.rank if lora.lora_alpha is None else lora.lora_alpha
    ends = tuple(f".{name}" for name in lora.target_modules)
    # What is trained in full has no adapter besides.
    places = [n for n, _ in network.named_modules() if f".{n}".endswith(ends) and not n.startswith(tuple(in_full))]
    if not places:
        raise ValueError(f"the network has no layers called {', '.join(lora.target_modules)}, to be adapted")
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=places)  # type: ignore[arg-type]
    inject_adapter_in_model(config, network, "default")
    for start in in_full:
        found = [p for name, p in network.named_parameters() if name.startswith(start)]
        if not found:
            raise ValueError(f"the network has no parameters called {start}*, which are to be trained in full")
        for parameter in found:
            parameter.requires_grad_(True)


def adapter_of(network: nn.Module) -> Adapter:
    """The adapter in a network that peft has adapted, and the plain network below it, as copies on the CPU."""
    from peft.tuners.lora import LoraLayer

    base, factors = copy.deepcopy(network).cpu(), {}
    for name, module in list(base.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            factor_a, factor_b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
            factors[name] = factor_a, layer.scaling["default"] * factor_b
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer.get_base_layer())
    return Adapter(base.requires_grad_(False).eval(), factors)
