"""Which settings of a run go together: docs/many-gpus.md has the table, tests/train/test_combinations.py tries it."""

from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from ..sample.model import DiffusionModel
from ..sample.published import factor


def check_data(model: DiffusionModel, data: Any) -> None:
    """ValueError where a data module's pictures come in sizes that the model does not take, or it has more classes than
    the model: on a GPU a label too many ends in a crash."""
    classes, rows = getattr(data, "num_classes", 0), getattr(model, "num_classes", 0)
    if rows and classes > rows and "label" in model.ladder[-1]:
        raise ValueError(f"the data has {classes} classes, the model takes labels in [0, {rows})")
    if getattr(data, "cache", None) is None:  # which is of one size, and says so better
        check_size(model, data)
    buckets, kind = getattr(data, "buckets", None), type(model).__name__
    if buckets is None:
        return
    if model.side_step is None:
        raise ValueError(f"{kind} takes pictures of its own size alone: leave data.init_args.buckets out")
    if buckets.step % model.side_step:
        raise ValueError(
            f"data.init_args.buckets.step must be a multiple of {model.side_step} for this {kind}, got {buckets.step}"
        )


def check_size(model: DiffusionModel, data: Any) -> None:
    """ValueError where held-out pictures are not as large as the model's own, which they are compared with."""
    pixels = data.held_out(1).get("pixels") if hasattr(data, "held_out") else None
    if pixels is None:
        return
    found = [*pixels.shape[-2:]]
    if (vae := getattr(model, "vae", None)) is not None:
        each = factor(vae)
    else:
        with isolate_rng(), torch.no_grad():
            each = found[0] / model.posterior(pixels).shape[-2]
    wanted = [round(side * each) for side in model.shape[-2:]]
    if wanted != found:
        raise ValueError(
            f"the data's pictures must be {wanted[0]} x {wanted[1]} (height x width) for this {type(model).__name__}, "
            f"got {found[0]} x {found[1]}: make data.init_args.resolution that of the model"
        )


def check_combination(precision: str, shared: bool, eight_bit: bool, few_bits: bool, compiled: bool) -> None:
    """ValueError for settings that do not go together.

    precision: Lightning's. shared: the network lies in parts on all processes (ModelParallelStrategy). eight_bit: the
    optimiser's state does not have more. few_bits: the base below an adapter is held in fewer than 16. compiled: by
    torch.compile. Other adapters go with what goes without one.
    """
    if precision in ("bf16-true", "16-true", "transformer-engine-float16"):
        raise ValueError(
            f"trainer.precision {precision} keeps the weights in 16 bits, which lose the small steps of the optimiser "
            "and of the average: set it to bf16-mixed, or 16-mixed where the device has no bf16"
        )
    if not shared:
        return
    for found, setting, instead in (
        (precision == "16-mixed", "trainer.precision 16-mixed", "set it to bf16-mixed"),
        (few_bits, "model.lora.base_bits", "leave it out"),
        (eight_bit, "model.use_8bit_adam", "leave it off, the optimiser's state is shared among the processes anyway"),
        (compiled, "model.compile", "leave it off"),
    ):
        if found:
            raise ValueError(
                f"{setting} is not supported for a network in parts (ModelParallelStrategy): {instead}, or use "
                "--config configs/ddp.yaml"
            )
