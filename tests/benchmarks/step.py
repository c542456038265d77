"""What a training step and a comparison cost, as ratios measured in one run, printed as rows for BENCHMARKS.md.

    python tests/benchmarks/step.py [--only profile flags compiled optimiser adapter ddp comparison] [--rounds 5]

Seconds are processor time on one thread, in turns, medians after one uncounted round, so that other work on the machine
matters little; but those of two processes are by the clock. Memory comes from a process of its own per case.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from narrow import BATCH, Given, apart, edited, given, in_turns
from step_adapters import adapter
from step_profile import profile
from step_runs import comparison, ddp, one_fit
from torch import Tensor, nn

from priorguide.sample.machine import compile_network
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dit_network import DiTNetwork
from priorguide.train import fine_tune as fine_tuning
from priorguide.train.adapters import Lora
from priorguide.train.fit import quiet


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
    ways = {"as written": lambda network: None, "block by block": compile_network, "as a whole": nn.Module.compile}
    x_0, label, t = torch.randn(8, 4, 16, 16), torch.zeros(8, dtype=torch.long), torch.full((8,), 500.0)
    calls, first = {}, {}
    torch._inductor.config.force_disable_caches = True  # what one way has compiled is not there for the next
    for name, prepare in ways.items():
        model = DiT(DiTNetwork(input_size=16, hidden_size=384, depth=12, num_heads=6), space="latents")
        prepare(model.network)
        calls[name] = lambda model=model: model.denoise(x_0, t, {"label": label}).square().mean().backward()
        start = time.process_time()
        calls[name]()
        first[name] = time.process_time() - start
    seconds = in_turns(calls, 3 * rounds)
    plain = seconds["as written"]
    lines = [
        "| DiT-S, batch 8, float32, forward and backward | seconds, ratio | first step, in steps |",
        "|---|---|---|",
    ]
    return lines + [f"| {name} | {seconds[name] / plain:.2f} | {first[name] / plain:.0f} |" for name in ways]


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
