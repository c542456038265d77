"""What the benchmarks of a step share: a narrow U-Net on encoded batches, seconds in turns, memory apart."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import run
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.data import DataLoader

from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.train.fine_tune import FineTune

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


in_turns = partial(run.in_turns, clock=time.process_time)
"""By processor time."""


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
