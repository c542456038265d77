"""Labelled pictures for training and comparison, as a Lightning data module."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .buckets import Buckets
from .cache import Cache
from .loading import PictureData
from .sources import Images, open_source
from .tasks import Batch, find


class LabelledImages(PictureData):
    """Pictures with classes: the embedded set, IDX files, a local folder, or a data set on the Hub.

    source: "fashion" (embedded); "idx:FOLDER" (the four Fashion-MNIST or MNIST files); a folder of class folders, or of
        pictures with metadata.jsonl, with or without "train" and "test" above; "name" or "name:config" on the Hub.
    transform: what a batch {"pixels" (B, C, R, R) in [0, 1], "label" (B,)} becomes: "classes", "edges", "rotate", a
        function's dotted name, or a callable.
    resolution, channels: pictures are R x R, 1 or 3 channels. Grey ones at most 4 pixels too small are padded with
        zeros (28x28 at 32); others have their shorter side resized and the centre cut out.
    train_range: "first:after the last" of the source's training pictures, "0:40000", before anything else is chosen.
    max_train_samples: so many, chosen by `seed`. max_val_samples: the first so many of the validation pictures.
    val_fraction: the share of training pictures held out where the source has no validation split.
    num_classes: checked, or needed to know how many, where labels are numbers.
    seed: which training pictures, in which order. The validation pictures and their order never depend on it, so that
        runs with different seeds are compared on the same pictures.
    num_workers: for folders and the Hub; pictures in memory need none.
    random_flip: mirrors a training picture with probability 1/2, as (seed, epoch, which picture) have it.
    max_bad_images: so many unreadable pictures, or lines that lack what others have, are reported and skipped; one more
        ends the run with a list.
    cache: where encoded training samples are kept, see `Cache`; null encodes at every step.
    buckets: cuts training pictures to sizes of their own aspect ratio, see `Buckets`; validation pictures stay R x R.

    ValueError, on first use, for a bad source, an empty folder, labels outside [0, num_classes), a bad range.
    """

    def __init__(
        self,
        source: str = "fashion",
        transform: str | Callable[[Batch], Batch] = "classes",
        resolution: int = 32,
        channels: int = 1,
        train_batch_size: int = 64,
        train_range: str | None = None,
        max_train_samples: int | None = None,
        max_val_samples: int | None = None,
        val_fraction: float = 0.1,
        num_classes: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        random_flip: bool = False,
        max_bad_images: int = 10,
        image_column: str | None = None,
        label_column: str | None = None,
        cache: Cache | None = None,
        buckets: Buckets | None = None,
    ):
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        super().__init__(
            train_batch_size,
            max_train_samples,
            max_val_samples,
            val_fraction,
            seed,
            num_workers,
            find(transform) if isinstance(transform, str) else transform,
            cache,
            buckets,
            resolution,
        )
        self.train_range, self.random_flip, self.channels = train_range, random_flip, channels
        self._source = partial(
            open_source, source, resolution, channels, num_classes, max_bad_images, image_column, label_column
        )

    def _open(self) -> tuple[Images, Images | None, tuple[str, ...]]:
        train, held, names = self._source()
        if self.train_range is not None:
            train = train.select(_range(self.train_range, len(train)))
        return train, held, names

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"channels": self.channels}

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the labels of a batch mean: the transform's own names, or the data's classes; () if there are none."""
        return getattr(self.transform, "class_names", None) or self.splits.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def _range(text: str, count: int) -> Tensor:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, stop = map(int, match.groups()) if match else (0, 0)
    if not first < stop <= count:
        raise ValueError(f"train_range must be first:stop within 0:{count}, got {text!r}")
    return torch.arange(first, stop)
