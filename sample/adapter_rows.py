"""A low-rank adapter (LoRA, arXiv 2106.09685) that some rows of a batch go without: base and fine-tune in one pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

BASE = "__base__"
"""peft's name for no adapter."""


class AdapterRows:
    """The adapted layers of one network, which `without` tells row by row whether their adapter takes part.

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
                f"prior 'base' is a network without its adapter, but {type(network).__name__} has none: load a LoRA "
                "that is not fused, or give the base network itself"
            )
        active = {name for layer in self._layers for name in layer.active_adapters}
        if len(active) != 1:
            raise ValueError(
                f"prior 'base' takes one active adapter, found {sorted(active)}: choose one with set_adapters, or fuse "
                "them and give the base network itself as the prior"
            )
        (self._name,) = active
        self._base: Sequence[bool] | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        self._handles = [layer.register_forward_pre_hook(self._rows, with_kwargs=True) for layer in self._layers]

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
        count, left = divmod(len(args[0]), len(self._base))  # attention over frames or places has them in its batch
        if left:
            raise ValueError(f"an adapted layer got {len(args[0])} rows for a batch of {len(self._base)}")
        names = [BASE if base else self._name for base in self._base for _ in range(count)]
        return args, {**kwargs, "adapter_names": names}
