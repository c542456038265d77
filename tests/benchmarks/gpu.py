"""Training on one GPU in bf16: images per second, share of the chip's matrix peak, peak memory, as rows.

    python tests/benchmarks/gpu.py [--rows dit:compile:256 instruct_pix2pix:plain:64 ...] [--steps 24] [--peak 989]
    python tests/benchmarks/gpu.py --tiny      # the script itself, on a CPU

DiT-XL/2 and InstructPix2Pix of Stable Diffusion 1.5's size, both at 256 px and at random weights, on encoded samples as
a cache gives them, through `FineTune` under Lightning: drop-out, noise, loss, AdamW, the average. Operations are those
of the matrix products, convolutions and attention of one forward pass, counted by torch, three times (backward is twice
the forward), below an adapter twice, since frozen weights take no gradient; what gradient checkpointing does again is
not counted. The peak is the chip's for dense bf16, from its
data sheet or --peak in TFLOP/s; beside it, what a product of two 8,192-square matrices reaches here. The first step's
seconds hold what compiles. --profile FILE: which kernels the device's time of the last row went to.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import UNet2DConditionModel
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from priorguide.sample.model import DiffusionModel
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dit_network import DiTNetwork
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.train.adapters import Lora
from priorguide.train.fine_tune import FineTune
from priorguide.train.fit import quiet
from priorguide.train.objective import Drop

PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "A10G": 70, "L4": 121, "RTX 4090": 165, "RTX 5090": 210}
"""Dense bf16 with float32 sums, TFLOP/s, by what a GPU's name holds (SXM forms where there are several)."""


def dit(tiny: bool, device: torch.device) -> DiffusionModel:
    sizes = {"hidden_size": 48, "depth": 2, "num_heads": 2} if tiny else {}
    with torch.device("meta"):
        network = DiTNetwork(input_size=8 if tiny else 32, **sizes)
    return DiT(filled(network, device), space="latents")


def instruct_pix2pix(tiny: bool, device: torch.device) -> DiffusionModel:
    side, sizes = (8, (32, 32, 64, 64)) if tiny else (32, (320, 640, 1280, 1280))
    context = 16 if tiny else 768
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=side, in_channels=8, block_out_channels=sizes, cross_attention_dim=context, attention_head_dim=8
        )
    null = torch.zeros(1, 77, context, device=device)
    return InstructPix2Pix(filled(unet, device), null, sample_size=side, space="latents")


