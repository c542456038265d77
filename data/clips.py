"""Captioned clips for training and comparison, as a Lightning data module."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from .cache import Cache
from .decoding import ANIMATED, VIDEOS, need_video_reader, read_clip
from .listings import METADATA, BadRow, Line, Listing, picture_in, read_each, read_metadata, split_folders
from .loading import PictureData
from .orders import EpochOrder, Order
from .shapes import FPS, LENGTH, MovingShape
from .sources import BadImages, Images, check_broken, first_readable

MADE = {"train": range(200), "test": range(200, 240)}
"""Seeds of the moving shapes of the generated set."""


class Clips(PictureData):
    """Clips with captions: folders of frames and video files in a local folder, or generated moving shapes.

    A batch is {"pixels": (B, 3, F, H, W) in [0, 1], "image": the condition frame (B, 3, H, W), "text": B strings,
    "fps": (B,) float32, frames per second as they were taken from the clip, "frame_stride": (B,) int64}, with
    "last": the last frame (B, 3, H, W), where `interpolation` asks for it.

    source: a folder with metadata.jsonl (file_name, of a video file or a folder of numbered pictures, text, and for
        folders fps, on each line); or of clips anywhere in it, each with its caption beside it, NAME.txt; with or
        without "train" and "test" or "validation" above. Video files (.mp4, .webm, .avi, ...) need PyAV; .gif and
        .webp do not. Or "generated": coloured shapes that move, made in memory.
    resolution: H and W, one number for both or "HxW": clips are resized to cover it and the centre is cut out.
    frames: F. frame_stride: every so many frames of the clip; [min, max]: drawn for each clip between both, the
        largest that fits where the clip is short.
    condition_frame: which frame "image" is, the first or a random one; for validation always the first.
    interpolation: the condition is the first and the last frame.
    fps: of folders of frames, and of video files, that do not say.
    random_flip: mirrors a training clip with probability 1/2. Not for captions that say left or right.
    max_bad_clips: so many clips that are unreadable, too short or without a caption, or lines that name none, are
        reported and skipped; one more ends the run with a list.
    train_batch_size, max_train_samples, max_val_samples, val_fraction, seed, num_workers: as in `LabelledImages`. What
        is drawn at random follows from (seed, epoch, which clip) alone on any number of devices; for validation from
        which clip.
    cache: where encoded training samples are kept, see `Cache`; null encodes at every step.

    ValueError, on first use, for a bad source; ModuleNotFoundError for video files without
    PyAV.
    """

    def __init__(
        self,
        source: str = "generated",
        resolution: int | str = 256,
        frames: int = 16,
        frame_stride: int | tuple[int, int] = 1,
        condition_frame: Literal["first", "random"] = "first",
        interpolation: bool = False,
        fps: float = FPS,
        random_flip: bool = False,
        train_batch_size: int = 4,
        max_train_samples: int | None = None,
        max_val_samples: int | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        max_bad_clips: int = 10,
        cache: Cache | None = None,
    ):
        sizes = (train_batch_size, max_train_samples, max_val_samples, val_fraction)
        super().__init__(*sizes, seed, num_workers, cache=cache)
        strides = (frame_stride, frame_stride) if isinstance(frame_stride, int) else frame_stride
        if frames < 2 or not 1 <= strides[0] <= strides[1]:
            raise ValueError(
                f"frames must be at least 2 and frame_stride at least 1, or [min, max], got {frames} and {frame_stride}"
            )
        if interpolation and condition_frame != "first":
            raise ValueError("interpolation takes the first and the last frame: leave condition_frame at first")
        self.source, self.fps, self.max_bad_clips = source, fps, max_bad_clips
        self.resolution, self.random_flip = resolution, random_flip
        self.taking = Taking(
            frames, strides, parse_size(resolution), condition_frame == "random", interpolation, random_flip, seed
        )

    def _open(self) -> tuple[Images, Images | None, tuple[str, ...]]:
        folder = File(self.source).expanduser()
        if self.source == "generated":
            listings = [list_made(name) for name in MADE]
        elif folder.is_dir():
            listings = [list_clips(split, self.fps) for split in split_folders(folder)]
        else:
            raise ValueError(f"source must be a folder of clips, or 'generated', got {self.source!r}")
        train, *held = [ClipFiles(listing, self.taking, self.max_bad_clips) for listing in listings]
        return train, held[0] if held else None, ()

    def settings(self) -> dict[str, Any]:
        taking = self.taking
        return super().settings() | {
            "frames": taking.frames,
            "frame_stride": list(taking.strides),
            "condition_frame": "random" if taking.random_condition else "first",
            "interpolation": taking.interpolation,
            "fps": self.fps,
        }

    def training(self) -> tuple[Any, type[Order]]:
        """The training clips, drawn by (seed, epoch)."""
        return self.splits.train, EpochOrder


@dataclass(frozen=True)
class Taking:
    """What is taken from a clip: F frames, (least, greatest) stride, (H, W); the options of `Clips`."""

    frames: int
    strides: tuple[int, int]
    size: tuple[int, int]
    random_condition: bool = False
    interpolation: bool = False
    random_flip: bool = False
    seed: int = 0

    def choose(self, count: int, draw: random.Random) -> range:
        """Which frames of a clip of `count`. ValueError where it is too short."""
        least, greatest = self.strides
        room = (count - 1) // (self.frames - 1)  # the greatest stride that fits
        if room < least:
            needed = (self.frames - 1) * least + 1
            raise ValueError(f"it has {count} frames, {self.frames} at stride {least} take {needed}")
        stride = min(draw.randint(least, greatest), room)
        span = (self.frames - 1) * stride + 1
        start = draw.randrange(count - span + 1)
        return range(start, start + span, stride)


class ClipFiles(Dataset):
    """Clips decoded when they are asked for, by number, always alike, or for training by (epoch, number).

    listing: `pictures` are pairs of a clip and the frames per second that hold where it does not say; `texts`.
    A clip that cannot be read, or is too short, is reported, and the next one stands in for it, as in `FileImages`.
    """

    decodes = True

    def __init__(self, listing: Listing, taking: Taking, max_bad_clips: int, rows: Tensor | None = None):
        check_broken(listing.broken, len(listing.pictures), max_bad_clips, "clip", "max_bad_clips")
        self.listing, self.taking, self.max_bad_clips = listing, taking, max_bad_clips
        self.rows = torch.arange(len(listing.pictures)) if rows is None else rows
        self.bad = torch.zeros(len(self.rows), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: Tensor) -> "ClipFiles":
        return ClipFiles(self.listing, self.taking, self.max_bad_clips, rows=self.rows[rows])

    def __getitems__(self, asked: Sequence[int] | Sequence[tuple[int, int]]) -> Any:
        found = []
        for key in asked:
            epoch, index = key if isinstance(key, tuple) else (None, key)

            def read(row: int, epoch: int | None = epoch) -> dict[str, Any]:
                return self._read(int(self.rows[row]), epoch)

            limit = (self.max_bad_clips, "clip", "max_bad_clips")
            try:
                found.append(first_readable(index, self.bad, read, self._name, *limit)[1])
            except BadImages as error:
                if get_worker_info() is None:
                    raise
                return error  # `Loader` raises it
        batch = {name: [part[name] for part in found] for name in found[0]}
        return {name: torch.stack(parts) if isinstance(parts[0], Tensor) else parts for name, parts in batch.items()}

    def _read(self, row: int, epoch: int | None) -> dict[str, Any]:
        if broken := self.listing.broken.get(row):
            raise ValueError(broken.fault)
        taking, (clip, rate) = self.taking, self.listing.pictures[row]
        draw = random.Random(f"0 {row}" if epoch is None else f"{taking.seed} {epoch} {row}")
        taken = range(0)

        def choose(count: int) -> range:
            nonlocal taken
            taken = taking.choose(count, draw)
            return taken

        if isinstance(clip, MovingShape):
            frames, own = torch.from_numpy(clip.frames(choose(LENGTH), *taking.size)), None
        else:
            frames, own = read_clip(clip, choose, taking.size)
        pixels = frames.transpose(0, 1).float() / 255  # (3, F, H, W)
        shown = draw.randrange(taking.frames) if taking.random_condition and epoch is not None else 0
        if taking.random_flip and epoch is not None and draw.random() < 0.5:
            pixels = pixels.flip(-1)
        last = {"last": pixels[:, -1]} if taking.interpolation else {}
        return {
            "pixels": pixels,
            "image": pixels[:, shown],
            **last,
            "text": self.listing.texts[row],  # type: ignore[index]
            "fps": torch.tensor((own or rate) / taken.step),
            "frame_stride": torch.tensor(taken.step),
        }

    def _name(self, index: int) -> str:
        row = int(self.rows[index])
        broken = self.listing.broken.get(row)
        return broken.where if broken else str(self.listing.pictures[row][0])


def parse_size(resolution: int | str) -> tuple[int, int]:
    """(H, W) of 256 or "320x512". ValueError for anything else."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(resolution))
    height, width = (int(side or match[1]) for side in match.groups()) if match else (0, 0)
    if min(height, width) < 1:
        raise ValueError(f"resolution must be a number, or HEIGHTxWIDTH such as 320x512, got {resolution!r}")
    return height, width


