"""Weights from files: read safely, and loaded with every name accounted for."""

import argparse
import pickle
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path as File
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
)
"""What torch and safetensors raise at a damaged file."""


def read_checkpoint(path: str | File) -> dict[str, Any]:
    """What a checkpoint file holds, on the CPU: tensors by name, or dictionaries of them beside settings.

    Reads .safetensors, and torch's own format with weights only: besides tensors and plain values the one class let
    through is argparse.Namespace. FileNotFoundError; ValueError for a file cut short, or one that would run code.
    """
    path = File(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, so that an optimiser's state beside the weights is never read.
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a whole checkpoint of tensors and plain values: {reason}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, found {type(held).__name__}")
    return held


def read_folder(network_class: Any, folder: str | File) -> Any:
    """A diffusers network from its folder of safetensors. ValueError where that is damaged, or where weights are left
    over or missing: diffusers itself would fill these in at random."""
    try:
        network, about = network_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (*_UNREADABLE, TypeError) as error:
        raise ValueError(f"{folder} is no whole {network_class.__name__}: {str(error).splitlines()[0]}") from error
    for what, names in (("lacks", about["missing_keys"]), ("has besides", about["unexpected_keys"])):
        if names:
            raise ValueError(f"{folder} does not fit {network_class.__name__}: it {what} {_some(names)}")
    return network


def choose_weights(held: Mapping[str, Any], name: str, path: str | File) -> dict[str, Tensor]:
    """The state dict in a checkpoint: itself where it is flat, else its entry `name` ("ema", "model").

    ValueError where there is none of that name.
    """
    state = held if any(isinstance(value, Tensor) for value in held.values()) else held.get(name)
    if not isinstance(state, Mapping):
        sets = sorted(key for key, value in held.items() if isinstance(value, Mapping))
        raise ValueError(f"{path} has no weights called {name!r}; it has {sets}")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def load_exactly(network: nn.Module, state: Mapping[str, Tensor], path: str | File) -> None:
    """Loads `state`, from `path`, into the network. ValueError names what is missing, left over or of another shape."""
    own = network.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)} in place of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = [
        f"{what} {_some(names)}"
        for what, names in (
            ("lacks", own.keys() - state.keys()),
            ("has besides", state.keys() - own.keys()),
            ("has", shapes),
        )
        if names
    ]
    if faults:
        raise ValueError(f"{path} does not fit {type(network).__name__}: it {'; it '.join(faults)}")
    network.load_state_dict(dict(state))


def _some(names: Collection[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + rest