def filled(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, at random weights drawn there."""
    network.to_empty(device=device)
    for tensor in network.state_dict().values():
        tensor.fill_(1) if tensor.ndim == 1 else tensor.normal_(std=0.02)
    return network


MODELS: dict[str, Callable[[bool, torch.device], DiffusionModel]] = {"dit": dit, "instruct_pix2pix": instruct_pix2pix}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compile": {"compile": True},
    "channels_last": {"channels_last": True},
    "compile+channels_last": {"compile": True, "channels_last": True},
    "compile+8bit": {"compile": True, "use_8bit_adam": True},
    "compile+channels_last+8bit": {"compile": True, "channels_last": True, "use_8bit_adam": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": Lora(rank=16)},
    "lora+nf4": {"lora": Lora(rank=16, base_bits="nf4")},
}
DROPS = {
    "dit": [Drop(("label",), 0.1)],
    "instruct_pix2pix": [Drop(("text",), 0.05), Drop(("text", "image"), 0.05), Drop(("image",), 0.05)],
}
ROWS = [
    *(f"dit:{way}:256" for way in ("plain", "compile", "compile+8bit", "gradient_checkpointing", "lora")),
    *(f"instruct_pix2pix:{way}:64" for way in ("plain", "channels_last", "compile", "compile+channels_last")),
    *(f"instruct_pix2pix:{way}:64" for way in ("compile+channels_last+8bit", "gradient_checkpointing", "lora")),
]


class Watch(L.Callback):
    """Seconds of the first step, and from step `first` to the last, the device waited for."""

    def __init__(self, first: int, device: torch.device):
        self.first, self.device, self.at = first, device, dict[int, float]()

    def on_train_start(self, *_: object) -> None:
        self.at[0] = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if (step := trainer.global_step) in (1, self.first, trainer.max_steps):
            wait(self.device)
            self.at[step] = time.perf_counter()

    def seconds(self, start: int, stop: int) -> float:
        return self.at[stop] - self.at[start]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def batch_of(model: DiffusionModel, size: int) -> dict[str, Any]:
    """Encoded samples on the CPU: latents with their deviation, and conditions."""
    null = {name: part.cpu().expand(size, *part.shape[1:]) for name, part in model.null({}).items()}
    random = {name: torch.randn_like(part) if part.is_floating_point() else part * 0 for name, part in null.items()}
    channels, *sides = model.shape
    mean, deviation = torch.randn(size, channels, *sides), torch.full((size, channels, *sides), 0.1)
    return {"posterior": torch.cat([mean, deviation], 1), "condition": random}


def operations(model: DiffusionModel, device: torch.device) -> int:
    """Of one picture's forward pass."""
    x_0, condition = model.encode(move_data_to_device(batch_of(model, 1), device))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.denoise(x_0, torch.tensor([500.0], device=device), condition)
    return counter.get_total_flops()


def measured_peak(device: torch.device) -> float:
    """TFLOP/s of one large product."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    wait(device)
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    wait(device)
    return 10 * 2 * side**3 / (time.perf_counter() - start) / 1e12


def one(
    name: str, way: str, size: int, steps: int, device: torch.device, tiny: bool, extra: list[L.Callback]
) -> tuple[float, float, float, int]:
    """Images per second, operations per second, seconds of the first step, and the peak of allocated bytes."""
    torch.manual_seed(0)
    model = MODELS[name](tiny, device)
    count = operations(model, device) * (2 if "lora" in way else 3)
    options = {"ema_decay": 0.9999, "vb_weight": float(name == "dit")}
    module = FineTune(model, DROPS[name], **options, **WAYS[way])
    watch = Watch(steps // 3, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batches = DataLoader(
        [batch_of(model, size)] * steps,  # type: ignore[arg-type]
        batch_size=None,
        pin_memory=device.type == "cuda",
    )
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            max_steps=steps, accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, precision="bf16-mixed",
            logger=False, callbacks=[watch, *extra], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        ).fit(module, batches)  # fmt: skip
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    rate = size * (steps - watch.first) / watch.seconds(watch.first, steps)
    return rate, rate * count, watch.seconds(0, 1), peak


class Profile(L.Callback):
    """Writes which kernels three of the last steps took their device's time for."""

    def __init__(self, path: str):
        self.path, self.profile = path, torch.profiler.profile()

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == trainer.max_steps - 4:
            self.profile.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == trainer.max_steps - 1:
            self.profile.stop()
            by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = self.profile.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=90)
            Path(self.path).write_text(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="MODEL:WAY:BATCH", help=f"ways: {', '.join(WAYS)}")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--peak", type=float, help="the chip's dense bf16 peak in TFLOP/s")
    parser.add_argument("--profile", metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="a trial of the script itself")
    arguments = parser.parse_args()
    quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        parser.error("there is no GPU: --tiny tries the script itself")
    torch.set_float32_matmul_precision("high")
    chip = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    reached = measured_peak(device)
    peak = arguments.peak or next((value for part, value in PEAKS.items() if part in chip), reached)
    print(f"{chip}, torch {torch.__version__}; peak {peak:.3g} TFLOP/s, one large product reaches {reached:.3g}\n")
    print("| model | options | batch | images/s | TFLOP/s | share of the peak | peak memory | first step |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for row in arguments.rows:
        name, way, size = row.split(":")
        size, steps = (2, 8) if arguments.tiny else (int(size), arguments.steps)
        extra = [Profile(arguments.profile)] if arguments.profile and row == arguments.rows[-1] else []
        try:
            rate, done, first, memory = one(name, way, size, steps, device, arguments.tiny, extra)  # type: ignore[arg-type]
            done /= 1e12
            found = f"{rate:.1f} | {done:.3g} | {done / peak:.1%} | {memory / 2**30:.1f} GiB | {first:.1f} s"
        except torch.OutOfMemoryError:
            found = "out of memory | | | |"
        print(f"| {name} | {way} | {size} | {found} |", flush=True)
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
