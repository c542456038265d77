"""One sampling loop over a diffusers scheduler, for one candidate or for many that advance together."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .guidance import Guidance, Prior, combine, rungs
from .model import Condition, DiffusionModel
from .noise import Prediction, convert, like, rescaled
from .planning import Call, asked, device_and_dtype, evaluate, plan
from .seeds import GivenNoise, SeededNoise
from .timesteps import set_timesteps

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
}
"""The samplers whose input is x_t at a time of the model's path, after `scale_model_input` where they have one."""


@dataclass(frozen=True)
class Sampler:
    """How to sample, guidance apart: a key of SCHEDULERS, its steps, its options, and DDIM's eta."""

    scheduler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, model: DiffusionModel) -> Any:
        """The diffusers scheduler along the model's path."""
        return make_scheduler(model, self.scheduler, **self.options)


def make_scheduler(model: DiffusionModel, name: str = "ddim", **options: Any) -> Any:
    """A diffusers scheduler along the model's path, for the model's prediction.

    `name`: a key of SCHEDULERS; `options`: its own arguments (`timestep_spacing`, `clip_sample`, ...), no
    clipping by default. Where the scheduler does not understand the model's prediction it is given v, and the loop
    converts. ValueError for another name, for an option that the scheduler does not have, and as `check_scheduler`.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {sorted(SCHEDULERS)}, got {name!r}")
    scheduler_class = getattr(diffusers, SCHEDULERS[name])
    known = inspect.signature(scheduler_class.__init__).parameters
    if unknown := set(options) - set(known):
        raise ValueError(f"{SCHEDULERS[name]} has no option {sorted(unknown)}")
    if name == "ddim" and options.get("timestep_spacing") == "linspace":
        raise ValueError("DDIM in diffusers does not step along linspace times; choose trailing or leading")
    prediction = model.prediction
    # On a table of alpha-bar no scheduler means this flow; ancestral Euler lacks sample.
    if prediction == "flow_prediction" or (prediction == "sample" and name == "euler_ancestral"):
        prediction = "v_prediction"
    wanted = {"clip_sample": False, "prediction_type": prediction, **model.path.scheduler_config(), **options}
    scheduler = scheduler_class(**{key: value for key, value in wanted.items() if key in known})
    check_scheduler(model, scheduler)
    return scheduler


def check_scheduler(model: DiffusionModel, scheduler: Any) -> None:
    """ValueError unless the scheduler is one of SCHEDULERS, follows the model's path and reads its predictions."""
    if (name := type(scheduler).__name__) not in SCHEDULERS.values():
        raise ValueError(
            f"{name} is not supported, since its input may not be x_t on the model's path; "
            f"use one of {', '.join(SCHEDULERS.values())}"
        )
    table, own = getattr(model.path, "alphas_cumprod", None), getattr(scheduler, "alphas_cumprod", None)
    if (own is None) != (table is None):
        raise ValueError(f"{name} does not follow a {type(model.path).__name__}: only flow_euler follows a flow")
    if _learned(scheduler) and not model.learned_range:
        raise ValueError(
            f"{name} wants a learned variance, which {type(model).__name__} does not give; choose a fixed variance_type"
        )
    if table is None or own is None:
        return
    if getattr(model.path, "scale", None) is not None and name not in ("DDIMScheduler", "DDPMScheduler"):
        raise ValueError(f"{name} cannot follow a path that scales the data; use ddim or ddpm")
    if scheduler.config.prediction_type == "flow_prediction":
        raise ValueError(f"{name} takes flow_prediction on a flow alone; choose v_prediction, and the loop converts")
    # UniPC and its kin replace an alpha-bar of exactly 0 by 2**-24.
    if own.shape != table.shape or not torch.allclose(own.double(), table, rtol=1e-4, atol=1e-6):
        raise ValueError(f"{name}'s noise schedule is not the model's; make one with make_scheduler(model)")


def _learned(scheduler: Any) -> bool:
    return str(scheduler.config.get("variance_type")).startswith("learned")


