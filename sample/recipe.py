"""How a bundle samples, in its manifest and out of it: guidance, sampler, scheduler, timesteps."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import torch

from .guidance import Guidance, Prior
from .loop import SCHEDULERS, Sampler, check_scheduler
from .manifest import BundleError
from .model import DiffusionModel


def guidance_to_json(guidance: Guidance) -> dict[str, Any]:
    """All of it but the prior, which is a network."""
    names = [field.name for field in dataclasses.fields(guidance) if field.name != "prior"]
    options = dict(guidance.guider_options)
    return {name: getattr(guidance, name) for name in names} | {"guider_options": options}


def load_guidance(stored: Mapping[str, Any], prior: Prior | None, model: DiffusionModel) -> Guidance:
    """ValueError, TypeError, KeyError for what `guidance_to_json` does not give, or does not fit the model."""
    interval = stored["interval"]
    if interval is not None:
        low, high = (float(t) for t in interval)
        interval = low, high
    if stored["guider_options"] and not stored["guider"]:
        raise BundleError(f"it has guider_options {stored['guider_options']!r}, and no guider")
    scales = tuple(float(scale) for scale in stored["scales"])
    guidance = Guidance(**{**stored, "scales": scales, "interval": interval}, prior=prior)
    guidance.check(model)
    guidance.make_guider()
    return guidance


def load_sampler(stored: Mapping[str, Any]) -> Sampler:
    numbers = {"steps": int(stored["steps"]), "eta": float(stored["eta"])}
    return Sampler(**{**stored, **numbers, "options": dict(stored["options"])})


def load_scheduler(folder: File, sampler: Sampler, model: DiffusionModel) -> Any:
    """The scheduler with the very options that were in force, should a library's defaults have moved."""
    import diffusers

    config = json.loads((folder / "scheduler_config.json").read_text())
    if config["_class_name"] != (name := SCHEDULERS[sampler.scheduler]):
        raise BundleError(f"its scheduler is a {config['_class_name']}, the manifest's a {name}")
    if odd := [option for option, value in sampler.options.items() if config.get(option) != value]:
        raise BundleError(f"its scheduler has another {odd[0]} than the manifest's options")
    scheduler = getattr(diffusers, name).from_config(config)
    check_scheduler(model, scheduler)
    scheduler.set_timesteps(sampler.steps)
    return scheduler


def timesteps_of(scheduler: Any, prior: Prior | None) -> dict[str, list[float]]:
    """The timestep map: the times at which the model is asked, its timesteps being set, and those at which the prior
    then is, at equal log-SNR."""
    times = scheduler.timesteps.double()
    own = prior.locate(torch.zeros(len(times), 1), times)[1] if prior else times
    return {"model": times.tolist(), "prior": own.double().tolist()}


def check_timesteps(stored: Mapping[str, Any], scheduler: Any, prior: Prior | None) -> None:
    """BundleError where this installation would ask at other times, by a hundredth or more."""
    for whose, times in timesteps_of(scheduler, prior).items():
        then = stored[whose]
        if len(then) != len(times) or any(abs(a - b) > 0.01 for a, b in zip(then, times, strict=True)):
            raise BundleError(f"its {whose} was asked at the times {then}, and here would be at {times}")
