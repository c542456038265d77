"""Views of objects with their cameras for training and comparison, as a Lightning data module."""

import json
import logging
import random
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .cache import Cache
from .listings import split_folders
from .loading import PictureData
from .orders import EpochOrder, Order
from .solids import draw_camera, draw_solid, render
from .sources import FileImages, Images, MemoryImages

log = logging.getLogger(__name__)

TRANSFORMS = "transforms.json"
MADE = {"train": range(60), "test": range(60, 80)}
"""Seeds of the solids of the generated set."""
VIEWS = 12
"""Views of each, as many as Zero-1-to-3's renders of Objaverse have."""


class ObjectViews(PictureData):
    """Pairs of views of one object and the camera's move between them: local renders, or generated solids.

    A batch is {"pixels": the target view (B, 3, R, R) in [0, 1], "image": the input view (B, 3, R, R) in [0, 1],
    "pose": (B, 4) the move from the input's camera to the target's, see `relative_pose`}.

    source: a folder of object folders, each with NNN.png (transparency lies on white) and NNN.npy (the camera, a 3 x 4
        world-to-camera matrix), as Zero-1-to-3's authors rendered Objaverse, or with transforms.json (frames that have
        file_path and transform_matrix, camera to world, as for NeRF). z is up, cameras look at the origin. With "train"
        and "test" or "validation" above, or without. Or "generated": coloured solids, made in memory.
    resolution: pictures are R x R: the shorter side is resized and the centre cut out.
    val_fraction: the share of objects held out where the source has no validation split; the authors' 1 %.
    train_batch_size, max_train_samples, max_val_samples, seed, num_workers, max_bad_images: as in `LabelledImages`,
        where a sample is a target view. Its input is another view of the object, which follows from (seed, epoch,
        target) alone on any number of devices; for validation always the same one.
    cache: where encoded training samples are kept, see `Cache`; null encodes at every step.

    A view whose camera cannot be read is skipped like one whose picture cannot. ValueError, on first use, for a bad
    source.
    """

    def __init__(
        self,
        source: str = "generated",
        resolution: int = 256,
        train_batch_size: int = 64,
        max_train_samples: int | None = None,
        max_val_samples: int | None = None,
        val_fraction: float = 0.01,
        seed: int = 0,
        num_workers: int = 0,
        max_bad_images: int = 10,
        cache: Cache | None = None,
    ):
        sizes = (train_batch_size, max_train_samples, max_val_samples, val_fraction)
        super().__init__(*sizes, seed, num_workers, cache=cache)
        self.source, self.resolution, self.max_bad_images = source, resolution, max_bad_images

    def _open(self) -> tuple[Images, Images | None, tuple[str, ...]]:
        train, held = self._made() if self.source == "generated" else self._found()
        self._train = train
        return train.images, Pairs(held, held.images, seed=0), ()

    def training(self) -> tuple[Any, type[Order]]:
        """The training views, paired by (seed, epoch)."""
        targets = self.splits.train
        return Pairs(self._train, targets, self.seed), EpochOrder

    def _made(self) -> tuple["Views", "Views"]:
        train, held = (_made(tuple(seeds), self.resolution) for seeds in MADE.values())
        return train, held

    def _found(self) -> tuple["Views", "Views"]:
        folder = File(self.source).expanduser()
        if not folder.is_dir():
            raise ValueError(f"source must be a folder of object folders, or 'generated', got {self.source!r}")
        found = [list_objects(split) for split in split_folders(folder)]
        if len(found) == 1:
            (objects,) = found
            order = torch.randperm(len(objects), generator=torch.Generator().manual_seed(0)).tolist()
            count = max(1, round(len(objects) * self.val_fraction))
            if count >= len(objects):
                raise ValueError(f"{folder} must hold at least 2 objects, one for validation, found {len(objects)}")
            found = [[objects[i] for i in sorted(order[count:])], [objects[i] for i in order[:count]]]
        train, held = (Views.of_files(objects, self.resolution, self.max_bad_images) for objects in found)
        return train, held


Object = tuple[File, tuple[str, ...]]
"""An object's folder, and the names of its views' pictures."""


class Views:
    """All views of a split's objects, numbered through: `images` by number, and cameras."""

    def __init__(self, counts: Sequence[int]):
        self.starts = torch.tensor([0, *counts]).cumsum(0)
        self.objects: Sequence[Object] = ()
        self.centres: Tensor | None = None
        self.images: Any = None

    @classmethod
    def of_files(cls, objects: Sequence[Object], resolution: int, max_bad_images: int) -> "Views":
        views = cls([len(names) for _, names in objects])
        views.objects = objects
        numbers = torch.arange(len(views))  # as labels, they tell which picture stands in for an unreadable one
        views.images = FileImages(views, numbers, None, resolution, 3, max_bad_images, check=views.centre)
        return views

    @classmethod
    def in_memory(cls, pixels: Tensor, centres: Tensor, counts: Sequence[int]) -> "Views":
        """pixels: uint8 (N, 3, R, R); centres: of the cameras (N, 3)."""
        views = cls(counts)
        views.centres, views.images = centres, MemoryImages(pixels, torch.arange(len(views)))
        return views

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, view: int) -> File:
        """The picture's path."""
        number = self.object_of(view)
        folder, names = self.objects[number]
        return folder / names[view - int(self.starts[number])]

    def object_of(self, view: int) -> int:
        return int(torch.searchsorted(self.starts, view, right=True)) - 1

    def other(self, view: int, draw: random.Random) -> int:
        """Another view of the same object."""
        number = self.object_of(view)
        first, count = int(self.starts[number]), int(self.starts[number + 1] - self.starts[number])
        return first + (view - first + draw.randrange(1, count)) % count

    def centre(self, view: int) -> Tensor:
        """Where the camera is (3,), float64. ValueError where its file does not say."""
        if self.centres is not None:
            return self.centres[view]
        path = self[view]
        if path.with_suffix(".npy").is_file():
            return read_camera(path.with_suffix(".npy"))
        folder, names = self.objects[self.object_of(view)]
        return read_transforms(folder / TRANSFORMS)[str(path.relative_to(folder))]


