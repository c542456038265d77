"""A low-rank adapter (LoRA, arXiv 2106.09685) that some rows of a batch go without: base and fine-tune in one pass."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .model import DiffusionModel, with_network

BASE = "__base__"
"""peft's name for no adapter."""
UNTUNED = "untuned"
"""Where a module that is trained in full holds a frozen copy of what it was."""


def keep_untuned(modules: Iterable[nn.Module]) -> None:
    """Each module gets, under UNTUNED, a frozen copy of itself, which its forward does not use; lists and sequences of
    modules, which run what is added to them, get it in their parts."""
    for module in modules:
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            keep_untuned(module.children())
        else:
            module.add_module(UNTUNED, copy.deepcopy(module).requires_grad_(False).eval())


class AdapterRows:
    """The adapted layers of one network, which `without` tells row by row whether their adapter takes part; rows that
    go without pass the UNTUNED copies of what is trained in full.

    Attached to the layers between `attach` and `detach` only. Through peft's own mixed batches: in eval mode, with one
    active adapter that is not merged; what peft cannot mix (DoRA) it refuses itself.
    """

    def __init__(self, network: nn.Module):
        """ValueError where the network has no adapter, or several are active."""
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self._layers: list[Any] = [m for m in network.modules() if isinstance(m, LoraLayer | AuxiliaryTrainingWrapper)]
        if not self._layers:
            raise ValueError(
                f"prior 'base' is a network without its adapter, but {type(network).__name__} has none: load or train "
                "a LoRA that is not fused, or give the base network itself"
            )
        active = {name for layer in self._layers for name in layer.active_adapters}
        if len(active) != 1:
            raise ValueError(
                f"prior 'base' takes one active adapter, found {sorted(active)}: choose one with set_adapters, or fuse "
                "them and give the base network itself as the prior"
            )
        (self._name,) = active
        self._tuned = [module for module in network.modules() if UNTUNED in module._modules]
        self._base: Sequence[bool] | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        self._handles = [layer.register_forward_pre_hook(self._rows, with_kwargs=True) for layer in self._layers]
        self._handles += [module.register_forward_hook(self._as_it_was, with_kwargs=True) for module in self._tuned]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def without(self, base: Sequence[bool]) -> Iterator[None]:
        """Within it, row i of every batch goes without the adapter where base[i]."""
        self._base = base
        try:
            yield
        finally:
            self._base = None

    def _rows(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._base is None:
            return None
        names = [BASE if base else self._name for base in self._each(len(args[0]))]
        return args, {**kwargs, "adapter_names": names}

    def _as_it_was(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> Tensor | None:
        if self._base is None or not any(self._base):
            return None
        places = torch.tensor([i for i, base in enumerate(self._each(len(args[0]))) if base], device=out.device)
        untuned = module.get_submodule(UNTUNED)(*(part[places] for part in args), **kwargs)
        return out.index_copy(0, places, untuned.to(out.dtype))

    def _each(self, rows: int) -> list[bool]:
        """Whether each row that a layer gets goes without: attention over frames or places has them in its batch."""
        assert self._base is not None
        count, left = divmod(rows, len(self._base))
        if left:
            raise ValueError(f"an adapted layer got {rows} rows for a batch of {len(self._base)}")
        return [base for base in self._base for _ in range(count)]


class Unadapted(nn.Module):
    """A network with its adapter off, and with what is trained in full as it was; it shares the network's tensors.

    Asked together with the network itself the two go through it in one batch: see `planning.plan`.
    """

    def __init__(self, network: nn.Module):
        """ValueError as `AdapterRows`."""
        super().__init__()
        self.network = network
        self._adapter = AdapterRows(network)

    @contextmanager
    def rows(self, base: Sequence[bool]) -> Iterator[None]:
        """Within it, row i of every batch that the network gets goes without its adapter where base[i]."""
        self._adapter.attach()
        try:
            with self._adapter.without(base):
                yield
        finally:
            self._adapter.detach()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with self.rows([True] * len(x)):
            return self.network(x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # such as config and dtype
            return getattr(super().__getattr__("network"), name)


def unadapted(model: DiffusionModel) -> DiffusionModel:
    """The model that this one's adapter was trained on: the same network, switched off row by row. ValueError where the
    network has no adapter."""
    return with_network(model, Unadapted(model.network))
