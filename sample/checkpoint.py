"""Weights from files: read safely, and loaded with every name accounted for."""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path as File
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .inert import ALLOWED

_UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
)
"""What torch and safetensors raise at a damaged file."""


def read_checkpoint(path: str | File) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU: tensors by name, or dictionaries of them beside settings.

    Reads .safetensors; safetensors in shards, by their index or their folder; and torch's own format with weights only:
    besides tensors, plain values and numpy's numbers only `inert.ALLOWED`. Tensors are mapped, so that none is read
    before it is used (but for torch's oldest format). FileNotFoundError; ValueError for a file cut short, one that
    would run code, or shards that do not fit together.
    """
    path = File(path)
    if path.is_dir():
        path = _only_checkpoint(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    if path.name.endswith(".safetensors.index.json"):
        return _read_shards(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(list(ALLOWED)):
            # Mapped, so that an optimiser's state beside the weights is never read.
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNREADABLE as error:
        raise ValueError(f"{path} {_reason(path, error)}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, found {type(held).__name__}")
    return held


def _reason(path: File, error: Exception) -> str:
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            return "is Git LFS's note of a file, not the file: fetch it with `git lfs pull`"
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"is refused, and nothing of it was run: besides tensors and plain values it asks for {named[1]}"
    reason = text.splitlines()[0].split(". ")[0] if text else type(error).__name__
    return f"is not a whole checkpoint of tensors and plain values: {reason}"


def _only_checkpoint(folder: File) -> File:
    """A folder's one index of shards, or its one file of safetensors; variants (model.fp16.safetensors) give way."""
    for suffix in (".safetensors.index.json", ".safetensors"):
        found = sorted(folder.glob(f"*{suffix}"))
        found = [file for file in found if "." not in file.name.removesuffix(suffix)] or found
        if len(found) > 1:
            names = some([file.name for file in found])
            raise ValueError(f"{folder} holds more than one checkpoint, name one: {names}")
        if found:
            return found[0]
    raise FileNotFoundError(f"{folder} holds no .safetensors file, nor an index of such")


def _read_shards(index: File) -> dict[str, Tensor]:
    """All tensors of an index {"weight_map": {tensor: file beside it}}, as diffusers and transformers write it."""
    try:
        placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = sorted(set(placed.values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'{index} is no index of shards, which has a "weight_map" of tensors to files') from error
    held: dict[str, Tensor] = {}
    for name in files:
        if File(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} must name .safetensors files beside it, found {name!r}")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names the shard {name}, which is not beside it")
        shard = read_checkpoint(index.parent / name)
        own = [tensor for tensor, file in placed.items() if file == name]
        if missing := set(own) - shard.keys():
            raise ValueError(f"{index.parent / name} lacks {some(missing)}, which {index.name} says it holds")
        held |= {tensor: shard[tensor] for tensor in own}
    return held


def read_folder(network_class: Any, folder: str | File) -> Any:
    """A diffusers network from its folder of safetensors, or, where it has none, of torch's own files, which are read
    with weights only. ValueError where that is damaged, or where weights are left over or missing: diffusers itself
    would fill these in at random."""
    pickled = any(File(folder).glob("*.bin")) and not any(File(folder).glob("*.safetensors"))
    try:
        network, about = network_class.from_pretrained(
            folder, use_safetensors=not pickled, local_files_only=True, output_loading_info=True
        )
    except _UNREADABLE as error:
        raise ValueError(f"{folder} is no whole {network_class.__name__}: {str(error).splitlines()[0]}") from error
    for what, names in (("lacks", about["missing_keys"]), ("has besides", about["unexpected_keys"])):
        if names:
            raise ValueError(f"{folder} does not fit {network_class.__name__}: it {what} {some(names)}")
    return network


def weight_sets(held: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The state dicts in a checkpoint: entries that hold tensors ("state_dict", "ema"), and "" for its own tensors."""
    entries = {"": held, **{name: value for name, value in held.items() if isinstance(value, Mapping)}}
    sets = {name: {key: t for key, t in value.items() if isinstance(t, Tensor)} for name, value in entries.items()}
    return {name: tensors for name, tensors in sets.items() if tensors}


def choose_weights(held: Mapping[str, Any], name: str, path: str | File) -> dict[str, Tensor]:
    """The state dict in a checkpoint: its entry `name` ("ema", "model", "state_dict"), or itself where it is flat.

    ValueError where it is neither.
    """
    sets = weight_sets(held)
    if not (state := sets.get(name) or sets.get("")):
        raise ValueError(
            f"{path} has no weights called {name!r}; it has {sorted(sets)} (`priorguide doctor {path}` says what it is)"
        )
    return state


def load_exactly(network: nn.Module, state: Mapping[str, Tensor], path: str | File) -> None:
    """Loads `state`, from `path`, into the network. ValueError names what is missing, left over or of another shape.

    A network on the meta device, which has no memory yet, takes the tensors themselves in place of copies.
    """
    own = network.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)} in place of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = [
        f"{what} {some(names)}"
        for what, names in (
            ("lacks", own.keys() - state.keys()),
            ("has besides", state.keys() - own.keys()),
            ("has", shapes),
        )
        if names
    ]
    if faults:
        raise ValueError(f"{path} does not fit {type(network).__name__}: it {'; it '.join(faults)}")
    cast = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    network.load_state_dict(cast, assign=any(tensor.is_meta for tensor in own.values()))


def some(names: Collection[str], most: int = 4) -> str:
    """The first of the names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + rest
