"""Edit triplets for training and comparison, as a Lightning data module: a picture, the edited one, the instruction."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import fashion
from .buckets import Buckets
from .cache import Cache
from .images import fit
from .loading import PictureData
from .pairs import Columns, read_pairs
from .sources import FileImages, Images


class EditPairs(PictureData):
    """Pairs of pictures with an instruction: a local folder, WebDataset shards, a data set on the Hub, or made ones.

    A batch is {"pixels": edited (B, 3, R, R) in [0, 1], "image": original (B, 3, R, R) in [0, 1], "text": B strings}.

    source: a folder with metadata.jsonl (the paths of both pictures and the instruction on each line); a folder of
        parquet files or WebDataset shards (.tar); each with or without "train" and "test" or "validation"; "name" or
        "name:config" on the Hub; "fashion": the embedded garments under the edits of `EDITS`, made in memory.
    original_image_column, edited_image_column, edit_prompt_column: needed where the names do not tell; recognised are
        original_image, input_image, input_file_name, source_img, edited_image, output.jpg and the like; edit_prompt,
        instruction, edit, text, txt, json.edit.
    resolution: pictures are R x R: the shorter side is resized and a square cut out.
    center_crop: of training pictures too; otherwise the square is anywhere, at the same place in both pictures.
    random_flip: mirrors a training pair, both pictures together, with probability 1/2. Not for instructions that say
        left or right. Flips and places follow from (seed, epoch, which pair) alone, on any number of devices.
    train_batch_size, max_train_samples, max_val_samples, val_fraction, seed, num_workers, max_bad_images: as in
        `LabelledImages`. A pair with an unreadable picture, without one, without its instruction, or on a line
        that is no JSON object counts as one unreadable picture, and is skipped whole.
    cache: where encoded training samples are kept, see `Cache`; null encodes at every step.
    buckets: cuts training pairs to sizes of their edited picture's aspect ratio, both pictures alike, see `Buckets`;
        validation pairs stay R x R. It is said of how many pairs the two pictures' aspect ratios differ.

    ValueError, on first use, for a bad source, columns that cannot be told, more bad lines than max_bad_images.
    """

    other = "image"

    def __init__(
        self,
        source: str = "fashion",
        resolution: int = 256,
        original_image_column: str | None = None,
        edited_image_column: str | None = None,
        edit_prompt_column: str | None = None,
        center_crop: bool = True,
        random_flip: bool = False,
        train_batch_size: int = 64,
        max_train_samples: int | None = None,
        max_val_samples: int | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        max_bad_images: int = 10,
        cache: Cache | None = None,
        buckets: Buckets | None = None,
    ):
        sizes = (train_batch_size, max_train_samples, max_val_samples, val_fraction)
        super().__init__(*sizes, seed, num_workers, cache=cache, buckets=buckets, resolution=resolution)
        self.center_crop, self.random_flip = center_crop, random_flip
        columns = Columns(original_image_column, edited_image_column, edit_prompt_column)
        self._source = partial(open_pairs, source, columns, resolution, max_bad_images)

    def _open(self) -> tuple[Images, Images | None, tuple[str, ...]]:
        return *self._source(), ()


def open_pairs(source: str, columns: Columns, resolution: int, max_bad_images: int) -> tuple[Images, Images | None]:
    """(training pairs, validation pairs or None). ValueError, one sentence, for a bad source."""
    if source == "fashion":
        made, held_out = (MadePairs.draw(fashion.read_parquet(name)[0], resolution) for name in ("train", "test"))
        return made, held_out
    train, *held = [
        FileImages(listing.pictures, None, listing.texts, resolution, 3, max_bad_images, broken=listing.broken)
        for listing in read_pairs(source, columns)
    ]
    return train, held[0] if held else None


# --- made pairs


def _tint(red: float, green: float, blue: float) -> Callable[[Tensor], Tensor]:
    return lambda pixels: pixels * torch.tensor([red, green, blue])[:, None, None]


EDITS: tuple[tuple[Callable[[Tensor], Tensor], tuple[str, ...]], ...] = (
    (_tint(1, 0.1, 0.1), ("make it red", "colour it red", "turn the garment red", "paint it in red")),
    (_tint(0.1, 1, 0.1), ("make it green", "colour it green", "turn the garment green", "paint it in green")),
    (_tint(0.2, 0.2, 1), ("make it blue", "colour it blue", "turn the garment blue", "paint it in blue")),
    (lambda pixels: 1 - pixels, ("invert the colours", "make it a negative", "swap light and dark", "invert it")),
    (
        lambda pixels: pixels.flip(-2),
        ("turn it upside down", "flip it vertically", "put it on its head", "upside down"),
    ),
    (lambda pixels: pixels.flip(-1), ("mirror it", "flip it horizontally", "show its mirror image", "swap its sides")),
)
"""What is done to pixels (B, 3, R, R) in [0, 1], and four ways to say so. Each holds for a mirrored pair too."""


class MadePairs(Dataset):
    """Grey pictures uint8 (N, 1, H, W), each under one of `EDITS`, `choices` (N,), described by `texts`."""

    def __init__(self, pixels: Tensor, choices: Tensor, texts: Sequence[str], resolution: int):
        self.pixels, self.choices, self.texts, self.resolution = pixels, choices, texts, resolution

    @classmethod
    def draw(cls, pixels: Tensor, resolution: int) -> "MadePairs":
        """An edit and its words for each picture, the same in every run."""
        dice = random.Random(0)
        choices = [dice.randrange(len(EDITS)) for _ in pixels]
        return cls(pixels, torch.tensor(choices), [dice.choice(EDITS[choice][1]) for choice in choices], resolution)

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Tensor) -> "MadePairs":
        texts = [self.texts[row] for row in rows.tolist()]
        return MadePairs(self.pixels[rows], self.choices[rows], texts, self.resolution)

    def __getitems__(self, indices: Sequence[int], places: Any = None) -> dict[str, Any]:
        """The batch; the pictures are square, so that `places` leave nothing to choose."""
        rows = torch.as_tensor(indices)
        image = fit(self.pixels[rows], self.resolution, pad=True).expand(-1, 3, -1, -1).float() / 255
        edited = image.clone()
        for choice, (change, _) in enumerate(EDITS):
            chosen = self.choices[rows] == choice
            edited[chosen] = change(image[chosen])
        return {"pixels": edited, "image": image, "text": [self.texts[row] for row in rows.tolist()]}
