"""A low-rank adapter (Hu et al. 2021, arXiv 2106.09685) apart from the network that it adapts."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

FILE = "pytorch_lora_weights.safetensors"
"""Where diffusers' `load_lora_weights` looks for an adapter in a folder."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """base: the network with the adapter off, with what is trained in full in it. factors: by a layer's name, its
    A (r, in, ...) and B (out, r, ...), B with the adapter's scale in it."""

    base: nn.Module
    factors: dict[str, tuple[Tensor, Tensor]]

    def merged(self) -> nn.Module:
        """A copy of the base with every product B A added to its layer's weight."""
        network = copy.deepcopy(self.base)
        merge(network, self.factors)
        return network

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """By the names that diffusers gives an adapter of its component `prefix` ("unet", "transformer")."""
        return {
            f"{prefix}.{name}.lora_{letter}.weight": factor
            for name, factors in self.factors.items()
            for letter, factor in zip("AB", factors, strict=True)
        }


def merge(network: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Adds every product B A to its layer's weight, in place. AttributeError, RuntimeError where one does not fit."""
    for name, (a, b) in factors.items():
        layer = network.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        product = (b.flatten(1).float() @ a.flatten(1).float()).view_as(weight)
        layer.weight = nn.Parameter((weight.detach().float() + product).to(weight.dtype), weight.requires_grad)


def factors_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors from a file that holds what `Adapter.tensors` gave. ValueError where it holds anything else."""
    start, end = f"{prefix}.", ".lora_A.weight"
    names = [name[len(start) : -len(end)] for name in tensors if name.startswith(start) and name.endswith(end)]
    found = {f"{start}{name}.lora_{letter}.weight" for name in names for letter in "AB"}
    if found != tensors.keys():
        odd = sorted(found ^ tensors.keys())[0]
        raise ValueError(f"{FILE} must hold pairs {start}*.lora_A.weight and .lora_B.weight alone; see {odd}")
    return {name: (tensors[f"{start}{name}.lora_A.weight"], tensors[f"{start}{name}.lora_B.weight"]) for name in names}