@torch.no_grad()
def trajectories(
    model: DiffusionModel,
    condition: Condition,
    seeds: Sequence[int],
    guidances: Sequence[Guidance],
    *,
    scheduler: Any,
    steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    noise: Tensor | None = None,
    step_noise: Tensor | None = None,
    eta: float = 0.0,
    max_batch: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_guided: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_0 (G, B, *shape) of G candidates from the same noise and conditions, advancing together.

    condition: parts of (B, ...), on the model's device. seeds: B of them, see SeededNoise.
    scheduler: from `make_scheduler`, left as it was. steps, or timesteps where the scheduler takes them.
    noise: (B, *shape) initial noise, and step_noise: (steps, B, *shape), each in place of the seeds' own.
    eta: DDIM's (arXiv 2010.02502, eq. 16). max_batch: the most rows that one network call gets.
    on_step: called with (step, number of steps) after each; what it raises ends the sampling. on_guided: called with
    (candidate, guided prediction, most conditioned prediction), each (B, *shape), at each step.
    """
    check_scheduler(model, scheduler)
    for guidance in guidances:
        guidance.check(model)
    batch, count = len(seeds), len(guidances)
    device = device_and_dtype(model)[0]
    scheduler = copy.deepcopy(scheduler)
    set_timesteps(model, scheduler, steps, timesteps)
    source = SeededNoise(seeds, model.shape)
    drawn = source.draw()  # drawn even where it is not used: a step's noise never is the initial noise once more
    initial = drawn if noise is None else noise
    given = None if step_noise is None else iter(step_noise)
    if initial.shape != drawn.shape:
        raise ValueError(f"noise must have shape {tuple(drawn.shape)}, got {tuple(initial.shape)}")
    if step_noise is not None and step_noise.shape[1:] != drawn.shape:
        raise ValueError(f"step_noise must have shape (steps, *{tuple(drawn.shape)}), got {tuple(step_noise.shape)}")

    def draw() -> Tensor:
        noise = source.draw() if given is None else next(given, None)
        if noise is None:
            raise ValueError(f"step_noise must hold the noise of each of {total} steps, it ran out")
        return noise.to(device).repeat(count, *[1] * (noise.ndim - 1))

    x = initial.to(device, torch.float32).repeat(count, *[1] * (initial.ndim - 1))
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    extra = _step_options(scheduler, eta)
    guiders = [guidance.make_guider() for guidance in guidances]
    times_of_steps = scheduler.timesteps.tolist()
    needs = list(zip(*(asked(guidance, times_of_steps) for guidance in guidances), strict=True))
    plans: dict[str, list[Call]] = {}
    held: dict[int, Tensor] = {}
    total = len(scheduler.timesteps)
    for i, t in enumerate(scheduler.timesteps):
        x_t = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        if (key := str(needs[i])) not in plans:
            plans[key] = plan(model, condition, batch, guidances, needs[i])
        times = torch.full((batch,), float(t), dtype=torch.float64)
        rows = x_t.reshape(count, batch, *model.shape)
        predictions, variances = evaluate(plans[key], rows, times, guidances, max_batch)
        guided = []
        for g, guidance in enumerate(guidances):
            if guiders[g] is not None:
                guiders[g].set_state(step=i, num_inference_steps=total, timestep=t)
            used, between = rungs(guidance.scales_at(float(t)))
            if guidance.refresh > 1 and used[0] == 0 and len(used) > 1:
                upper = predictions[g, used[1]]
                if (g, 0) in predictions:
                    held[g] = upper - predictions[g, 0]
                else:
                    predictions[g, 0] = upper - held[g]
            ladder = [predictions[g, k] for k in used]
            guided.append(combine(guidance, ladder, between, guiders[g]))
            if on_guided is not None:
                on_guided(g, guided[-1], ladder[-1])
        out = torch.cat(guided)
        wanted: Prediction = getattr(scheduler.config, "prediction_type", "flow_prediction")
        if wanted != model.prediction:
            alpha, sigma = (like(c, out) for c in model.path.coefficients(times.repeat(count)))
            out = convert(out, x_t, model.prediction, wanted, alpha, sigma)
        if getattr(model.path, "scale", None) is not None:  # then the scheduler's x is x_t, see `check_scheduler`
            following = float(scheduler.timesteps[i + 1]) if i + 1 < total else None
            out, x = rescaled(model.path, wanted, out, x_t, times.repeat(count), following)  # type: ignore[arg-type]
        if _learned(scheduler):  # the most conditioned rung's; the scheduler takes it as further channels
            top = len(model.ladder)
            out = torch.cat([out, torch.cat([variances[g, top] for g in range(count)])], 1)
        with GivenNoise(draw):
            x = scheduler.step(out, t, x, return_dict=False, **extra)[0]
        if on_step is not None:
            on_step(i, total)
    return x.reshape(count, batch, *model.shape)


def sample(
    model: DiffusionModel,
    condition: Condition,
    seeds: Sequence[int],
    *,
    scheduler: Any,
    scales: Sequence[float],
    prior: Prior | None = None,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    guider: str | None = None,
    guider_options: Mapping[str, Any] | None = None,
    channels: int | None = None,
    mix: float = 1.0,
    refresh: int = 1,
    steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    noise: Tensor | None = None,
    step_noise: Tensor | None = None,
    eta: float = 0.0,
    max_batch: int | None = None,
) -> Tensor:
    """x_0 (B, *shape) of one candidate: guided as `Guidance` says, sampled as `trajectories` says."""
    return trajectories(
        model,
        condition,
        seeds,
        [
            Guidance(
                tuple(scales) if isinstance(scales, Sequence) else scales,
                prior,
                interval,
                rescale,
                guider,
                guider_options or {},
                channels,
                mix,
                refresh,
            )
        ],
        scheduler=scheduler,
        steps=steps,
        timesteps=timesteps,
        noise=noise,
        step_noise=step_noise,
        eta=eta,
        max_batch=max_batch,
    )[0]


def _step_options(scheduler: Any, eta: float) -> dict[str, Any]:
    if "eta" not in inspect.signature(scheduler.step).parameters:
        if eta:
            raise ValueError(f"{type(scheduler).__name__} has no eta; use DDIM, or leave eta at 0")
        return {}
    if eta == 1 and scheduler.alphas_cumprod[-1] == 0:
        eta = 1 - 1e-6  # from an SNR of 0 all of x_t would be new: the root of that rest is of less than 0 once rounded
    # Where x_0 is clipped, eps must be what then remains of x_t; else guidance pushes eps where x_0 may not go.
    clipped = bool(scheduler.config.clip_sample or scheduler.config.thresholding)
    return {"eta": eta, "use_clipped_model_output": clipped}
