"""One sampling loop over a diffusers scheduler, for one candidate or for many that advance together."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .guidance import Guidance, Prior, combine, rungs
from .model import Condition, DiffusionModel, keep_only
from .noise import convert, like

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
    clipping by default. ValueError for another name or an option that the scheduler does not have.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {sorted(SCHEDULERS)}, got {name!r}")
    scheduler_class = getattr(diffusers, SCHEDULERS[name])
    known = inspect.signature(scheduler_class.__init__).parameters
    if unknown := set(options) - set(known):
        raise ValueError(f"{SCHEDULERS[name]} has no option {sorted(unknown)}")
    wanted = {"clip_sample": False, "prediction_type": model.prediction, **model.path.scheduler_config(), **options}
    scheduler = scheduler_class(**{key: value for key, value in wanted.items() if key in known})
    check_scheduler(model, scheduler)
    return scheduler


def check_scheduler(model: DiffusionModel, scheduler: Any) -> None:
    """ValueError unless the scheduler is one of SCHEDULERS and follows the model's path."""
    if (name := type(scheduler).__name__) not in SCHEDULERS.values():
        raise ValueError(
            f"{name} is not supported, since its input may not be x_t on the model's path; "
            f"use one of {', '.join(SCHEDULERS.values())}"
        )
    own = getattr(scheduler, "alphas_cumprod", None)
    table = getattr(model.path, "alphas_cumprod", None)
    if (own is None) != (table is None):
        raise ValueError(f"{name} does not follow a {type(model.path).__name__}; make one with make_scheduler(model)")
    if table is None:
        return
    # UniPC and its kin replace an alpha-bar of exactly 0 by 2**-24.
    if own.shape != table.shape or not torch.allclose(own.double(), table, rtol=1e-4, atol=1e-6):
        raise ValueError(f"{name}'s noise schedule is not the model's; make one with make_scheduler(model)")


class SeededNoise:
    """Normals drawn sample by sample, each from its own seed on the CPU.

    A sample's noise depends on its seed alone, never on the batch, the device or the number of devices.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]):
        """`seeds`: one per sample, in [0, 2**32). ValueError otherwise."""
        if any(not 0 <= seed < 2**32 for seed in seeds):
            raise ValueError(f"seeds must lie in [0, 2**32), got {list(seeds)}")
        self.shape = shape
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def draw(self) -> Tensor:
        """The next (B, *shape) float32 normals, on the CPU."""
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


class _GivenNoise(TorchFunctionMode):
    """Hands a scheduler's own `torch.randn` the noise that `draw` gives, so that every sampler takes ours."""

    def __init__(self, draw: Callable[[], Tensor]):
        super().__init__()
        self.draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        noise = self.draw()
        if (wanted := torch.Size(args[0] if args else kwargs["size"])) != noise.shape:
            raise ValueError(f"step_noise must have shape {tuple(wanted)}, got {tuple(noise.shape)}")
        return noise.to(kwargs.get("dtype") or noise.dtype)


@dataclass
class _Call:
    """One network's share of a step: the candidates' rungs that it evaluates, in one batch."""

    model: DiffusionModel
    slots: list[tuple[int, int, Prior | None]]  # (candidate, rung, the prior that the rung is read through)
    conditions: list[Condition]

    def joined(self) -> Condition:
        names = self.conditions[0].keys()
        return {name: torch.cat([condition[name] for condition in self.conditions]) for name in names}


def _plan(
    model: DiffusionModel, condition: Condition, batch: int, guidances: Sequence[Guidance], scales: Sequence[Any]
) -> list[tuple[_Call, Condition]]:
    """The network evaluations of a step, one call per network: rungs that share a network share a batch."""
    calls: dict[int, _Call] = {}
    cache: dict[Any, Condition] = {}
    for i, (guidance, own_scales) in enumerate(zip(guidances, scales, strict=True)):
        for k in rungs(own_scales)[0]:
            prior = (guidance.prior or Prior(model, model)) if k == 0 else None
            key: Any = prior if guidance.prior and k == 0 else k
            if key not in cache:
                cache[key] = (
                    prior.condition(condition, batch) if prior else keep_only(model, condition, model.ladder[k - 1], batch)
                )
            network = prior.model if prior else model
            call = calls.setdefault(id(network), _Call(network, [], []))
            call.slots.append((i, k, prior))
            call.conditions.append(cache[key])
    return [(call, call.joined()) for call in calls.values()]


