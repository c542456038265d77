"""Run by test_comparison_ddp.py: a fit with comparisons on DEVICES processes, its pictures and noise left in FOLDER.

python two_processes.py FOLDER DEVICES ddp|fsdp
"""

import os
import sys
from pathlib import Path

import torch
from fits import Pictures, Seer, seed, trainer, tuning
from interrupted import strategy
from oracle import pixel_model

from priorguide.callbacks.comparison import PriorComparison
from priorguide.sample.loop import Sampler
from priorguide.sample.seeds import SeededNoise

folder, devices, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rank = os.environ.get("LOCAL_RANK", "0")
drawn: dict[int, list[torch.Tensor]] = {}
evaluations = []


class Listening(SeededNoise):
    """Keeps the noise by seed."""

    def __init__(self, seeds, shape):
        super().__init__(seeds, shape)
        self.seeds = seeds

    def draw(self):
        noise = super().draw()
        for number, picture in zip(self.seeds, noise, strict=True):
            drawn.setdefault(number, []).append(picture)
        return noise


class Keeping(PriorComparison):
    def evaluate(self, *args, **options):
        evaluations.append(super().evaluate(*args, **options))
        return evaluations[-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["priorguide.sample.loop"].SeededNoise = Listening
    seed()
    callback = Keeping(
        priors={"self": None, "base": pixel_model(7, num_classes=0, image_channels=0)},
        scales=[1.0, 3.0],
        sampler=Sampler(steps=3, eta=1.0),
        every_n_steps=2,
        num_conditions=7,  # not a multiple of the processes
        num_pictures=2,
        num_reference=8,
        batch_size=2,
        metric_network=Seer(),
    )
    tune = tuning(learning_rate=0.0, ema_decay=0)  # the model stays the same, whatever its gradients
    options = {"devices": devices, "strategy": strategy(kind, devices)}
    fitted = trainer(folder, 4, callbacks=[callback], **options)
    fitted.fit(tune, Pictures(train=48))
    noise = {number: torch.stack(pictures) for number, pictures in drawn.items()}
    pictures = [{f"{name} {scale}": images for (name, (scale,)), images in e.pictures.items()} for e in evaluations]
    after = torch.rand(4)  # ranks train with noise of their own
    found = {"noise": noise, "pictures": pictures, "rows": callback.history, "rng": after}
    torch.save(found, folder / f"rank{rank}.pt")
