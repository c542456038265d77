"""What a training step and a comparison cost, as ratios measured in one run, printed as rows for BENCHMARKS.md.

    python tests/benchmarks/step.py [--only profile flags compiled optimiser adapter ddp comparison] [--rounds 5]

Seconds are processor time on one thread, in turns, medians after one uncounted round, so that other work on the machine
matters little; but those of two processes are by the clock. Memory comes from a process of its own per case.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
from diffusers import UNet2DConditionModel
from run import SAMPLER, Clock, pair
from torch import Tensor
from torch.utils.data import DataLoader

from priorguide.callbacks.comparison import PriorComparison
from priorguide.data.labelled import LabelledImages
from priorguide.sample.candidates import Candidate
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import Sampler, trajectories
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dit_network import DiTNetwork
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.train import fine_tune as fine_tuning
from priorguide.train.adapters import Lora, adapter_of
from priorguide.train.fine_tune import FineTune
from priorguide.train.fit import quiet
from priorguide.train.objective import Drop

CONTEXT = 64
BATCH = 2


def edited(width: int = 48) -> InstructPix2Pix:
    """Stable Diffusion 1.x's layout with 8 input channels, narrow, at random weights; its latents are given."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=8,
        norm_num_groups=16,
        layers_per_block=1,
    )
    return InstructPix2Pix(unet, torch.zeros(1, 77, CONTEXT), sample_size=16, space="latents")


class Given(FineTune):
    """Fine-tunes on batches that are latents and conditions already."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        t = self.model.path.draw(torch.rand(len(batch["x_0"])))
        condition = {name: batch[name] for name in ("image", "text")}
        return self.loss(batch["x_0"], condition, torch.randn_like(batch["x_0"]), t).mean()


def given(count: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x_0, image = (torch.randn(count, 4, 16, 16, generator=generator) for _ in range(2))
    text = torch.randn(count, 77, CONTEXT, generator=generator)
    rows = [{"x_0": x_0[i], "image": image[i], "text": text[i]} for i in range(count)]
    return DataLoader(rows, batch_size=BATCH)  # type: ignore[arg-type]


def trainer(steps: int, folder: str, **options: Any) -> L.Trainer:
    return L.Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0,
        enable_model_summary=False, default_root_dir=folder, **{"accelerator": "cpu", "devices": 1, **options},
    )  # fmt: skip


# --- profile


class Shares:
    """Processor seconds within the calls that are watched; what encloses others does not count theirs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = [0.0]

    @contextmanager
    def watch(self, owner: Any, name: str, label: str):
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._within.append(0.0)
            start = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                spent = time.process_time() - start
                self.seconds[label] = self.seconds.get(label, 0.0) + spent - self._within.pop()
                self._within[-1] += spent

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, original)


def profile(rounds: int) -> list[str]:
    lines = ["| processor time of a step | quickstart's network, batch 64 | narrow U-Net, batch 2 |", "|---|---|---|"]
    columns = []
    for name in ("quickstart", "narrow"):
        shares = Shares()
        with tempfile.TemporaryDirectory() as folder:
            steps = 10 * rounds
            if name == "quickstart":
                torch.manual_seed(0)
                module: FineTune = FineTune(pair()[1], [Drop(("image",), 0.1)], 5e-4, ema_decay=0.995)
                data: Any = LabelledImages(transform="edges", resolution=16, max_train_samples=1000)
                _ = data.splits  # decoding once is no part of a step
                clip = 1.0
            else:
                module, data, clip = Given(edited()), given(BATCH * 10), None
            watched = [
                (torch.Tensor, "backward", "backward pass"),
                (FineTune, "loss", "forward pass and loss"),
                (type(module), "training_step", "encoding, drop-out, noise"),
                (torch.optim.AdamW, "step", "optimiser (Lightning's closure about it)"),
                (fine_tuning.RunningMean, "move", "average"),
                (L.LightningModule, "configure_gradient_clipping", "clipping"),
                (L.pytorch.loops.training_epoch_loop._TrainingEpochLoop, "advance", "Lightning, data"),
            ]
            stack = [shares.watch(*one) for one in watched]
            for one in stack:
                one.__enter__()
            trainer(steps, folder, gradient_clip_val=clip).fit(module, data)
            for one in reversed(stack):
                one.__exit__(None, None, None)
        total = sum(shares.seconds.values())
        columns.append({label: seconds / total for label, seconds in shares.seconds.items()})
    for label in dict.fromkeys(label for column in columns for label in column):
        lines.append("| " + " | ".join([label, *(f"{column.get(label, 0):.1%}" for column in columns)]) + " |")
    return lines


# --- one step, and what changes it


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median processor seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def a_step(autocast: bool = False, fused: bool = True, **options: Any) -> Callable[[], None]:
    """Loss, backward, optimiser, average, as `FineTune` has them, without Lightning."""
    module = Given(edited(), ema_decay=0.999, **options)
    parameters = [p for p in module.model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=fused)
    mean = fine_tuning.RunningMean(module.average, module.model.network)
    (batch,) = given(BATCH)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean.move(0.999)

    return step


