"""Bundles: a model, the prior that guides it, and the recipe, as one folder of safetensors and JSON.

The folder has diffusers' layout: `unet/` or `transformer/`, the prior in `unconditional_unet/` or
`unconditional_transformer/`, frozen companions such as `vae/`, `scheduler/`, and `null.safetensors`,
`recorded.safetensors`, `priorguide.json`. A bundle without guidance is a saved model. Nothing in it is ever run or
unpickled.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .components import (
    companions,
    describe,
    licences_of,
    load_model,
    load_prior,
    nulls_of,
    plain,
    same_tensors,
    save_network,
)
from .guidance import Guidance, Prior
from .loop import SCHEDULERS, Sampler, check_scheduler, trajectories
from .machine import device_name, environment, threads_of
from .manifest import FORMAT_VERSION, NULL, RECORDED, BundleError, canonical, new_folder, refusing, seal, verify
from .model import Condition, DiffusionModel

__all__ = ["Bundle", "BundleError", "Recorded", "Replay", "verify"]


@dataclass(frozen=True, eq=False)
class Recorded:
    """A batch of pictures, with all that decides their bits; `Recorded.draw` makes it.

    condition: parts of (B, ...). seeds: B of them. pictures: float32 pixels (B, C, H, W) in [0, 1].
    max_batch: as in `trajectories`. threads: torch's. device: its type, or the GPU's name.
    """

    condition: Condition
    seeds: tuple[int, ...]
    pictures: Tensor
    max_batch: int | None
    threads: int
    device: str

    @classmethod
    def draw(
        cls,
        model: DiffusionModel,
        condition: Condition,
        seeds: Sequence[int],
        guidance: Guidance,
        sampler: Sampler,
        max_batch: int | None = None,
    ) -> "Recorded":
        """Samples the batch on its own, as `Bundle.replay` will. ValueError unless the networks are in eval mode."""
        for network in {model, guidance.prior.model if guidance.prior else model}:
            if any(module.training for module in network.modules()):
                raise ValueError(f"{type(network).__name__} is in train mode; call eval() on it before recording")
        pictures = _pictures(model, condition, seeds, guidance, sampler, sampler.make(model), max_batch)
        return cls(
            condition, tuple(seeds), pictures.cpu(), max_batch, torch.get_num_threads(), device_name(_device(model))
        )

    def about(self) -> dict[str, Any]:
        return {
            "batch": len(self.seeds),
            "max_batch": self.max_batch,
            "threads": self.threads,
            "device": self.device,
        }


@dataclass(frozen=True, eq=False)
class Replay:
    """A recorded batch sampled again: `identical` is bit for bit; `changes` names what the machine has other than
    then, as {name: (then, now)}."""

    pictures: Tensor
    identical: bool
    max_abs_difference: float
    changes: dict[str, tuple[Any, Any]]


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle read from `folder`, ready to sample, in eval mode; without guidance a model alone."""

    model: DiffusionModel
    guidance: Guidance | None
    sampler: Sampler | None
    scheduler: Any
    manifest: dict[str, Any]
    folder: File

    @staticmethod
    def save(
        folder: str | os.PathLike[str],
        model: DiffusionModel,
        *,
        guidance: Guidance | None = None,
        sampler: Sampler | None = None,
        recorded: Recorded | None = None,
        evidence: Any = None,
        provenance: Mapping[str, Any] | None = None,
        restricted: bool = False,
    ) -> File:
        """Writes a bundle, whole or not at all, and returns its folder; the model stays as it is.

        guidance and sampler come together; recorded needs both. evidence: the record of the decision, any JSON.
        restricted: also embed a prior that not everybody may use, see `licences_of`.
        FileExistsError where the folder exists, OSError where it cannot be written, ValueError or TypeError for
        guidance that does not fit the model or a record that is not JSON.
        """
        if (guidance is None) != (sampler is None):
            raise ValueError("guidance and sampler come together: give both, or neither to save a model alone")
        if recorded is not None and guidance is None:
            raise ValueError("a recorded batch needs the guidance and the sampler that made it")
        if guidance is not None:
            guidance.check(model)
        prior = guidance.prior if guidance else None
        apart = prior.model if prior and prior.model is not model else None
        licences = licences_of(model, apart, restricted)
        nulls = nulls_of(model, apart)
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": describe(model, model.network_name, companions(model)),
            "prior": None,
            "guidance": None,
            "sampler": dataclasses.asdict(sampler) if sampler else None,
            "null": {name: {"dtype": str(part.dtype)[6:], "shape": list(part.shape)} for name, part in nulls.items()},
            "recorded": recorded.about() if recorded else None,
            "evidence": evidence,
            "provenance": dict(provenance) if provenance else None,
            "licences": licences,
            "environment": environment(),
        }
        if prior:
            of_prior = describe(apart, f"unconditional_{apart.network_name}") if apart else manifest["model"]
            manifest["prior"] = {**of_prior, "keep": sorted(prior.keep)}
        if guidance:
            names = [field.name for field in dataclasses.fields(guidance) if field.name != "prior"]
            manifest["guidance"] = {name: getattr(guidance, name) for name in names}
            manifest["guidance"]["guider_options"] = dict(guidance.guider_options)
        canonical(manifest)  # refuses what is not JSON before anything is written
        folder = File(folder)
        with new_folder(folder) as temporary:
            for name, module in {model.network_name: model.network, **companions(model)}.items():
                save_network(module, temporary / name)
            if apart:
                save_network(apart.network, temporary / f"unconditional_{apart.network_name}")
            if sampler:
                sampler.make(model).save_pretrained(temporary / "scheduler")
            save_file(nulls, temporary / NULL)
            if recorded:
                parts = {f"condition.{name}": part for name, part in recorded.condition.items()}
                seeds = torch.tensor(recorded.seeds, dtype=torch.int64)
                save_file(plain({**parts, "seeds": seeds, "pictures": recorded.pictures.float()}), temporary / RECORDED)
            seal(temporary, manifest)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> "Bundle":
        """Verifies the folder, then loads it; BundleError, in one sentence, for anything but what `save` wrote.

        Model classes are found by name in `sample.models` alone.
        """
        folder = File(folder)
        manifest = verify(folder)
        with refusing(folder):
            model = load_model(folder, manifest["model"], "model")
            prior = load_prior(folder, manifest["prior"], model, manifest["model"]) if manifest["prior"] else None
            apart = prior.model if prior and prior.model is not model else None
            if not same_tensors(load_file(folder / NULL), nulls_of(model, apart)):
                raise BundleError(f"{NULL} holds another null than the model's own; write bundles with Bundle.save")
            guidance, sampler, scheduler = None, None, None
            if manifest["guidance"] and manifest["sampler"]:
                guidance = _load_guidance(manifest["guidance"], prior)
                guidance.check(model)
                guidance.make_guider()
                sampler = _load_sampler(manifest["sampler"])
                scheduler = _load_scheduler(folder / "scheduler", sampler, model)
        licences = manifest["licences"] or {}
        for name, network in (("model", model), *([("prior", apart)] if apart else [])):
            network.licence = licences.get(name)
            network.eval().to(device)
        return cls(model, guidance, sampler, scheduler, manifest, folder)

    def sample(
        self,
        condition: Condition,
        seeds: Sequence[int],
        *,
        scales: Sequence[float] | None = None,
        steps: int | None = None,
        max_batch: int | None = None,
    ) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1], guided as the bundle says unless `scales` or `steps` say otherwise.

        condition: parts of (B, ...), as `model.encode` gives them. seeds: B of them; one seed and one condition
        give one picture, whatever else is in the batch, but for rounding. ValueError for a model saved alone.
        """
        if self.guidance is None or self.sampler is None:
            raise ValueError(f"{self.folder} holds a model without guidance; sample it with priorguide.sample.loop")
        guidance = self.guidance if scales is None else dataclasses.replace(self.guidance, scales=tuple(scales))
        sampler = self.sampler if steps is None else dataclasses.replace(self.sampler, steps=steps)
        return _pictures(self.model, condition, seeds, guidance, sampler, self.scheduler, max_batch)

    def recorded(self) -> Recorded:
        """The batch that was recorded with the bundle. ValueError if there is none."""
        if not (about := self.manifest["recorded"]):
            raise ValueError(f"{self.folder} holds no recorded batch")
        with refusing(self.folder):
            stored = load_file(self.folder / RECORDED)
            parts = {name.split(".", 1)[1]: part for name, part in stored.items() if name.startswith("condition.")}
            seeds, pictures = tuple(stored["seeds"].tolist()), stored["pictures"]
            return Recorded(parts, seeds, pictures, about["max_batch"], about["threads"], about["device"])

    def replay(self) -> Replay:
        """Samples the recorded batch again, with its own composition and thread count. ValueError if there is none."""
        then = self.recorded()
        with refusing(self.folder), threads_of(then.threads):
            pictures = self.sample(then.condition, then.seeds, max_batch=then.max_batch).cpu()
            difference = (pictures - then.pictures).abs().max().item()
        before = {**self.manifest["environment"], "device": then.device}
        now = {**environment(), "device": device_name(_device(self.model))}
        changes = {name: (before[name], now.get(name)) for name in before if before[name] != now.get(name)}
        return Replay(pictures, torch.equal(pictures, then.pictures), difference, changes)


def _pictures(
    model: DiffusionModel,
    condition: Condition,
    seeds: Sequence[int],
    guidance: Guidance,
    sampler: Sampler,
    scheduler: Any,
    max_batch: int | None,
) -> Tensor:
    device = _device(model)
    condition = {name: part.to(device) for name, part in condition.items()}
    options: dict[str, Any] = {"steps": sampler.steps, "eta": sampler.eta, "max_batch": max_batch}
    x_0 = trajectories(model, condition, seeds, [guidance], scheduler=scheduler, **options)[0]
    with torch.no_grad():
        return model.decode(x_0).float()


def _load_guidance(stored: dict[str, Any], prior: Prior | None) -> Guidance:
    interval = stored["interval"]
    if interval is not None:
        low, high = (float(t) for t in interval)
        interval = low, high
    scales = tuple(float(scale) for scale in stored["scales"])
    return Guidance(**{**stored, "scales": scales, "interval": interval}, prior=prior)


def _load_sampler(stored: dict[str, Any]) -> Sampler:
    return Sampler(**{**stored, "steps": int(stored["steps"]), "eta": float(stored["eta"])})


def _load_scheduler(folder: File, sampler: Sampler, model: DiffusionModel) -> Any:
    """The scheduler with the very options that were in force, should a library's defaults have moved."""
    import diffusers

    config = json.loads((folder / "scheduler_config.json").read_text())
    if config["_class_name"] != (name := SCHEDULERS[sampler.scheduler]):
        raise BundleError(f"its scheduler is a {config['_class_name']}, the manifest's a {name}")
    scheduler = getattr(diffusers, name).from_config(config)
    check_scheduler(model, scheduler)
    scheduler.set_timesteps(sampler.steps)
    return scheduler


def _device(model: DiffusionModel) -> torch.device:
    return next((parameter.device for parameter in model.network.parameters()), torch.device("cpu"))
