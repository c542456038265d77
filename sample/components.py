"""What a bundle's folder holds of a model: its network, its nulls, and a description that it must agree with."""

import inspect
import json
import math
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path as File
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from .guidance import Prior, unconditional
from .kept import load_network, plain, restore
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


def _check_config(model_class: type[DiffusionModel], config: Mapping[str, Any]) -> None:
    """BundleError for a value of another type than the class says that it takes, where it says a plain one."""
    for name, value in config.items():
        parameter = inspect.signature(model_class.__init__).parameters.get(name)
        said = parameter.annotation if parameter else None
        union = typing.get_origin(said) in (typing.Union, types.UnionType)
        kinds = [k for k in (typing.get_args(said) if union else (said,)) if k in (bool, int, float, str, type(None))]
        if union and len(kinds) < len(typing.get_args(said)):
            continue  # it takes more than plain values
        if kinds and not isinstance(value, (*kinds, *([int] if float in kinds else []))):
            raise BundleError(f"{model_class.__name__} takes no {name} like {value!r}")


def load_model(folder: File, stored: dict[str, Any], whose: str, prefix: str = "") -> DiffusionModel:
    """The model that `describe` described, from the folder's `<prefix><network_name>/` and its companions' folders.

    `whose`: "model" or "prior", by which its nulls are filed.
    """
    stored = {"nulls": [], **stored}  # bundles from before there were any
    model_class = find(stored["class"])
    place = prefix + model_class.network_name
    network = load_network(folder, model_class, prefix, stored.get("stored", {}))
    components = {}
    for name in stored["components"]:
        if not name.isidentifier():
            raise BundleError(f"a component's name must be a plain word, got {name!r}")
        components[name] = load_companion(folder / name)
    filed = load_file(folder / NULL)
    nulls = {name: filed[f"{whose}.{name.removeprefix('null_')}"] for name in stored["nulls"]}
    _check_config(model_class, stored["config"])
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
    if odd := {"transformers_weights", "quantization_config"} & config.keys():
        raise BundleError(f"{folder.name}/config.json has {sorted(odd)}, which would take its weights from elsewhere")
    if "architectures" not in config:
        return restore(DiffusionModel.load_network(str(folder)), folder)
    name = (config["architectures"] or [None])[0]
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise BundleError(f"{folder.name}/ must name a model of transformers, got {name!r}")
    return restore(kind.from_pretrained(folder, use_safetensors=True, local_files_only=True), folder)


NOT_FOR_ALL = {"CC-BY-NC-4.0", "VideoCrafter (research only)"}
"""Licences under which weights are published that are for some uses only."""


def licences_of(model: DiffusionModel, prior: DiffusionModel | None, restricted: bool) -> dict[str, str | None]:
    """The licences of both, by whose they are. ValueError for a prior that is not for all, unless `restricted`, or
    held elsewhere."""
    if prior is None:
        return {"model": model.licence}
    if prior.licence in NOT_FOR_ALL and not restricted:
        raise ValueError(
            f"the prior's weights were published under {prior.licence}, which not everybody may use or pass on: embed "
            "them with restricted=True (--restricted) if you may, or choose another prior"
        )
    return {"model": model.licence, "prior": prior.licence}


def check_licences(stored: Mapping[str, Any]) -> Mapping[str, str | None]:
    """The stored licences themselves. BundleError for anything but their names."""
    if not all(isinstance(licence, str | None) for licence in stored.values()) or not stored.keys() <= {
        "model",
        "prior",
    }:
        raise BundleError(f"the licences of model and prior must be their names, got {dict(stored)!r}")
    return stored


def nulls_of(model: DiffusionModel, prior: DiffusionModel | None) -> dict[str, Tensor]:
    """The null parts of both, each a batch of one."""
    parts = {f"model.{name}": part for name, part in model.null({}).items()}
    if prior is not None:
        parts |= {f"prior.{name}": part for name, part in prior.null({}).items()}
    return plain(parts)


def sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Their types and shapes, as JSON."""
    return {name: {"dtype": str(part.dtype)[6:], "shape": list(part.shape)} for name, part in tensors.items()}


def model_index(model: DiffusionModel) -> dict[str, Any] | None:
    """diffusers' model_index.json, where a stock pipeline is all of the model's parts and a scheduler; else None.

    The pipeline is of the `published_as`, and every part of a class of diffusers or transformers, and no subclass.
    """
    import diffusers
    import transformers

    parts = {model.network_name: model.network, **companions(model)}
    placed: dict[str, Any] = {"scheduler": ["diffusers", "DDIMScheduler"]}
    for name, part in parts.items():
        kind = type(part)
        libraries = [m.__name__ for m in (diffusers, transformers) if getattr(m, kind.__name__, None) is kind]
        if not libraries:
            return None
        placed[name] = [libraries[0], kind.__name__]
    for name in model.published_as:
        pipeline: Any = getattr(diffusers, name, None)
        if not (isinstance(pipeline, type) and issubclass(pipeline, diffusers.DiffusionPipeline)):
            continue
        arguments = inspect.signature(pipeline).parameters
        optional = {*getattr(pipeline, "_optional_components", ())}
        needed = {p.name for p in arguments.values() if p.default is p.empty} - optional
        if needed <= placed.keys() <= arguments.keys():
            index = {"_class_name": name, "_diffusers_version": diffusers.__version__, **placed}
            index |= {part: [None, None] for part in optional - placed.keys()}
            if "requires_safety_checker" in arguments:
                index["requires_safety_checker"] = False
            return index
    return None


def check_index(file: File) -> None:
    """BundleError for a model_index.json that sends diffusers anywhere but to diffusers and transformers."""
    for name, value in json.loads(file.read_text()).items():
        if isinstance(value, list) and value[:1] not in (["diffusers"], ["transformers"], [None]):
            raise BundleError(f"{file.name} takes {name} from {value[:1]}: only diffusers and transformers are known")