def list_made(split: str) -> Listing:
    """The generated clips of a split."""
    shapes = [MovingShape.draw(seed) for seed in MADE[split]]
    return Listing(f"generated, {split}", [(shape, FPS) for shape in shapes], None, [shape.text for shape in shapes])


def list_clips(folder: File, fps: float) -> Listing:
    """A folder of clips with metadata.jsonl, or with captions beside them. ValueError where it is neither, or no clip
    has what it takes."""
    if (folder / METADATA).is_file():

        def read(line: Line) -> tuple[tuple[Any, float], str]:
            clip, rate = picture_in(folder, line, "file_name"), line.row.get("fps", fps)
            if not isinstance(rate, int | float) or not rate > 0:
                raise BadRow(line.where, f"must have an fps above 0, or none, got {rate!r}")
            return (clip, float(rate)), _caption(line.where, line.row.get("text"))

        found, broken = read_each(read_metadata(folder), read, ((None, fps), ""))
    else:
        files = sorted(path for path in folder.rglob("*") if not path.name.startswith("."))
        told = {path.with_suffix("") for path in files if path.suffix.lower() == ".txt"}
        videos = [path for path in files if path.suffix.lower() in VIDEOS | ANIMATED and path.with_suffix("") in told]
        folders = [path for path in files if path in told and path.is_dir()]
        untold = [path for path in files if path.suffix.lower() in VIDEOS and path.with_suffix("") not in told]

        def read_beside(clip: File) -> tuple[tuple[Any, float], str]:
            if clip in untold:
                raise BadRow(str(clip), f"must have its caption beside it, {clip.stem}.txt; there is none")
            text = clip.with_name(f"{clip.name}.txt" if clip in told else f"{clip.stem}.txt")
            try:
                return (clip, fps), _caption(str(text), text.read_text(errors="replace").strip())
            except OSError as error:
                raise BadRow(str(text), f"cannot be read: {error.strerror}") from error

        found, broken = read_each(sorted(videos + folders + untold), read_beside, ((None, fps), ""))
    if not found:
        raise ValueError(
            f"{folder} must hold {METADATA}, or clips (folders of pictures, or video files) with their captions beside "
            "them, NAME.txt; it has neither"
        )
    need_video_reader([clip for (clip, _), _ in found if clip is not None])
    return Listing(str(folder), [pair for pair, _ in found], None, [text for _, text in found], broken=broken)


def _caption(where: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise BadRow(where, f"must have a caption, got {text!r}")
    return text
