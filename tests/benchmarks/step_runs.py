"""Two processes beside one, and a comparison in the midst of training: sections of step.py."""

import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from narrow import BATCH, Given, edited, given, in_turns, trainer
from run import SAMPLER, Clock, pair

from priorguide.callbacks.comparison import PriorComparison
from priorguide.data.labelled import LabelledImages
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop

STEP = str(Path(__file__).with_name("step.py"))


def one_fit(devices: int, steps: int = 12) -> float:
    """Images per second of the narrow U-Net over all processes, on the first."""
    clock, options = Clock(4, steps), {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer(steps, folder, callbacks=[clock], **options).fit(Given(edited()), given(BATCH * steps * devices))
    return clock.images_per_second(BATCH) * devices


def ddp(rounds: int) -> list[str]:
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for devices in found:
            command = [sys.executable, STEP, "--fit", str(devices)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            found[devices] += [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("rate ")]
    ratio = statistics.median(two / one for one, two in zip(found[1], found[2], strict=True))
    pairs = ", ".join(f"{two / one:.2f}" for one, two in zip(found[1], found[2], strict=True))
    return ["| processes, one thread each | images/s, ratio |", "|---|---|", "| 1 | 1 |", f"| 2 (DDP) | {ratio:.2f} |",
            "", f"Pairs, by the clock: {pairs}."]  # fmt: skip


def comparison(rounds: int) -> list[str]:
    base, model = pair()
    priors = {"self": None, "base": base}
    callback = PriorComparison(priors, [2.0], SAMPLER, num_conditions=64, num_pictures=8, has_target=False)
    data = LabelledImages(transform="edges", resolution=16, max_train_samples=1000)
    module = FineTune(model, [Drop(("image",), 0.1)], ema_decay=0.995)
    x_0, condition = model.encode(data.held_out(64))

    def step() -> None:
        t = model.path.draw(torch.rand(64))
        module.loss(x_0, condition, torch.randn_like(x_0), t).mean().backward()
        module.model.network.zero_grad()

    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    callback.evaluate(module, data)
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    seconds = in_turns({"event": lambda: callback.evaluate(module, data), "step": step}, rounds)
    return [
        f"An event of 64 conditions, self and base at one scale, {SAMPLER.steps} steps: {seconds['event']:.1f} s, as "
        f"long as {seconds['event'] / seconds['step']:.0f} forward and backward passes of batch 64; it raises the peak "
        f"by {rise / 2**20:.0f} MiB above that of such a pass."
    ]
