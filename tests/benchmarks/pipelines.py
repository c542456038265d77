"""What guidance costs in a stock pipeline, way by way: seconds, evaluations, memory.

    python tests/benchmarks/pipelines.py [--rounds 3] [--batches 1 4] [--steps 3] [--threads 1] [--ways self base]
        [--no-memory] [--gpu]

A U-Net of Stable Diffusion's proportions at a fifth of its width (random weights, latents of 32 x 32, one context of 77
tokens), in diffusers' own pipeline without its autoencoder. Seconds are processor time, medians of calls taken in
turns, to and fro, in one process, after one uncounted round, and ratios are medians over rounds. Memory is that of a
process of its own per way that holds other networks: its peak after a call of two steps at the last batch size, beside
that of self guidance. Ratios carry over to other machines, seconds do not. --gpu: Stable Diffusion 1.5's width, in bf16
on a GPU, by the clock with the device waited for; memory is what torch has allocated at the most.
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from priorguide.sample.bits import bytes_of, reduce_bits
from priorguide.sample.pipeline import prior_guidance

RANK = 16


class Size(NamedTuple):
    widths: tuple[int, ...]
    context: int
    device: str
    dtype: torch.dtype


SMALL = Size((64, 128, 256, 256), 160, "cpu", torch.float32)
FULL = Size((320, 640, 1280, 1280), 768, "cuda", torch.bfloat16)
LORA = "LoRA's base in one pass"
WAYS = {
    "conditional alone": {"scale": 1.0},
    "self": {},
    "base": {"prior": True},
    "base in 8 bits": {"prior": True, "bits": "int8"},
    "base in 4 bits": {"prior": True, "bits": "nf4"},
    "base, refreshed every 2nd step": {"prior": True, "refresh": 2},
    "base, refreshed every 3rd step": {"prior": True, "refresh": 3},
    "base, in the middle of the path": {"prior": True, "interval": (100.0, 930.0)},
    "base, both": {"prior": True, "interval": (100.0, 930.0), "refresh": 3},
    "self, LoRA unmerged": {"lora": True},
    LORA: {"lora": True, "adapter": True},
    "LoRA merged, base beside it": {"lora": True, "merged": True, "prior": True},
}


def unet(seed: int, at: Size) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    with torch.device(at.device):
        network = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=at.widths,
            cross_attention_dim=at.context,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
    return network.eval().to(at.dtype)


def with_lora(network: Any, merged: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    names = ["to_q", "to_k", "to_v", "to_out.0"]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), network, "default")
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if merged:
        for name, layer in list(network.named_modules()):
            if hasattr(layer, "get_base_layer"):
                layer.merge()
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, layer.get_base_layer())
    network.eval()


def call(
    batch: int,
    steps: int,
    at: Size,
    scale: float = 7.5,
    prior: bool = False,
    lora: bool = False,
    merged: bool = False,
    adapter: bool = False,
    bits: Any = None,
    **options: Any,
) -> tuple[Callable[[], None], dict[str, int], int]:
    """A call of the pipeline, the rows that its networks have been given, by network, and the bytes of the prior's."""
    rows = {"own": 0, "prior": 0}
    base = unet(0 if lora else 1, at) if prior else None
    if base is not None and bits is not None:
        reduce_bits(base, bits)  # before the other network takes memory, so that the peak is not that of reducing
    own = unet(0, at)
    if lora:
        with_lora(own, merged)
    for name, network in (("own", own), ("prior", base)):
        if network is not None:
            count(network, name, rows)
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=own,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            clip_sample=False,
            timestep_spacing="trailing",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    on: dict[str, Any] = {"device": at.device, "dtype": at.dtype}
    context = {name: torch.randn(batch, 77, at.context, **on) for name in ("prompt_embeds", "negative_prompt_embeds")}
    latents, network = torch.randn(batch, 4, 32, 32, **on), base if prior else "base" if adapter else None

    def run() -> None:
        with prior_guidance(pipe, network, **options) if network is not None else nullcontext():
            pipe(
                **context, latents=latents, guidance_scale=scale, num_inference_steps=steps, output_type="latent"
            )  # no warm-up within: the first round is not counted

    return run, rows, bytes_of(base) if base is not None else 0


