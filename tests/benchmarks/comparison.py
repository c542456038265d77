"""What k candidates cost in one comparison, beside k sampling loops of the stock kind, one after another.

    python tests/benchmarks/comparison.py [--rounds 5] [--batches 4 16 64] [--threads 1]

The stock loop is the one of diffusers' pipelines: DDIM's own `step`, condition and null in one batch of 2B, nothing but
the condition at scale 1; another network as prior is a call of its own. The networks are the quickstart's at random
weights, 25 steps; candidates are self and base at scales 1.5, 2 and 3, and the condition alone: k = 7. Both give the
same pictures, which is checked. Evaluations are rows that go through a network; seconds are of the processor, medians
taken in turns after an uncounted round, so that other work on the machine distorts them less.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from run import SAMPLER, pair
from torch import Tensor

from priorguide.sample.compare import compare
from priorguide.sample.guidance import Arm, Guidance, unconditional
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.seeds import SeededNoise

SCALES = (1.5, 2.0, 3.0)


@torch.no_grad()
def stock(model: PixelUNet, prior: PixelUNet | None, scale: float, condition: dict[str, Tensor], seeds: Any) -> Tensor:
    """Pixels of one candidate by a loop as diffusers' pipelines have it."""
    scheduler = SAMPLER.make(model)
    scheduler.set_timesteps(SAMPLER.steps)
    x, null = SeededNoise(seeds, model.shape).draw(), model.null(condition)
    both = {name: torch.cat([null[name], condition[name]]) for name in condition}
    for t in scheduler.timesteps:
        times = t.expand(len(x))
        if scale == 1:
            out = model.denoise(x, times, condition)
        else:
            if prior is None:
                out = model.denoise(torch.cat([x, x]), t.expand(2 * len(x)), both)
                uncond, cond = out.chunk(2)
            else:
                uncond, cond = prior.denoise(x, times, {}), model.denoise(x, times, condition)
            out = uncond + scale * (cond - uncond)
        x = scheduler.step(out, t, x, use_clipped_model_output=True).prev_sample
    return model.decode(x)


def count(model: PixelUNet, rows: list[int]) -> None:
    """Appends the rows of each of the network's evaluations."""

    def note(_: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs["sample"]))

    model.network.register_forward_pre_hook(note, with_kwargs=True)


def ways(batch: int) -> tuple[dict[str, Callable[[], Any]], list[int]]:
    base, model = pair()
    rows: list[int] = []
    count(base, rows)
    count(model, rows)
    draw = torch.Generator().manual_seed(0)
    condition, seeds = {"image": torch.rand(batch, 1, 16, 16, generator=draw)}, list(range(batch))
    prior = unconditional(base, onto=model)
    arms: dict[Arm, Guidance] = {("self", (1.0,)): Guidance((1.0,))}
    arms |= {("self", (s,)): Guidance((s,)) for s in SCALES} | {("base", (s,)): Guidance((s,), prior) for s in SCALES}

    def together() -> list[Tensor]:
        with torch.no_grad():
            return list(compare(model, condition, seeds, arms, SAMPLER, batch_size=batch).values())

    def apart() -> list[Tensor]:
        return [stock(model, base if n == "base" else None, s[0], condition, seeds) for n, s in arms]

    return {"one comparison": together, "stock loops": apart}, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| conditions | evaluations each, comparison / stock | network calls | seconds, comparison / stock |")
    print("|---|---|---|---|")
    for batch in arguments.batches:
        calls, rows = ways(batch)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        spent, pictures = {}, {}
        for number in range(arguments.rounds + 1):
            for name, call in calls.items():
                rows.clear()
                start = time.process_time()
                pictures[name] = call()
                if number:
                    seconds[name].append(time.process_time() - start)
                spent[name] = sum(rows) // batch, len(rows)
        ours, theirs = pictures.values()
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True)), "pictures differ"
        (own, own_calls), (other, other_calls) = spent["one comparison"], spent["stock loops"]
        a, b = (statistics.median(seconds[name]) for name in calls)
        print(
            f"| {batch} | {own} / {other} | {own_calls} / {other_calls} | {a:.2f} / {b:.2f} = {a / b:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
