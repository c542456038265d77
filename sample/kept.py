"""How a network lies in a bundle: whole, with an adapter beside it, in part, in fewer bits, or on the Hub.

Whatever the form, what is loaded is one plain network, bit for bit the one that was saved.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapter import FILE as ADAPTER
from .adapter import Adapter, factors_of, merge
from .manifest import BundleError, canonical
from .model import DiffusionModel, plain_config
from .precision import PRECISIONS, decode, encode
from .reference import Reference, referenced

PART = "part.safetensors"
"""Tensors that are no whole network by themselves: by another name than diffusers', which would fill in the rest."""
WORTH_SHARING = 0.01
"""The share of a prior's bytes that the model's network must hold as well for the prior to be stored in part: below
it, the prior lies whole, for diffusers to open."""


def save_network(network: Any, folder: File) -> None:
    """`save_pretrained`, for tied, shared and non-contiguous tensors too, and without the path it was loaded from.

    ValueError for a module that has no `save_pretrained`.
    """
    if not hasattr(network, "save_pretrained"):
        raise ValueError(f"a {type(network).__name__} has no save_pretrained, as diffusers' models have, to save it by")
    if not isinstance(network, nn.Module):  # a tokenizer
        network.save_pretrained(str(folder))
        _without_origin(folder / "tokenizer_config.json", "name_or_path")
        return
    hook = network.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(plain(state)))
    try:
        network.save_pretrained(str(folder))  # type: ignore[operator]
    finally:
        hook.remove()
    _without_origin(folder / "config.json", "_name_or_path")


def _without_origin(file: File, key: str) -> None:
    if file.is_file():
        config = json.loads(file.read_text())
        config.pop(key, None)
        file.write_bytes(canonical(config))


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in one storage: as safetensors takes them."""
    copies, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        copies[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return copies


def save_adapted(network: nn.Module, adapter: Adapter, folder: File, name: str) -> None:
    """The adapter's base in its folder `name`, and the adapter beside it. ValueError unless they make the network."""
    if not same_tensors(adapter.merged().state_dict(), network.state_dict()):
        raise ValueError("the adapter and its base do not make the model's network: it must be adapter.merged()")
    save_network(adapter.base, folder / name)
    save_file(plain(adapter.tensors(name)), folder / ADAPTER, {"format": "pt"})


def save_prior(prior: DiffusionModel, beside: nn.Module, folder: File, held: str | Reference | None) -> dict[str, Any]:
    """Writes a prior's network into a bundle's folder, and says how, for the manifest.

    beside: the network that the bundle holds as it is, whose equal tensors are not stored again. held: one of
    PRECISIONS, to which the prior must have been rounded (`at_precision`), or where it lies on the Hub. ValueError
    where it is another network.
    """
    place = folder / f"unconditional_{prior.network_name}"
    state = plain(prior.network.state_dict())
    if isinstance(held, Reference):
        found = referenced(held, prior.network_name)
        if not same_tensors(_read(found.files), state):
            raise ValueError(f"{held} holds other weights than the prior: store the prior itself")
        _check_class(found.config, prior)
        return {"form": "reference", **found.to_json()}
    if held is not None:
        stored = plain(encode(state, held))
        if not same_tensors(decode(stored), state):
            raise ValueError(f"the prior is not rounded to {held}: bind at_precision(prior, {held!r}) before sampling")
        return _save_part(prior.network, place, stored, held)
    others = {name: tensor.cpu() for name, tensor in beside.state_dict().items()}
    same = type(prior.network) is type(beside) and hasattr(prior.network, "config")
    own = {name: t for name, t in state.items() if not (same and name in others and equal(t, others[name]))}
    if _size(own) > (1 - WORTH_SHARING) * _size(state):
        save_network(prior.network, place)
        return {"form": "whole"}
    return _save_part(prior.network, place, own, "part")


def _save_part(network: Any, place: File, stored: dict[str, Tensor], form: str) -> dict[str, Any]:
    place.mkdir(parents=True)
    name = "diffusion_pytorch_model.safetensors" if form == "bfloat16" else PART
    save_file(stored, place / name, {"format": "pt"})
    network.save_config(str(place))
    _without_origin(place / "config.json", "_name_or_path")
    return {"form": form}


def load_network(folder: File, model_class: type[DiffusionModel], prefix: str, stored: Mapping[str, Any]) -> nn.Module:
    """The network as it was saved. BundleError, or whatever else it is that does not fit."""
    place = folder / (prefix + model_class.network_name)
    form = stored.get("form", "whole")
    if form == "whole" or (form == "adapter" and not prefix):
        network = restore(model_class.load_network(str(place)), place)
        if form == "adapter":
            merge(network, factors_of(load_file(folder / ADAPTER), place.name))
        return network
    if not prefix or form not in ("part", "reference", *PRECISIONS):
        raise BundleError(f"a {'prior' if prefix else 'model'} is not stored in the form {form!r}")
    if form == "reference":
        found = referenced(Reference.from_json(stored), model_class.network_name, stored["files"])
        return _build(model_class, json.loads(found.config.read_text()), _read(found.files))
    state = _read(sorted(place.glob("*.safetensors")))
    if form == "part":
        state = {**_read(sorted((folder / model_class.network_name).glob("*.safetensors"))), **state}
    else:
        state = decode(state)
    return _build(model_class, json.loads((place / "config.json").read_text()), state, partial=form == "part")


def _read(files: list[File]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    return state


def _build(
    model_class: type[DiffusionModel], config: dict[str, Any], state: dict[str, Tensor], partial: bool = False
) -> nn.Module:
    """A network of the class that its config names, with these very tensors; partial: of those, its own."""
    network_class = _network_class(model_class, config)
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        network = network_class(**arguments)
    if any(buffer.is_meta for name, buffer in network.named_buffers() if name not in network.state_dict()):
        with torch.random.fork_rng(devices=[]):  # it computes tables, which no file holds
            network = network_class(**arguments)
    names = network.state_dict().keys()
    network.load_state_dict({k: v for k, v in state.items() if not partial or k in names}, assign=True)
    return network.requires_grad_(True)


def _network_class(model_class: type[DiffusionModel], config: Mapping[str, Any]) -> Any:
    """By its name, from diffusers or from where the model is defined: nothing else is looked up."""
    import diffusers

    name = str(config.get("_class_name"))
    found = getattr(diffusers, name, None) or vars(sys.modules[model_class.__module__]).get(name)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise BundleError(f"{model_class.__name__} has no network of the class {name!r}")
    return found


def _check_class(config: File, prior: DiffusionModel) -> None:
    """ValueError unless a referenced config describes the prior's own network."""
    stored = json.loads(config.read_text())
    own: Any = prior.network
    built: Any = _build(type(prior), stored, dict(own.state_dict()))
    if type(built) is not type(own) or canonical(plain_config(built)) != canonical(plain_config(own)):
        raise ValueError(f"{config} describes another network than the prior's: store the prior itself")


def restore(module: nn.Module, folder: File) -> nn.Module:
    """The loaded module with exactly the stored tensors, in their own types, which diffusers casts to float32.

    Strict: diffusers would fill what is missing with random weights.
    """
    stored = _read(sorted(folder.glob("*.safetensors")))
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in stored:
            tensor.data = tensor.data.to(stored[name].dtype)
    module.load_state_dict(stored)
    return module


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit for bit, with equal names and types."""
    return a.keys() == b.keys() and all(equal(a[name].cpu(), b[name].cpu()) for name in a)


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
