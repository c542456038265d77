"""The network behind the quickstart's metrics: class accuracy, and features for distances between sets of pictures.

    python -m priorguide.data.classifier --idx FOLDER

trains it, on Fashion-MNIST images that neither a base nor a fine-tune sees, and writes its weights and their record.
"""

import argparse
import json
import os
import time
from pathlib import Path as File

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .fashion import FOLDER, read_idx_pair
from .images import fit

TRAINED_ON = slice(45_000, 60_000)
RESOLUTION = 16


class GarmentClassifier(nn.Module):
    """Four plain convolutions, 64 features, 10 classes, on grey pictures of RESOLUTION a side.

    Plain on purpose: batch norm and label smoothing make a better classifier whose features hardly move when pictures
    get worse, which is of no use to a distance.
    """

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for inside, outside, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 2)):
            stages += [nn.Conv2d(inside, outside, 3, stride, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*stages, nn.Flatten())
        self.project = nn.Linear(64 * (RESOLUTION // 4) ** 2, 64)
        self.classify = nn.Linear(64, 10)

    @classmethod
    def pretrained(cls) -> "GarmentClassifier":
        """The weights that ship with the package, frozen, in eval mode."""
        model = cls()
        model.load_state_dict(load_file(FOLDER / "classifier.safetensors"))
        return model.eval().requires_grad_(False)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 64), unbounded, from pixels (B, 1, 16, 16) in [0, 1]. ValueError for another shape."""
        if pixels.ndim != 4 or pixels.shape[1:] != (1, RESOLUTION, RESOLUTION):
            raise ValueError(f"pixels must have shape (B, 1, 16, 16), got {tuple(pixels.shape)}")
        return F.leaky_relu(self.project(self.body(pixels * 2 - 1)), 0.1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, 10)."""
        return self.classify(self.features(pixels))


def train(images: Tensor, labels: Tensor, steps: int, batch_size: int = 128, seed: int = 0) -> GarmentClassifier:
    """From scratch, on images (N, 1, 16, 16) uint8 flipped at random; AdamW, one cycle."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GarmentClassifier().train()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < batch_size:
                order = torch.randperm(len(images))
            chosen, order = order[:batch_size], order[batch_size:]
            pixels = images[chosen].float() / 255
            flip = torch.rand(len(pixels)) < 0.5
            pixels[flip] = pixels[flip].flip(-1)
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: GarmentClassifier, images: Tensor, labels: Tensor) -> float:
    """The share of images (N, 1, 16, 16) uint8 whose class is found."""
    guesses = [model(batch.float() / 255).argmax(1) for batch in images.split(500)]
    return (torch.cat(guesses) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m priorguide.data.classifier", description="Train the metric network."
    )
    parser.add_argument(
        "--idx", required=True, metavar="FOLDER", help="holds the four original IDX files, or their .gz"
    )
    parser.add_argument("--out", default=FOLDER, type=File, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--steps", default=2000, type=int, help="batches of 128 (default: %(default)s)")
    parser.add_argument("--seed", default=0, type=int, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        images, labels = read_idx_pair(arguments.idx, "train")
        test_images, test_labels = read_idx_pair(arguments.idx, "t10k")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    begun = time.process_time()
    pictures = fit(images[TRAINED_ON], RESOLUTION, pad=True)
    model = train(pictures, labels[TRAINED_ON], arguments.steps, seed=arguments.seed)
    weights = {name: value.half() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)  # what is measured is what ships
    settings = f"--steps {arguments.steps} --seed {arguments.seed}"
    record = {
        "command": f"python -m priorguide.data.classifier --idx FOLDER {settings}",
        "seed": arguments.seed,
        "images": f"train {TRAINED_ON.start}:{TRAINED_ON.stop}",
        "test_accuracy": accuracy(model, fit(test_images, RESOLUTION, pad=True), test_labels),
        "seconds_on_one_thread": round(time.process_time() - begun, 1),
        "torch": torch.__version__,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, temporary := arguments.out / "classifier.tmp")
    temporary.chmod(0o644)  # safetensors writes 0600
    os.replace(temporary, arguments.out / "classifier.safetensors")
    (temporary := arguments.out / "record.tmp").write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, arguments.out / "classifier.json")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
