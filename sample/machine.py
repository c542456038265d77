"""What a picture's last bits depend on besides its seed: versions, device, threads."""

import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


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


def as_written(network: nn.Module) -> AbstractContextManager[object]:
    """For a while no compiled code runs, where the network has been compiled: its last bits are others."""
    compiled = network._compiled_call_impl is not None
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