def evaluations(guidance: Guidance, timesteps: Sequence[float]) -> int:
    """Network evaluations of one sample along `timesteps`."""
    return sum(len(rungs(guidance.scales_at(float(t)))[0]) for t in timesteps)


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
) -> Tensor:
    """x_0 (G, B, *shape) of G candidates from the same noise and conditions, advancing together.

    condition: parts of (B, ...), on the model's device. seeds: B of them, see SeededNoise.
    scheduler: from `make_scheduler`, left as it was. steps, or timesteps where the scheduler takes them.
    noise: (B, *shape) initial noise, and step_noise: (steps, B, *shape), in place of the seeds' own.
    eta: DDIM's (arXiv 2010.02502, eq. 16). max_batch: the most rows that one network call gets.
    on_step: called with (step, number of steps) after each; what it raises ends the sampling.
    """
    check_scheduler(model, scheduler)
    for guidance in guidances:
        guidance.check(model)
    batch, count = len(seeds), len(guidances)
    device, dtype = _device_and_dtype(model)
    scheduler = copy.deepcopy(scheduler)
    _set_timesteps(scheduler, steps, timesteps, device)
    given = iter(step_noise) if step_noise is not None else None
    source = SeededNoise(seeds, model.shape)
    initial = source.draw() if noise is None else noise
    if initial.shape != (batch, *model.shape):
        raise ValueError(f"noise must have shape {(batch, *model.shape)}, got {tuple(initial.shape)}")

    def draw() -> Tensor:
        drawn = source.draw() if given is None else next(given)
        return drawn.repeat(count, *[1] * (drawn.ndim - 1)).to(device)

    x = initial.to(device, torch.float32).repeat(count, *[1] * (initial.ndim - 1))
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    extra = {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
    if eta and not extra:
        raise ValueError(f"{type(scheduler).__name__} has no eta; use DDIM, or leave eta at 0")
    guiders = [guidance.make_guider() for guidance in guidances]
    plans: dict[Any, list[tuple[_Call, Condition]]] = {}
    total = len(scheduler.timesteps)
    for i, t in enumerate(scheduler.timesteps):
        x_t = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        scales = tuple(guidance.scales_at(float(t)) for guidance in guidances)
        if scales not in plans:
            plans[scales] = _plan(model, condition, batch, guidances, scales)
        times = torch.full((batch,), float(t), dtype=torch.float64)
        predictions = _evaluate(plans[scales], x_t.reshape(count, batch, *model.shape), times, dtype, max_batch)
        guided = []
        for g, guidance in enumerate(guidances):
            if guiders[g] is not None:
                guiders[g].set_state(step=i, num_inference_steps=total, timestep=t)
            ladder = [predictions[g, k] for k in rungs(scales[g])[0]]
            guided.append(combine(guidance, ladder, rungs(scales[g])[1], guiders[g]))
        out = torch.cat(guided)
        wanted = getattr(scheduler.config, "prediction_type", "flow_prediction")
        if wanted != model.prediction:
            alpha, sigma = (like(c, out) for c in model.path.coefficients(times.repeat(count)))
            out = convert(out, x_t, model.prediction, wanted, alpha, sigma)
        with _GivenNoise(draw):
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
        [Guidance(tuple(scales), prior, interval, rescale, guider)],
        scheduler=scheduler,
        steps=steps,
        timesteps=timesteps,
        noise=noise,
        step_noise=step_noise,
        eta=eta,
        max_batch=max_batch,
    )[0]


def _evaluate(
    plan: list[tuple[_Call, Condition]], x_t: Tensor, t: Tensor, dtype: torch.dtype, max_batch: int | None
) -> dict[tuple[int, int], Tensor]:
    """Predictions by (candidate, rung), in float32; x_t (G, B, *shape), t (B,) float64 on the CPU."""
    batch = len(t)
    predictions = {}
    for call, condition in plan:
        located = [prior.locate(x_t[g], t) if prior else (x_t[g], t) for g, _, prior in call.slots]
        x = torch.cat([x for x, _ in located]).to(dtype)
        times = torch.cat([t for _, t in located]).to(x.device, torch.float32)
        rows = max_batch or len(x)
        outs = [
            call.model.denoise(x[i : i + rows], times[i : i + rows], {k: v[i : i + rows] for k, v in condition.items()})
            for i in range(0, len(x), rows)
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        for (g, k, prior), prediction in zip(call.slots, out.float().split(batch), strict=True):
            predictions[g, k] = prior.express(prediction, x_t[g], t) if prior else prediction
    return predictions


def _device_and_dtype(model: DiffusionModel) -> tuple[torch.device, torch.dtype]:
    parameter = next((p for p in model.network.parameters() if p.is_floating_point()), None)
    return (torch.device("cpu"), torch.float32) if parameter is None else (parameter.device, parameter.dtype)


def _set_timesteps(scheduler: Any, steps: int | None, timesteps: Sequence[float] | None, device: torch.device) -> None:
    if (steps is None) == (timesteps is None):
        raise ValueError(f"give either steps or timesteps, got steps={steps}, timesteps={timesteps}")
    if timesteps is None:
        scheduler.set_timesteps(steps, device="cpu")
    elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=list(timesteps), device="cpu")
    else:
        raise ValueError(f"{type(scheduler).__name__} takes no timesteps of its own; give steps")
