"""Where the processor time of a training step goes: a section of step.py."""

import tempfile
import time
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from narrow import BATCH, Given, edited, given, trainer
from run import pair

from priorguide.data.labelled import LabelledImages
from priorguide.train import fine_tune as fine_tuning
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop


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
