"""What a bundle's folder holds of a model: its network, its nulls, and a description that it must agree with."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path as File
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .guidance import Prior, unconditional
from .manifest import NULL, BundleError, canonical
from .model import DiffusionModel
from .models import find


def companions(model: DiffusionModel) -> dict[str, Any]:
    """What the model needs besides its network: frozen modules (an autoencoder, a text encoder), and a tokenizer.

    Its attribute is its folder's name and its keyword in `from_components`.
    """
    children = {name: child for name, child in model.named_children() if child is not model.network}
    found: dict[str, Any] = {name: child for name, child in children.items() if child.state_dict()}
    tokenizer = getattr(model, "tokenizer", None)
    return found if tokenizer is None else {**found, "tokenizer": tokenizer}


def own_nulls(model: DiffusionModel) -> dict[str, Tensor]:
    """The nulls that no network holds, such as the encoding of an empty prompt: buffers `null_<part>` (1, ...)."""
    return {name: tensor for name, tensor in model.named_buffers(recurse=False) if name.startswith("null_")}


def describe(model: DiffusionModel, folder: str, components: Collection[str] = ()) -> dict[str, Any]:
    """What a loaded model must agree with, as JSON. `components`: the companions that are stored with it."""
    return {
        "class": type(model).__name__,
        "folder": folder,
        "components": sorted(components),
        "nulls": sorted(own_nulls(model)),
        "config": model.config(),
        "path": {"class": type(model.path).__name__, **model.path.scheduler_config()},
        "prediction": model.prediction,
        "ladder": [sorted(keep) for keep in model.ladder],
        "shape": list(model.shape),
        "space": model.space,
    }


def _agree(stored: Any, own: Any) -> bool:
    """Equal JSON, but for the last digits of floats, which differ between machines' mathematics libraries."""
    if isinstance(stored, dict) and isinstance(own, dict):
        return stored.keys() == own.keys() and all(_agree(stored[key], own[key]) for key in own)
    if isinstance(stored, list) and isinstance(own, list):
        return len(stored) == len(own) and all(map(_agree, stored, own))
    if isinstance(stored, float) and isinstance(own, float):
        return math.isclose(stored, own, rel_tol=1e-9, abs_tol=1e-12)
    return type(stored) is type(own) and stored == own


def load_model(folder: File, stored: dict[str, Any], whose: str, prefix: str = "") -> DiffusionModel:
    """The model that `describe` described, from the folder's `<prefix><network_name>/` and its companions' folders.

    `whose`: "model" or "prior", by which its nulls are filed.
    """
    stored = {"nulls": [], **stored}  # bundles from before there were any
    model_class = find(stored["class"])
    place = prefix + model_class.network_name
    network = _restore(model_class.load_network(str(folder / place)), folder / place)
    components = {}
    for name in stored["components"]:
        if not name.isidentifier():
            raise BundleError(f"a component's name must be a plain word, got {name!r}")
        components[name] = load_companion(folder / name)
    filed = load_file(folder / NULL)
    nulls = {name: filed[f"{whose}.{name.removeprefix('null_')}"] for name in stored["nulls"]}
    model = model_class.from_components(network, **components, **nulls, **stored["config"])
    own = json.loads(canonical(describe(model, place, companions(model))))
    for name in own:
        if not _agree(stored.get(name), own[name]):
            raise BundleError(f"the manifest's {name} is {stored.get(name)!r}, its {stored['class']}'s {own[name]!r}")
    return model


def load_prior(folder: File, stored: dict[str, Any], model: DiffusionModel, of_model: dict[str, Any]) -> Prior:
    """The prior bound onto `model`, which `of_model` describes: its own network's, or the model with parts kept."""
    own = {name: value for name, value in stored.items() if name != "keep"}
    base = model if own == of_model else load_model(folder, own, "prior", "unconditional_")
    return unconditional(base, onto=model, keep=frozenset(stored["keep"]))


def _restore(module: nn.Module, folder: File) -> nn.Module:
    """The loaded module with exactly the stored tensors, in their own types, which diffusers casts to float32.

    Strict: diffusers would fill what is missing with random weights.
    """
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in stored:
            tensor.data = tensor.data.to(stored[name].dtype)
    module.load_state_dict(stored)
    return module


def load_companion(folder: File) -> Any:
    """A frozen module of diffusers or transformers, or a tokenizer, as its folder's JSON names it."""
    import transformers

    if (file := folder / "tokenizer_config.json").is_file():
        name = json.loads(file.read_text()).get("tokenizer_class")
        kind = getattr(transformers, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
            raise BundleError(f"{folder.name}/ must name a tokenizer of transformers, got {name!r}")
        return kind.from_pretrained(folder, local_files_only=True)
    config = json.loads((folder / "config.json").read_text())
    if "architectures" not in config:
        return _restore(DiffusionModel.load_network(str(folder)), folder)
    name = (config["architectures"] or [None])[0]
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise BundleError(f"{folder.name}/ must name a model of transformers, got {name!r}")
    return _restore(kind.from_pretrained(folder, use_safetensors=True, local_files_only=True), folder)


def save_network(network: Any, folder: File) -> None:
    """`save_pretrained`, for tied, shared and non-contiguous tensors too, and without the path it was loaded from.

    ValueError for a module that has no `save_pretrained`.
    """
    if not hasattr(network, "save_pretrained"):
        raise ValueError(f"a {type(network).__name__} has no save_pretrained, as diffusers' models have, to save it by")
    if not isinstance(network, nn.Module):  # a tokenizer
        network.save_pretrained(str(folder))
        return
    hook = network.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(plain(state)))
    try:
        network.save_pretrained(str(folder))  # type: ignore[operator]
    finally:
        hook.remove()
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("_name_or_path", None)
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


NOT_FOR_ALL = {"CC-BY-NC-4.0", "VideoCrafter (research only)"}
"""Licences under which weights are published that are for some uses only."""


def licences_of(model: DiffusionModel, prior: DiffusionModel | None, restricted: bool) -> dict[str, str | None]:
    """The licences of both, by whose they are. ValueError for a prior that is not for all, unless `restricted`."""
    if prior is None:
        return {"model": model.licence}
    if prior.licence in NOT_FOR_ALL and not restricted:
        raise ValueError(
            f"the prior's weights were published under {prior.licence}, which not everybody may use or pass on: embed "
            "them with restricted=True (--restricted) if you may, or choose another prior"
        )
    return {"model": model.licence, "prior": prior.licence}


def nulls_of(model: DiffusionModel, prior: DiffusionModel | None) -> dict[str, Tensor]:
    """The null parts of both, each a batch of one."""
    parts = {f"model.{name}": part for name, part in model.null({}).items()}
    if prior is not None:
        parts |= {f"prior.{name}": part for name, part in prior.null({}).items()}
    return plain(parts)


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit for bit, with equal names and types."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
