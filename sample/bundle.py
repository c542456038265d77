"""Bundles: a model, the prior that guides it, and the recipe, as one folder of safetensors and JSON.

The folder has diffusers' layout: `unet/` or `transformer/`, the prior in `unconditional_unet/` or
`unconditional_transformer/`, frozen companions such as `vae/`, `scheduler/`, and `null.safetensors`,
`recorded.safetensors`, `priorguide.json`. A bundle without guidance is a saved model. Nothing in it is ever run or
unpickled.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import components
from .adapter import Adapter
from .guidance import Guidance
from .hub import SAFE, locate
from .kept import plain, same_tensors, save_adapted, save_network, save_prior
from .loop import Sampler
from .machine import as_written, compile_network, device_name, environment, reproducible, threads_of
from .manifest import FORMAT_VERSION, NULL, RECORDED, BundleError, canonical, new_folder, refusing, seal, verify
from .model import Condition, DiffusionModel
from .recipe import check_timesteps, guidance_to_json, load_guidance, load_sampler, load_scheduler, timesteps_of
from .recorded import Recorded, Replay, device_of, pictures
from .reference import Reference

__all__ = ["Bundle", "BundleError", "Recorded", "Replay", "verify"]
INDEX = "model_index.json"


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
        adapter: Adapter | None = None,
        prior_held: str | Reference | None = None,
        prior_change: Mapping[str, Any] | None = None,
    ) -> File:
        """Writes a bundle, whole or not at all, and returns its folder; the model stays as it is.

        guidance and sampler come together; recorded needs both. evidence: the record of the decision, any JSON.
        restricted: also embed a prior that not everybody may use, see `licences_of`. adapter: what the model's network
        was merged from, stored in its place. prior_held: the precision to which the prior is rounded (`at_precision`),
        with what that changes (`guided_change`) for the manifest; or where on the Hub it lies, instead of in here.
        What the prior has in common with the model's network, or the adapter's base, is stored once.
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
        elsewhere = isinstance(prior_held, Reference)
        if prior_held is not None and apart is None:
            raise ValueError("there is no second network: the prior is the model itself, which is stored once anyway")
        nulls = components.nulls_of(model, apart)
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": components.describe(model, model.network_name, components.companions(model)),
            "prior": None,
            "guidance": guidance_to_json(guidance) if guidance else None,
            "sampler": dataclasses.asdict(sampler) if sampler else None,
            "timesteps": None,
            "null": components.sizes_of(nulls),
            "recorded": recorded.about() if recorded else None,
            "evidence": evidence,
            "provenance": dict(provenance) if provenance else None,
            "licences": components.licences_of(model, apart, restricted or elsewhere),
            "environment": environment(),
        }
        manifest["model"]["stored"] = {"form": "adapter" if adapter else "whole"}
        if prior:
            of_prior = components.describe(apart, f"unconditional_{apart.network_name}") if apart else manifest["model"]
            manifest["prior"] = {**of_prior, "keep": sorted(prior.keep)}
        index = components.model_index(model)
        canonical(manifest)  # refuses what is not JSON before anything is written
        folder = File(folder)
        with new_folder(folder) as temporary:
            if adapter:
                save_adapted(model.network, adapter, temporary, model.network_name)
            else:
                save_network(model.network, temporary / model.network_name)
            for name, module in components.companions(model).items():
                save_network(module, temporary / name)
            if apart:
                beside = adapter.base if adapter else model.network
                stored = save_prior(apart, beside, temporary, prior_held)
                manifest["prior"]["stored"] = {**stored, "change": dict(prior_change) if prior_change else None}
            if sampler or index:
                scheduler = (sampler or Sampler()).make(model)
                scheduler.save_pretrained(temporary / "scheduler")
                if sampler:
                    scheduler.set_timesteps(sampler.steps)
                    manifest["timesteps"] = timesteps_of(scheduler, prior)
                if index:
                    index["scheduler"] = ["diffusers", type(scheduler).__name__]
                    (temporary / INDEX).write_bytes(canonical(index))
            save_file(nulls, temporary / NULL)
            if recorded:
                parts = {f"condition.{name}": part for name, part in recorded.condition.items()}
                seeds = torch.tensor(recorded.seeds, dtype=torch.int64)
                save_file(plain({**parts, "seeds": seeds, "pictures": recorded.pictures.float()}), temporary / RECORDED)
            seal(temporary, manifest)
        return folder

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu", *, compile: bool = False
    ) -> "Bundle":
        """Verifies the folder, then loads it; BundleError, in one sentence, for anything but what `save` wrote.

        Model classes are found by name in `sample.models` alone. compile: torch.compile of the networks when they first
        run, for many batches of one shape: pictures follow from seeds as ever, and are `replay`ed as written.
        """
        folder = File(folder)
        manifest = verify(folder)
        with refusing(folder):
            model = components.load_model(folder, manifest["model"], "model")
            described = manifest["prior"]
            prior = components.load_prior(folder, described, model, manifest["model"]) if described else None
            apart = prior.model if prior and prior.model is not model else None
            nulls = components.nulls_of(model, apart)
            if not same_tensors(load_file(folder / NULL), nulls) or manifest["null"] != components.sizes_of(nulls):
                raise BundleError(f"{NULL} holds another null than the model's own; write bundles with Bundle.save")
            guidance, sampler, scheduler = None, None, None
            if manifest["guidance"] and manifest["sampler"]:
                guidance = load_guidance(manifest["guidance"], prior, model)
                sampler = load_sampler(manifest["sampler"])
                scheduler = load_scheduler(folder / "scheduler", sampler, model)
                if stored := manifest.get("timesteps"):
                    check_timesteps(stored, scheduler, prior)
            if INDEX in manifest["files"]:
                components.check_index(folder / INDEX)
            licences = components.check_licences(manifest["licences"] or {})
        for name, network in (("model", model), *([("prior", apart)] if apart else [])):
            network.licence = licences.get(name)
            network.eval().to(device)
            if compile:
                compile_network(network.network)
        return cls(model, guidance, sampler, scheduler, manifest, folder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        compile: bool = False,
    ) -> "Bundle":
        """The bundle in a folder, or in a repository on the Hub ("owner/name", at `revision`), as `load` has it.

        BundleError as `load`; FileNotFoundError and PermissionError as `hub.locate`.
        """
        found = locate(os.fspath(pretrained_model_name_or_path), revision=revision, allow_patterns=SAFE)
        return cls.load(found, device, compile=compile)

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
        return pictures(self.model, condition, seeds, guidance, sampler, self.scheduler, max_batch)

    def pipeline(self) -> Any:
        """diffusers' stock pipeline of the bundle, its prior and recipe within: see `pipeline.stock_pipeline`."""
        from .pipeline import stock_pipeline

        return stock_pipeline(self)

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
        then, prior = self.recorded(), self.guidance and self.guidance.prior
        models = {self.model, prior.model if prior else self.model}
        with refusing(self.folder), threads_of(then.threads), as_written(self.model.network), reproducible(*models):
            found = self.sample(then.condition, then.seeds, max_batch=then.max_batch).cpu()
            return Replay.beside(then, found, self.manifest["environment"], device_name(device_of(self.model)))
