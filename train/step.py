"""What makes a step quicker or smaller without changing what it computes: layout, compilation, optimiser, average."""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import local


def to_channels_last(network: nn.Module) -> None:
    """Kernels of 2-D convolutions with their channels last, which their outputs then have too. ValueError where none
    gains by it: where there are none, or patch embeddings alone, whose windows do not overlap."""
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    if all(layer.kernel_size == layer.stride for layer in layers):
        kind, but = type(network).__name__, " but for the embedding of patches" if layers else ""
        raise ValueError(f"{kind} has no 2-D convolutions to gain from channels_last{but}: leave it off")
    for layer in layers:
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it a compiled network runs as written: neither the batches of validation and comparisons nor the hooks of
    an adapter's base make it compile again, and compiled code never sees them."""
    with torch.compiler.set_stance("force_eager"):
        yield


KEPT_BYTES, LARGEST_ON_HEAP = 2**31 - 1, 32 * 2**20
"""Of freed memory that a process keeps; the largest piece that glibc lets the heap hold."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_* of <malloc.h>


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one: else it gives activations back to the system, which clears
    every page anew. Of use on CPUs alone, without effect where the C library is another."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, LARGEST_ON_HEAP)  # setting either ends glibc's own adjusting of both


def adamw(groups: list[dict[str, Any]], use_8bit: bool, clips: bool, precision: str, **options: Any) -> Any:
    """AdamW: bitsandbytes' in 8 bits, or torch's fused one.

    clips: whether Lightning clips gradients, which it refuses a fused optimiser in mixed precision. That is right for
    the scaled gradients of 16-mixed alone, so that bf16-mixed stays fused here.
    """
    if use_8bit:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **options)
    optimizer = torch.optim.AdamW(groups, fused=not (clips and precision == "16-mixed"), **options)
    if precision == "bf16-mixed":
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined] # nothing is scaled
    return optimizer


class RunningMean:
    """Moves one network towards another of the same build. Which tensors these are is looked up once: to walk all
    modules of a large network takes milliseconds of every step."""

    def __init__(self, mean: nn.Module, live: nn.Module):
        both = zip(mean.parameters(), live.parameters(), strict=True)
        self._parameters = [(own, other) for own, other in both if other.requires_grad]
        self._buffers = list(zip(mean.buffers(), live.buffers(), strict=True))

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """mean = decay mean + (1 - decay) live; buffers are copied."""
        mean, live = (_local(tensors) for tensors in zip(*self._parameters, strict=True))
        torch._foreach_lerp_(mean, live, 1 - decay)
        for own, other in self._buffers:
            own.copy_(other)


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local(tensor) for tensor in tensors]