def count(network: Any, name: str, rows: dict[str, int]) -> None:
    """Adds the rows of each evaluation of the network to rows[name]: its first layer sees them all."""

    def add(module: Any, args: tuple[Any, ...]) -> None:
        rows[name] += len(args[0])

    network.conv_in.register_forward_pre_hook(add)


def peak() -> int:
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def now(at: Size) -> float:
    """Processor seconds; on a GPU seconds by the clock, once it has done what it was given."""
    if at.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(calls: dict[str, Any], rounds: int, at: Size) -> dict[str, list[float]]:
    """Seconds of each call, round by round."""
    seconds: dict[str, list[float]] = {way: [] for way in calls}
    for number in range(rounds + 1):
        for way, (run, evaluated, _) in list(calls.items())[:: 1 if number % 2 else -1]:
            evaluated |= dict.fromkeys(evaluated, 0)
            start = now(at)
            run()
            if number:
                seconds[way].append(now(at) - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--no-memory", action="store_true", help="no process of its own per way")
    parser.add_argument("--gpu", action="store_true", help="Stable Diffusion 1.5's size, in bf16 on a GPU")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    at = FULL if arguments.gpu else SMALL
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        call(arguments.batches[-1], 2, at, **WAYS[arguments.peak])[0]()
        print(json.dumps(peak()))
        return
    ways = {way: WAYS[way] for way in ("self", *(way for way in arguments.ways if way != "self"))}
    if not arguments.no_memory:  # first: a process that starts counts, as its own peak, what its parent holds then
        print("| peak memory beside self | |\n|---|---|")
        memory = on_device if arguments.gpu else apart
        alone = memory("self", arguments)
        for way in [way for way, options in ways.items() if not {"scale", "refresh", "interval"} & set(options)]:
            print(f"| {way} | {(memory(way, arguments) - alone) / 2**20:+.0f} MiB |", flush=True)
    parameters = sum(p.numel() for p in unet(0, at).parameters())
    print(f"\n{parameters / 1e6:.1f} M parameters, {arguments.steps} steps of DDIM, {arguments.rounds} rounds")
    for batch in arguments.batches:
        calls = {way: call(batch, arguments.steps, at, **options) for way, options in ways.items()}
        seconds = in_turns(calls, arguments.rounds, at)

        def beside(way: str, other: str, seconds: dict[str, list[float]] = seconds) -> str:
            return f"{statistics.median(a / b for a, b in zip(seconds[way], seconds[other], strict=True)):.3f}"

        print(f"\n| batch {batch} | seconds | beside self | evaluations, own + prior | prior's weights |")
        print("|---|---|---|---|---|")
        for way, (_, rows, held) in calls.items():
            own, other = (rows[name] // batch for name in ("own", "prior"))
            middle = statistics.median(seconds[way])
            print(f"| {way} | {middle:.2f} | {beside(way, 'self')} | {own} + {other} | {held / 2**20:.0f} MiB |")
        if {LORA, "self, LoRA unmerged"} <= set(ways):
            print(f"\nLoRA's base beside self, LoRA unmerged: {beside(LORA, 'self, LoRA unmerged')}", flush=True)


def apart(way: str, arguments: argparse.Namespace) -> int:
    """The peak of a process of its own."""
    sizes = ["--batches", str(arguments.batches[-1]), "--threads", str(arguments.threads)]
    command = [sys.executable, __file__, "--peak", way, *sizes]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def on_device(way: str, arguments: argparse.Namespace) -> int:
    """The most that torch has allocated on the GPU for the call, its networks included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call(arguments.batches[-1], 2, FULL, **WAYS[way])[0]()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
