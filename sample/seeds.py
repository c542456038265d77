"""Noise drawn sample by sample, each from its own seed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SeededNoise:
    """Normals drawn sample by sample, each from its own seed on the CPU.

    A sample's noise depends on its seed alone, never on the batch, the device or the number of devices, nor on
    torch's default device and type.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]):
        """`seeds`: one per sample, in [0, 2**32). ValueError otherwise."""
        if any(not 0 <= seed < 2**32 for seed in seeds):
            raise ValueError(f"seeds must lie in [0, 2**32), got {list(seeds)}")
        self.shape = shape
        self.generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def draw(self) -> Tensor:
        """The next (B, *shape) float32 normals, on the CPU."""
        return torch.stack(
            [torch.randn(self.shape, generator=g, device="cpu", dtype=torch.float32) for g in self.generators]
        )


class GivenNoise(TorchFunctionMode):
    """Hands a scheduler's own `torch.randn` the noise that `draw` gives, so that every sampler takes ours."""

    def __init__(self, draw: Callable[[], Tensor]):
        super().__init__()
        self.draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        noise, wanted = self.draw(), torch.Size(args[0] if args else kwargs["size"])
        if noise.shape != wanted:
            raise ValueError(
                f"the scheduler draws noise of shape {tuple(wanted)}, the samples have {tuple(noise.shape)}"
            )
        return noise.to(kwargs.get("dtype") or noise.dtype)