class Pairs(Dataset):
    """Target views asked for by number in `targets`, or by (epoch, number): each with another view of its object."""

    def __init__(self, views: Views, targets: Any, seed: int):
        self.views, self.targets, self.seed = views, targets, seed

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, rows: Tensor) -> "Pairs":
        return Pairs(self.views, self.targets.select(rows), self.seed)

    def __getitems__(self, asked: Sequence[int] | Sequence[tuple[int, int]]) -> Any:
        keys = [key if isinstance(key, tuple) else (0, key) for key in asked]
        targets = self.targets.__getitems__([index for _, index in keys])
        if isinstance(targets, Exception):
            return targets
        to = targets["label"].tolist()
        draws = [random.Random(f"{self.seed} {epoch} {view}") for (epoch, _), view in zip(keys, to, strict=True)]
        inputs = self.views.images.__getitems__([self.views.other(*each) for each in zip(to, draws, strict=True)])
        if isinstance(inputs, Exception):
            return inputs
        image, since = inputs["pixels"], inputs["label"].tolist()
        for i, (start, end) in enumerate(zip(since, to, strict=True)):
            if self.views.object_of(start) != self.views.object_of(
                end
            ):  # it stands in for an object's last, unreadable
                image[i], since[i] = targets["pixels"][i], end
        centres = [torch.stack([self.views.centre(view) for view in numbers]) for numbers in (to, since)]
        return {"pixels": targets["pixels"], "image": image, "pose": relative_pose(*centres)}


def relative_pose(target: Tensor, source: Tensor) -> Tensor:
    """The camera's move (B, 4) float32 from `source` to `target`, the centres of cameras (B, 3) that look at the origin
    with z up: [d polar, sin d azimuth, cos d azimuth, d radius], in radians, the polar angle from the zenith."""

    def spherical(centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, z = centre.double().unbind(1)
        return torch.atan2(torch.hypot(x, y), z), torch.atan2(y, x), centre.double().norm(dim=1)

    (polar, azimuth, radius), (polar_0, azimuth_0, radius_0) = spherical(target), spherical(source)
    turn = azimuth - azimuth_0
    return torch.stack([polar - polar_0, turn.sin(), turn.cos(), radius - radius_0], 1).float()


def list_objects(folder: File) -> list[Object]:
    """The objects in a folder that have at least two views with cameras; how many have not is logged. ValueError where
    there is none."""
    objects, without = [], []
    for place in sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")):
        names = _views(place)
        if len(names) > 1:
            objects.append((place, names))
        else:
            without.append(place.name)
    if not objects:
        raise ValueError(
            f"{folder} must hold object folders with two or more views, each NNN.png with NNN.npy, or {TRANSFORMS}; "
            f"of {len(without)} folders none does"
        )
    if without:
        log.warning("%s: left out %d objects of fewer than two views, %s first", folder, len(without), without[0])
    return objects


def _views(folder: File) -> tuple[str, ...]:
    if (folder / TRANSFORMS).is_file():
        return tuple(read_transforms(folder / TRANSFORMS))
    files = {file.name for file in folder.iterdir()}
    return tuple(sorted(name for name in files if name.endswith(".png") and f"{name[:-4]}.npy" in files))


def read_camera(path: File) -> Tensor:
    """The centre (3,) of the camera whose world-to-camera matrix, 3 x 4 or 4 x 4, a .npy file holds."""
    try:
        matrix = np.load(path, allow_pickle=False)
        if matrix.shape not in ((3, 4), (4, 4)):
            raise ValueError(f"found shape {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise ValueError("found values that are not finite")
        if not np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-2) or not matrix[:3, 3].any():
            raise ValueError("found no rotation, or a camera in the object's centre")
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ValueError(
            f"{path} must hold a world-to-camera matrix, 3 x 4 finite numbers, a rotation and a shift: {error}"
        ) from error
    return torch.from_numpy(-matrix[:3, :3].T.astype(np.float64) @ matrix[:3, 3].astype(np.float64))


@lru_cache(maxsize=256)
def read_transforms(path: File) -> dict[str, Tensor]:
    """The cameras' centres (3,) by picture, from a transforms.json of frames as NeRF's Blender scenes have it."""
    try:
        centres = {}
        for frame in json.loads(path.read_text())["frames"]:
            name = str(File(frame["file_path"]))
            matrix = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
            if matrix.shape != (4, 4) or not matrix.isfinite().all() or name.startswith(("/", "..")):
                raise ValueError(f"a frame's file_path is {name!r}, its transform_matrix {tuple(matrix.shape)}")
            centres[name if File(name).suffix else f"{name}.png"] = matrix[:3, 3]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold frames, each with file_path inside the folder and a 4 x 4 transform_matrix: {error}"
        ) from error
    return centres


@cache
def _made(seeds: tuple[int, ...], resolution: int) -> Views:
    """VIEWS views of each of the solids of these seeds."""
    pictures, centres = [], []
    for seed in seeds:
        solid, generator = draw_solid(seed), np.random.default_rng(seed)
        for _ in range(VIEWS):
            camera = draw_camera(generator)
            pictures.append(torch.from_numpy(render(solid, camera, resolution)))
            centres.append(torch.from_numpy(-camera[:, :3].T @ camera[:, 3]))
    return Views.in_memory(torch.stack(pictures), torch.stack(centres), [VIEWS] * len(seeds))
