"""What the training tests share: tiny labelled pictures, a tiny model to tune on them, a quiet trainer."""

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from oracle import pixel_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop

CLASSES = 3


def pictures(n: int) -> dict[str, Tensor]:
    """n pictures (n, 1, 16, 16): class k has a bright band at its own height; "image" is the band's upper edge."""
    generator = torch.Generator().manual_seed(3)
    label = torch.arange(n) % CLASSES
    pixels = torch.rand(n, 1, 16, 16, generator=generator) / 8
    image = torch.zeros(n, 1, 16, 16)
    for k in range(CLASSES):
        pixels[label == k, :, 5 * k : 5 * k + 5] += 0.8
        image[label == k, :, 5 * k] = 1
    return {"pixels": pixels, "label": label, "image": image}


class Pictures(L.LightningDataModule):
    """The same pictures for training and, 24 others of them, for comparison; nothing is shuffled."""

    def __init__(self, train: int = 24, batch_size: int = 6, held: int = 24):
        super().__init__()
        self.batch_size, everything = batch_size, pictures(train + held)
        self.train_part = {name: part[:train] for name, part in everything.items()}
        self.held_part = {name: part[train:] for name, part in everything.items()}

    def held_out(self, n: int, offset: int = 0) -> dict[str, Tensor]:
        return {name: part[offset : offset + n] for name, part in self.held_part.items()}

    def reference(self, n: int, offset: int = 0) -> Tensor:
        return self.held_out(n, offset)["pixels"]

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_part)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.held_part)

    def _loader(self, part: dict[str, Tensor]) -> DataLoader:
        rows = [{name: value[i] for name, value in part.items()} for i in range(len(part["label"]))]
        own = torch.Generator()  # else each epoch draws a seed for workers from the global one
        return DataLoader(rows, batch_size=self.batch_size, drop_last=True, generator=own)  # type: ignore[arg-type]


class Seer(nn.Module):
    """A metric network of a few random filters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(8, 256, generator=generator) / 16)
        self.eval()

    def features(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1) @ self.weight.T

    def forward(self, pixels: Tensor) -> Tensor:
        return self.features(pixels)[:, :CLASSES]


def tuning(seed: int = 0, **options: Any) -> FineTune:
    """A tiny model with label and image, dropped together for a third of the samples."""
    options = {"drop": [Drop(("image", "label"), 1 / 3)], "learning_rate": 1e-3, "ema_decay": 0.9} | options
    return FineTune(pixel_model(seed), **options)


def trainer(folder: Path, steps: int, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    still = {"enable_checkpointing": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, "log_every_n_steps": 1}
    here = {"accelerator": "cpu", "devices": 1, "max_steps": steps, "default_root_dir": folder}
    return L.Trainer(**{**here, **quiet, **still, **options})


def seed(number: int = 0) -> None:
    """Every global generator."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all its tensors."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, through dictionaries, lists and arrays."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b
