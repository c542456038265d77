"""Training on one GPU in bf16: images per second, share of the chip's matrix peak, peak memory, as rows.

    python tests/benchmarks/gpu.py [--models dit instruct_pix2pix] [--batches 32 64 128] [--steps 30] [--peak 989]
    python tests/benchmarks/gpu.py --tiny      # the script itself, on a CPU

DiT-XL/2 and InstructPix2Pix of Stable Diffusion 1.5's size, both at 256 px and at random weights, on latents and
contexts that are given (as from a cache), through `FineTune` under Lightning with its average. Operations are those of
the matrix products, convolutions and attention of one forward pass, counted by torch, three times (backward is twice
the forward); what gradient checkpointing does again is not counted. The peak is the chip's for dense bf16, from its
data sheet or --peak in TFLOP/s; beside it, what a product of two 8,192-square matrices reaches here.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from priorguide.sample.model import DiffusionModel
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dit_network import DiTNetwork
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.train.fine_tune import FineTune
from priorguide.train.fit import quiet

PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "A10G": 70, "L4": 121, "RTX 4090": 165, "RTX 5090": 210}
"""Dense bf16 with float32 sums, TFLOP/s, by what a GPU's name holds (SXM forms where there are several)."""


def dit(tiny: bool) -> DiffusionModel:
    sizes = {"hidden_size": 48, "depth": 2, "num_heads": 2} if tiny else {}
    return DiT(DiTNetwork(input_size=8 if tiny else 32, **sizes), space="latents")


def instruct_pix2pix(tiny: bool) -> DiffusionModel:
    side, sizes = (8, (32, 32, 64, 64)) if tiny else (32, (320, 640, 1280, 1280))
    context = 16 if tiny else 768
    unet = UNet2DConditionModel(
        sample_size=side, in_channels=8, block_out_channels=sizes, cross_attention_dim=context, attention_head_dim=8
    )
    return InstructPix2Pix(unet, torch.zeros(1, 77, context), sample_size=side, space="latents")


MODELS: dict[str, Callable[[bool], DiffusionModel]] = {"dit": dit, "instruct_pix2pix": instruct_pix2pix}
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "dit": {"plain": {}, "compile": {"compile": True}, "compile, 8-bit": {"compile": True, "use_8bit_adam": True}},
    "instruct_pix2pix": {
        "plain": {},
        "channels_last": {"channels_last": True},
        "compile, channels_last": {"compile": True, "channels_last": True},
        "compile, channels_last, 8-bit": {"compile": True, "channels_last": True, "use_8bit_adam": True},
        "gradient_checkpointing": {"gradient_checkpointing": True},
    },
}


class Given(FineTune):
    """Fine-tunes on batches that are latents and conditions already."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x_0, condition = batch["x_0"], {name: part for name, part in batch.items() if name != "x_0"}
        t = self.model.path.draw(torch.rand(len(x_0), device=x_0.device))
        return self.loss(x_0, condition, torch.randn_like(x_0), t).mean()


class Watch(L.Callback):
    """Seconds and memory from one step to the last, the device waited for."""

    def __init__(self, first: int, device: torch.device):
        self.first, self.device = first, device

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step in (self.first, trainer.max_steps):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.start, self.seconds = getattr(self, "start", now), now - getattr(self, "start", now)


def batch_of(model: DiffusionModel, size: int) -> dict[str, Tensor]:
    null = {name: part.expand(size, *part.shape[1:]) for name, part in model.null({}).items()}
    random = {name: torch.randn_like(part) if part.is_floating_point() else part * 0 for name, part in null.items()}
    return {"x_0": torch.randn(size, *model.shape), **random}


def operations(model: DiffusionModel) -> int:
    """Of one picture's training step."""
    batch = batch_of(model, 1)
    x_0 = batch.pop("x_0")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.denoise(x_0, torch.tensor([500.0]), batch)
    return 3 * counter.get_total_flops()


def measured_peak(device: torch.device) -> float:
    """TFLOP/s of one large product."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 10 * 2 * side**3 / (time.perf_counter() - start) / 1e12


def one(
    name: str, options: dict[str, Any], size: int, steps: int, device: torch.device, tiny: bool
) -> tuple[float, int]:
    """Images per second, and the peak of allocated bytes."""
    torch.manual_seed(0)
    model = MODELS[name](tiny)
    module = Given(model, ema_decay=0.9999, vb_weight=0.001, **options)
    batch = batch_of(model, size)
    watch = Watch(steps // 3, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            max_steps=steps, accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, precision="bf16-mixed",
            logger=False, callbacks=[watch], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        ).fit(module, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]  # fmt: skip
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return size * (steps - watch.first) / watch.seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--peak", type=float, help="the chip's dense bf16 peak in TFLOP/s")
    parser.add_argument("--tiny", action="store_true", help="a trial of the script itself")
    arguments = parser.parse_args()
    quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        parser.error("there is no GPU: --tiny tries the script itself")
    if arguments.tiny:
        arguments.batches, arguments.steps = [2], 6
    torch.set_float32_matmul_precision("high")
    chip = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    reached = measured_peak(device)
    peak = arguments.peak or next((value for part, value in PEAKS.items() if part in chip), reached)
    print(f"{chip}, torch {torch.__version__}; peak {peak:.3g} TFLOP/s, one large product reaches {reached:.3g}\n")
    print("| model | options | batch | images/s | TFLOP/s | share of the peak | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.models:
        count = operations(MODELS[name](arguments.tiny))
        for way, options in WAYS[name].items():
            for size in arguments.batches:
                head = f"| {name} | {way} | {size} |"
                try:
                    rate, memory = one(name, options, size, arguments.steps, device, arguments.tiny)
                except torch.OutOfMemoryError:
                    print(f"{head} out of memory | | | |", flush=True)
                    break
                finally:
                    gc.collect()
                    torch._dynamo.reset()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                done = rate * count / 1e12
                print(f"{head} {rate:.1f} | {done:.3g} | {done / peak:.1%} | {memory / 2**30:.1f} GiB |", flush=True)


if __name__ == "__main__":
    main()
