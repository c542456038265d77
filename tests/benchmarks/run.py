"""The benchmark suite: ratios measured in one run, written into BENCHMARKS.md.

    python tests/benchmarks/run.py [--quick]

Every figure compared with another comes from the same process, taken in turns, as a median; memory comes from a process
of its own per case. Absolute seconds are this machine's alone.
"""

import argparse
import datetime
import importlib.metadata
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch.nn import functional as F

from priorguide.callbacks.comparison import PriorComparison
from priorguide.data.labelled import LabelledImages
from priorguide.sample.guidance import unconditional
from priorguide.sample.loop import Sampler, sample
from priorguide.sample.models.pixel import PixelUNet
from priorguide.train.fine_tune import FineTune
from priorguide.train.fit import quiet
from priorguide.train.objective import Drop

PAGE = Path(__file__).parents[2] / "BENCHMARKS.md"
SAMPLER = Sampler("ddim", 25, options={"timestep_spacing": "trailing", "clip_sample": True})


def pair() -> tuple[PixelUNet, PixelUNet]:
    """The quickstart's base and a fine-tune of it, at random weights."""
    base = PixelUNet.create(resolution=16, fold=2).eval()
    return base, PixelUNet.from_base(base, image_channels=1).eval()


def guided(kind: str, batch: int, steps: int = SAMPLER.steps) -> Callable[[], object]:
    """A call that samples `batch` pictures: conditional, self CFG, or base-prior CFG."""
    base, model = pair()
    condition = {"image": torch.zeros(batch, 1, 16, 16)}
    scales = (1.0,) if kind == "conditional" else (3.0,)
    prior = unconditional(base, onto=model) if kind == "base" else None
    scheduler = SAMPLER.make(model)
    seeds = list(range(batch))
    return lambda: sample(model, condition, seeds, scheduler=scheduler, scales=scales, prior=prior, steps=steps)


