"""What a picture's last bits depend on besides its seed: versions, device, threads."""

import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def device_name(device: torch.device) -> str:
    """The GPU's name, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def environment() -> dict[str, str]:
    """What pictures may depend on: versions, and the machine's kind."""
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "diffusers", "transformers", "safetensors", "priorguide")
    }
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {**versions, "python": platform.python_version(), "machine": machine}


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """torch with so many threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def row_major(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it in the usual layout: by it a GPU chooses a convolution, each of which rounds in its
    own way, and files keep no layout."""
    usual = torch.empty(tensor.shape, device="meta").stride()
    return tensor if tensor.stride() == usual else tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def reproducible(*modules: nn.Module) -> Iterator[None]:
    """For a while all is decided to the last bit: the modules' weights ask for no gradient, by which torch chooses how
    it multiplies, and a GPU computes float32 in full, in place of TF32, and adds in one order."""
    before = torch.get_float32_matmul_precision()
    trained = {parameter for module in modules for parameter in module.parameters() if parameter.requires_grad}
    torch.set_float32_matmul_precision("highest")
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        for parameter in trained:
            parameter.requires_grad_(True)


def compile_network(network: nn.Module, sizes: int = 0) -> None:
    """torch.compile in place; tensors keep their names. Blocks that are all alike, and all but the whole network, are
    compiled one by one, which takes the time of a single one; other networks as a whole.

    sizes: how many pictures come in, in batches of two lengths. Each is then compiled by itself: torch's own way, code
    for all at once, ends in an error on CPUs (torch 2.13).
    """
    kinds = getattr(network, "_repeated_blocks", None) or ()
    blocks = [module for module in network.modules() if type(module).__name__ in kinds]
    alike = len({tuple(p.shape for p in block.parameters()) for block in blocks}) == 1
    share = sum(p.numel() for block in blocks for p in block.parameters())
    most = share > 0.9 * sum(p.numel() for p in network.parameters())
    options: dict[str, Any] = {"dynamic": False} if sizes else {}
    if sizes:
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 2 * sizes)  # beyond it all would run as written
    for module in blocks if alike and most else [network]:
        module.compile(**options)


def as_written(network: nn.Module) -> AbstractContextManager[object]:
    """For a while no compiled code runs, where the network has been compiled: its last bits are others."""
    compiled = any(module._compiled_call_impl is not None for module in network.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
