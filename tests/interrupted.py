"""A tiny run with all that has a state: workers, augmentation, drop-out in network and condition, accumulation, a
schedule, an average, comparisons. To be interrupted, and to be the same in the end."""

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from fits import Seer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from oracle import pixel_model
from PIL import Image

from priorguide.callbacks.comparison import PriorComparison
from priorguide.callbacks.preemption import Preemption
from priorguide.data.buckets import Buckets
from priorguide.data.cache import Cache
from priorguide.data.labelled import LabelledImages
from priorguide.sample.loop import Sampler
from priorguide.train.checkpoint import Checkpoint, newest_whole
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop

STEPS = 11
"""Of the optimiser: in mid-epoch, and no multiple of what is due."""


def make_pictures(folder: Path, train: int = 39, shapes: tuple[tuple[int, int], ...] = ((16, 16),)) -> Path:
    """`train` grey pictures to train on and 12 to validate with, in folders of three classes; shapes in turns."""
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("test", 12)):
        for number in range(count):
            (place := folder / name / f"class{number % 3}").mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, shapes[number % len(shapes)], dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number:03d}.png")
    return folder


def strategy(name: str, devices: int) -> Any:
    if name == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return DDPStrategy(timeout=timedelta(minutes=1)) if devices > 1 else "auto"


def fit(
    pictures: Path,
    folder: Path,
    *,
    steps: int = STEPS,
    resume: bool = False,
    devices: int = 1,
    machines: int = 1,
    kind: str = "ddp",
    batch_size: int = 4,
    workers: int = 1,
    callbacks: tuple[L.Callback, ...] = (),
    every: int = 3,
    validate_every: int = 3,
    precision: Any = "32-true",
    cache: Cache | None = None,
    buckets: Buckets | None = None,
    **options: Any,
) -> FineTune:
    """Runs it in this process, or goes on from the folder's newest checkpoint."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    model = pixel_model(image_channels=0)
    model.network.mid_block.resnets[0].dropout.p = 0.1
    schedule: dict[str, Any] = {"lr_scheduler": "cosine", "lr_warmup_steps": 3, "learning_rate": 1e-3}
    tune = FineTune(model, drop=[Drop(("label",), 1 / 3)], ema_decay=0.9, **{**schedule, **options})
    compare = PriorComparison(
        priors={"self": None, "base": pixel_model(7, num_classes=0, image_channels=0)},
        scales=[1.0, 3.0],
        sampler=Sampler(steps=4, eta=1.0),
        every_n_steps=every,
        num_conditions=5,  # not a multiple of two processes
        num_pictures=2,
        num_reference=6,
        batch_size=2,
        metric_network=Seer(),
    )
    save = Checkpoint(
        dirpath=folder / "checkpoints", every_n_train_steps=2, save_last=True, enable_version_counter=False
    )
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=devices,
        num_nodes=machines,
        strategy=strategy(kind, devices * machines),
        precision=precision,
        accumulate_grad_batches=2,
        val_check_interval=validate_every,  # at 3: in mid-accumulation, in mid-epoch, and at the end of one
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=[Preemption(), *callbacks, compare, save],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = LabelledImages(
        source=str(pictures),
        resolution=16,
        train_batch_size=batch_size,
        num_workers=workers,
        random_flip=True,
        cache=cache,
        buckets=buckets,
    )
    newest = newest_whole(folder) if resume else None
    trainer.fit(tune, data, ckpt_path=newest and str(newest))
    return tune


def held(folder: Path) -> dict[str, Any]:
    """The run's last checkpoint, whole, less where it lies and what Lightning counts of time."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "random", "global_step", "epoch")
    for group in state["optimizer_states"][0]["param_groups"]:
        group["betas"] = tuple(group["betas"])  # a list once it was loaded under ModelParallelStrategy
    histories = [callback["history"] for callback in state["callbacks"].values() if "history" in callback]
    return {**{name: state[name] for name in names}, "history": histories}