def in_turns(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each call by the clock, taken in turns after one uncounted round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if number:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _peak(kind: str, batch: int, threads: int, result: "multiprocessing.Queue[int]") -> None:
    torch.set_num_threads(threads)
    guided(kind, 1, 1)()
    call = guided(kind, batch, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    unit = 1 if sys.platform == "darwin" else 1024
    result.put(unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def peak_memory(kind: str, batch: int) -> int:
    """Bytes by which a sampling call raises the peak resident memory of a fresh process."""
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=_peak, args=(kind, batch, torch.get_num_threads(), result))
    process.start()
    value = result.get(timeout=300)
    process.join()
    return value


def sampling(rounds: int, batch: int) -> list[str]:
    kinds = ("conditional", "self", "base")
    seconds = in_turns({kind: guided(kind, batch) for kind in kinds}, rounds)
    many = 32 * batch  # enough to rise above what the imports alone once held
    memory = {kind: peak_memory(kind, many) for kind in kinds}
    base, model = pair()
    lines = [
        f"### Sampling, batch {batch}, {SAMPLER.steps} DDIM steps",
        "",
        f"| | evaluations | seconds, ratio to self CFG | s/image | peak memory added, batch {many} |",
        "|---|---|---|---|---|",
    ]
    names = {"conditional": "conditional only (scale 1)", "self": "self CFG", "base": "base-prior CFG"}
    for kind in kinds:
        steps = SAMPLER.steps * (1 if kind == "conditional" else 2)
        lines.append(
            f"| {names[kind]} | {steps} | {seconds[kind] / seconds['self']:.2f} | {seconds[kind] / batch * 1e3:.2f} ms "
            f"| {memory[kind] / 2**20:.0f} MiB |"
        )
    size = sum(p.numel() * p.element_size() for p in base.network.parameters()) / 2**20
    return [*lines, "", f"The base's own parameters: {size:.1f} MiB.", ""]


class Clock(L.Callback):
    """Seconds between two optimiser steps."""

    def __init__(self, first: int, last: int):
        self.first, self.last, self.at = first, last, {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step in (self.first, self.last):
            self.at[trainer.global_step] = time.perf_counter()

    def images_per_second(self, batch: int) -> float:
        return (self.last - self.first) * batch / (self.at[self.last] - self.at[self.first])


def with_lightning(first: int, last: int, extra: list[L.Callback] | None = None) -> Clock:
    """The quickstart's fine-tuning, timed from step `first` to `last`."""
    torch.manual_seed(0)
    clock = Clock(first, last)
    data = LabelledImages(transform="edges", resolution=16, max_train_samples=1000)
    module = FineTune(pair()[1], [Drop(("image",), 0.1)], 5e-4, lr_scheduler="cosine", ema_decay=0.995)
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            max_steps=last, accelerator="cpu", logger=False, callbacks=[*(extra or []), clock], gradient_clip_val=1.0,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            default_root_dir=folder,
        ).fit(module, data)  # fmt: skip
    return clock


def with_plain_torch(first: int, last: int) -> float:
    """Images per second of the same network, data and arithmetic in a loop of plain PyTorch."""
    torch.manual_seed(0)
    data = LabelledImages(transform="edges", resolution=16, max_train_samples=1000)
    batches = [batch for _ in range(1 + last // 15) for batch in data.train_dataloader()]
    network = pair()[1].network.train()
    path = pair()[1].path
    average = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), 5e-4, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, last)
    for step in range(last):
        if step == first:
            start = time.perf_counter()
        batch = batches[step]
        x_0, image = F.pixel_unshuffle(batch["pixels"] * 2 - 1, 2), batch["image"]
        image = torch.where(torch.rand(len(x_0), 1, 1, 1) < 0.1, 0.0, image)
        t = torch.randint(1000, (len(x_0),))
        alpha, sigma = (c.float().view(-1, 1, 1, 1) for c in path.coefficients(t))
        eps = torch.randn_like(x_0)
        x_t = torch.cat([alpha * x_0 + sigma * eps, F.pixel_unshuffle(image, 2)], 1)
        out = network(x_t, t, class_labels=torch.zeros(len(x_0), dtype=torch.long), return_dict=False)[0]
        F.mse_loss(out, alpha * eps - sigma * x_0).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 0.005)
    return (last - first) * 64 / (time.perf_counter() - start)


def training(rounds: int, steps: int) -> list[str]:
    ours, plain = [], []
    for _ in range(rounds):
        plain.append(with_plain_torch(10, 10 + steps))
        ours.append(with_lightning(10, 10 + steps).images_per_second(64))
    ratio = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
    return [
        "### Fine-tuning, the quickstart's network, batch 64",
        "",
        "| | images/s |",
        "|---|---|",
        f"| plain PyTorch loop | {statistics.median(plain):.0f} |",
        f"| `FineTune` under Lightning | {statistics.median(ours):.0f} |",
        f"| ratio (median of {rounds} pairs) | {ratio:.3f} |",
        "",
    ]


def overhead(steps: int) -> list[str]:
    base, _ = pair()
    callback = PriorComparison(
        {"self": None, "base": base}, [2.0], SAMPLER, every_n_steps=steps // 4, num_conditions=64, num_pictures=8
    )
    start = time.perf_counter()
    with_lightning(1, steps, [callback])
    total = time.perf_counter() - start
    return [
        "### The comparison's share of training time",
        "",
        f"{len(callback.history)} comparisons of 64 conditions, self and base at one scale, in {steps} steps "
        f"of batch 64: {callback.seconds / total:.0%} of {total:.0f} s.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a trial of the suite itself; nothing is written")
    quick = parser.parse_args().quick
    quiet()
    lines = [
        *sampling(1 if quick else 7, 16 if quick else 64),
        *training(1 if quick else 5, 10 if quick else 100),
        *overhead(8 if quick else 400),
    ]
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "diffusers", "lightning"))
    header = [
        f"## CPU, {datetime.date.today()}",
        "",
        f"`make benchmark`; {torch.get_num_threads()} threads, {platform.machine()}, "
        f"Python {platform.python_version()}, {versions}. "
        "Ratios are of one run, taken in turns; absolute times are this machine's.",
        "",
    ]
    text = "\n".join([*header, *lines])
    print(text)
    if not quick:
        before, _, rest = PAGE.read_text().partition("## CPU, ")
        _, after, rest = rest.partition("\n## ")  # what other scripts measured stays
        PAGE.write_text(f"{before}{text}\n{after}{rest}")


if __name__ == "__main__":
    main()
