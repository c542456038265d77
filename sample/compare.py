"""Many candidates on the same noise and the same conditions: their pictures and what each costs."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .guidance import Arm, Guidance
from .loop import Sampler, trajectories
from .memory import peak_of
from .model import Condition, DiffusionModel
from .parts import Part, Parts
from .planning import device_and_dtype, evaluations
from .saturation import Energies, energy_ratio

_T = TypeVar("_T")


@dataclass(frozen=True)
class Cost:
    """What one arm costs: network evaluations and seconds per picture, bytes held beyond the model's own, and what one
    batch takes at its peak beyond all weights."""

    evaluations: int
    seconds_per_image: float
    extra_bytes: int
    peak_bytes: int | None = None


def compare(
    model: DiffusionModel,
    condition: Condition,
    seeds: Sequence[int],
    candidates: Mapping[Arm, Guidance],
    sampler: Sampler,
    *,
    batch_size: int = 64,
    on_step: Callable[[int, int], None] | None = None,
    watch: Energies | None = None,
    parts: Parts | None = None,
) -> dict[Arm, Tensor]:
    """Pixels (N, C, H, W) in [0, 1], on the CPU, of every arm, from the same noise and conditions.

    Arms advance together, `batch_size` conditions at a time. Arms that evaluate no prior (lowest scale 1) and
    are otherwise alike are sampled once. The condition may lie elsewhere than the model, and is moved by batches.
    `on_step` is called with (steps done, steps in all). `watch` sees each step's guided predictions. What `parts` holds
    is not sampled again; what is sampled is kept there.
    """
    scheduler, (device, _) = sampler.make(model), device_and_dtype(model)
    unique: dict[object, Guidance] = {}
    same = {}
    for arm, guidance in candidates.items():
        how: object = (guidance.scales, guidance.interval, guidance.rescale, guidance.guider, guidance.channels)
        key = how if guidance.scales[0] == 1 else arm
        same[arm] = key
        unique.setdefault(key, guidance)
    keys = list(unique)

    def draw(part: slice, number: int, chunks: int) -> Part:
        seen: dict[object, list[Tensor]] = {key: [] for key in keys}

        def report(step: int, total: int) -> None:
            if on_step is not None:
                on_step(number * total + step + 1, chunks * total)

        def look(arm: int, guided: Tensor, conditional: Tensor) -> None:
            seen[keys[arm]].append(energy_ratio(guided, conditional))

        x_0 = trajectories(
            model,
            {name: value[part].to(device) for name, value in condition.items()},
            seeds[part],
            list(unique.values()),
            scheduler=scheduler,
            steps=sampler.steps,
            eta=sampler.eta,
            on_step=report,
            on_guided=look if watch is not None else None,
        )
        ratios = [torch.stack(found).cpu() for found in seen.values() if found]
        return Part([model.decode(latent).float().cpu() for latent in x_0], ratios)

    done: list[Part] = []
    start = 0
    while start < len(seeds):
        found = parts.read(start) if parts else None
        if found is None or len(found.pictures) != len(keys) or (watch is not None and not found.ratios):
            left = -(-(len(seeds) - start) // batch_size)
            found = draw(slice(start, start + batch_size), len(done), len(done) + left)
            if parts:
                parts.write(start, found, batch_size)
        done.append(found)
        start += len(found.pictures[0])
    if watch is not None:
        for arm, key in same.items():
            watch.add(arm, torch.cat([part.ratios[keys.index(key)] for part in done]))
    pictures = {key: torch.cat([part.pictures[i] for part in done]) for i, key in enumerate(keys)}
    return {arm: pictures[key] for arm, key in same.items()}


def within_memory(run: Callable[[int], _T], batch_size: int) -> tuple[_T, int]:
    """run(batch_size) and the batch size; where memory runs out, again with half of it. MemoryError at one."""
    while True:
        try:
            return run(batch_size), batch_size
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
        # Past the except clause nothing holds the call's tensors any more.
        if batch_size == 1:
            raise MemoryError(f"comparing one condition at a time ran out of memory, fewer scales may fit: {reason}")
        batch_size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"comparing ran out of memory and goes on with a batch_size of {batch_size}", stacklevel=2)


def found_by_trying(run: Callable[[int], object], most: int, gain: float = 1.1) -> int:
    """The batch size that run(batch size) is worth: doubled from 1 to `most` until memory runs out, or the time per
    condition no longer falls by `gain`."""
    best, pace, size = 1, float("inf"), 1
    run(1)  # what happens once only
    while True:
        try:
            seconds = []
            for _ in range(2):
                start = time.perf_counter()
                run(size)
                seconds.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            break
        if size > 1 and min(seconds) / size * gain > pace:
            break
        best, pace = size, min(seconds) / size
        if size >= most:
            break
        size = min(2 * size, most)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return best


def cost(
    model: DiffusionModel, condition: Condition, seeds: Sequence[int], guidance: Guidance, sampler: Sampler
) -> Cost:
    """What one arm costs, measured on one batch of len(seeds) after one untimed step at the same shapes.

    `extra_bytes`: the prior's parameters and buffers, but those that it shares with the model.
    """
    scheduler, (device, _) = sampler.make(model), device_and_dtype(model)
    condition = {name: value.to(device) for name, value in condition.items()}
    scheduler.set_timesteps(sampler.steps)
    count = evaluations(guidance, scheduler.timesteps.tolist())

    def run(steps: int) -> None:
        trajectories(model, condition, seeds, [guidance], scheduler=scheduler, steps=steps, eta=sampler.eta)
        if device.type == "cuda":
            torch.cuda.synchronize()

    peak = peak_of(lambda: run(2), device)
    start = time.perf_counter()
    run(sampler.steps)
    seconds = (time.perf_counter() - start) / len(seeds)
    prior = guidance.prior
    extra = 0 if prior is None or guidance.scales[0] == 1 else size_in_bytes(prior.model, beside=model)
    return Cost(count, seconds, extra, peak)


def size_in_bytes(model: DiffusionModel, beside: DiffusionModel | None = None) -> int:
    """Bytes of the network's parameters and buffers, but those that `beside` shares."""
    tensors, shared = ([] if m is None else [*m.network.parameters(), *m.network.buffers()] for m in (model, beside))
    known = {id(tensor) for tensor in shared}
    return sum(t.numel() * t.element_size() for t in tensors if id(t) not in known)