FLAGS: dict[str, dict[str, Any]] = {
    "plain (fused AdamW)": {},
    "AdamW not fused": {"fused": False},
    "channels_last": {"channels_last": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "bf16-mixed": {"autocast": True},
    "LoRA": {"lora": Lora()},
    "LoRA, all groups": {"lora": Lora(target_modules=("attention", "projections", "convolutions"))},
    "LoRA, base in int8": {"lora": Lora(base_bits="int8")},
    "LoRA, base in nf4": {"lora": Lora(base_bits="nf4")},
}


def flags(rounds: int) -> list[str]:
    peaks = {name: apart(partial(a_step, **options)) for name, options in FLAGS.items()}
    seconds = in_turns({name: a_step(**options) for name, options in FLAGS.items()}, rounds)
    plain = "plain (fused AdamW)"
    lines = ["| | seconds of a step, ratio | peak memory beside plain |", "|---|---|---|"]
    for name, value in seconds.items():
        more = f"{(peaks[name] - peaks[plain]) / 2**20:+.0f} MiB"
        lines.append(f"| {name} | {value / seconds[plain]:.2f} | {more} |")
    return lines


def compiled(rounds: int) -> list[str]:
    """A small transformer: the compiler takes minutes for a U-Net's many kernels on a CPU."""
    torch.manual_seed(0)
    twins = [DiT(DiTNetwork(input_size=16, hidden_size=384, depth=4, num_heads=6), space="latents") for _ in "ab"]
    twins[1].network.load_state_dict(twins[0].network.state_dict())
    twins[1].network.compile()
    x_0, label, t = torch.randn(8, 4, 16, 16), torch.zeros(8, dtype=torch.long), torch.full((8,), 500.0)

    def step(model: DiT) -> None:
        model.denoise(x_0, t, {"label": label}).square().mean().backward()

    start = time.process_time()
    step(twins[1])
    first = time.process_time() - start
    seconds = in_turns({"as written": lambda: step(twins[0]), "compiled": lambda: step(twins[1])}, 3 * rounds)
    ratio = seconds["compiled"] / seconds["as written"]
    return [
        f"DiT of width 384, 4 layers, batch 8, float32, forward and backward: compiled takes {ratio:.2f} of the time "
        f"as written; the first step took {first / seconds['as written']:.0f} steps' time."
    ]


def optimiser(rounds: int) -> list[str]:
    from bitsandbytes.optim import AdamW8bit

    held, calls = {}, {}
    for name, make in (("AdamW, fused", lambda p: torch.optim.AdamW(p, fused=True)), ("AdamW8bit", AdamW8bit)):
        parameters = list(edited().network.parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer = make(parameters)
        optimizer.step()
        states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        held[name] = sum({t.data_ptr(): t.nbytes for t in states}.values())
        calls[name] = optimizer.step
        weights = sum(p.nbytes for p in parameters)
    seconds = in_turns(calls, rounds)
    first = "AdamW, fused"
    lines = ["| | state beside the weights | ratio | seconds of its step, ratio |", "|---|---|---|---|"]
    for name in held:
        ratios = f"{held[name] / weights:.2f} | {held[name] / held[first]:.3f} | {seconds[name] / seconds[first]:.2f}"
        lines.append(f"| {name} | {ratios} |")
    return lines


# --- adapters


WAYS = ("self, adapter unmerged", "base, the adapter off, one batch", "base, a second network beside the adapter",
        "self, adapter merged", "base, a second network beside the merged one")  # fmt: skip


def guided(way: str, steps: int) -> Callable[[], object]:
    """A call that samples one batch."""
    model = edited().eval()
    second = edited().eval() if "second" in way else None
    FineTune(model, lora=Lora(), ema_decay=0)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if "merged" in way and "unmerged" not in way:
        model.network = adapter_of(model.network).merged()
    model.eval().network.requires_grad_(False)
    prior = unconditional(second, onto=model) if second else Candidate("base").bind(model) if "off" in way else None
    (batch,) = given(BATCH)
    condition = {name: batch[name] for name in ("image", "text")}
    scheduler = Sampler(steps=steps).make(model)
    guidance = [Guidance((1.5, 7.5), prior)]
    return lambda: trajectories(model, condition, range(BATCH), guidance, scheduler=scheduler, steps=steps)


def adapter(rounds: int) -> list[str]:
    peaks = {way: apart(partial(guided, way, 2)) for way in WAYS}  # first, while nothing is there to be used again
    seconds = in_turns({way: guided(way, 3) for way in WAYS}, rounds)
    first = WAYS[0]
    lines = ["| guidance with two scales | seconds, ratio | peak memory beside the first |", "|---|---|---|"]
    for way in WAYS:
        more = (peaks[way] - peaks[first]) / 2**20
        lines.append(f"| {way} | {seconds[way] / seconds[first]:.2f} | {more:+.0f} MiB |")
    size = sum(p.nbytes for p in edited().network.parameters()) / 2**20
    return [*lines, "", f"A network's own weights: {size:.0f} MiB."]


def apart(case: Callable[[], Callable[[], object]]) -> int:
    """Bytes by which the peak of a forked process rises while it makes the case's call and runs it twice."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call = case()
        call()
        call()
        rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(writer, json.dumps(rise * (1 if sys.platform == "darwin" else 1024)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return int(json.loads(pipe.read()))


# --- two processes, and comparisons


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
            command = [sys.executable, __file__, "--fit", str(devices)]
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


SECTIONS = {
    "profile": profile,
    "flags": flags,
    "compiled": compiled,
    "optimiser": optimiser,
    "adapter": adapter,
    "ddp": ddp,
    "comparison": comparison,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fit", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    if arguments.fit:
        rate = one_fit(arguments.fit)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the second process runs this very line
            print("rate", rate, flush=True)
    else:
        for name in arguments.only:
            print(f"#### {name}\n\n" + "\n".join(SECTIONS[name](arguments.rounds)) + "\n", flush=True)


if __name__ == "__main__":
    main()
