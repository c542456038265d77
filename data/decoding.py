"""Chosen frames of a clip, which is a folder of pictures, an animated picture, or a video file."""

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path as File

import torch
from PIL import Image
from torch import Tensor

from .images import EXTENSIONS, Size, convert, decode, fit

ANIMATED = {".gif", ".webp", ".apng"}
VIDEOS = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ogv"}
"""What PyAV reads."""

Choice = Callable[[int], Sequence[int]]
"""The frames to read, in rising order, of a clip that has so many; ValueError where it has too few."""


def read_clip(clip: File, choose: Choice, resolution: Size) -> tuple[Tensor, float | None]:
    """(the chosen frames as uint8 (F, 3, *resolution), the clip's own frames per second where it has them).

    Frames are resized to cover the resolution and the centre is cut out; transparency lies on white. Only the chosen
    ones are kept; of a video only those from the last key frame before them are decoded. One of `UNREADABLE` is raised
    for a bad clip.
    """
    if clip.is_dir():
        return _read_folder(clip, choose, resolution), None
    if not clip.is_file():
        raise FileNotFoundError("there is no such file or folder")
    if clip.suffix.lower() in ANIMATED:
        return _read_animation(clip, choose, resolution)
    if clip.suffix.lower() in VIDEOS:
        return _read_video(clip, choose, resolution)
    raise ValueError(f"clips are folders of pictures and files of {', '.join(sorted(ANIMATED | VIDEOS))}")


def need_video_reader(clips: Sequence[File]) -> None:
    """ModuleNotFoundError where one of the clips is a video file and PyAV is not installed."""
    if find_spec("av") is None and (videos := [clip for clip in clips if clip.suffix.lower() in VIDEOS]):
        raise ModuleNotFoundError(f"reading {videos[0]} needs PyAV: pip install 'priorguide[video]'")


def frames_in(folder: File) -> list[File]:
    """The pictures of a folder in the order of the last number in their names."""

    def number(path: File) -> tuple[int, str]:
        found = re.findall(r"\d+", path.stem)
        return int(found[-1]) if found else -1, path.name

    pictures = (p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
    return sorted(pictures, key=number)


def _read_folder(folder: File, choose: Choice, resolution: Size) -> Tensor:
    paths = frames_in(folder)
    return torch.stack([decode(paths[i], resolution, 3, pad=False) for i in choose(len(paths))])


def _read_animation(path: File, choose: Choice, resolution: Size) -> tuple[Tensor, float | None]:
    with Image.open(path) as picture:
        frames, lasting = [], []
        for number in choose(getattr(picture, "n_frames", 1)):
            picture.seek(number)
            frames.append(convert(picture, resolution, 3, pad=False))
            lasting.append(picture.info.get("duration", 0))
    return torch.stack(frames), 1000 * len(lasting) / sum(lasting) if all(lasting) else None


def _read_video(path: File, choose: Choice, resolution: Size) -> tuple[Tensor, float | None]:
    import av

    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise ValueError("there is no video in it")
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1  # loader workers are many already
            # Headers may lie about the number of frames, or lack it: packets tell, and need no decoding.
            packets = [(packet.pts, packet.dts, packet.is_keyframe) for packet in file.demux(stream) if packet.size]
            times = sorted({pts for pts, _, _ in packets if pts is not None})
            numbers = choose(len(packets))
            # AVI keeps no times of presentation: there, frames are counted from the start.
            timed = len(times) == len(packets) and file.format.name != "avi"
            wanted = [times[number] if timed else number for number in numbers]
            starts = [packet for packet in packets if timed and packet[2] and packet[0] in times[: numbers[0] + 1]]
            shown, stored, _ = max(starts) if starts else packets[0]
            file.seek(next(time for time in (stored, shown, 0) if time is not None), stream=stream)
            found: dict[int, Tensor] = {}
            for number, frame in enumerate(file.decode(stream)):
                if (key := frame.pts if timed else number) in wanted:
                    found[key] = _upright(frame, resolution)
                if len(found) == len(wanted):
                    break
            if missing := len(wanted) - len(found):
                raise ValueError(f"{missing} of {len(wanted)} frames cannot be decoded")
            rate = stream.average_rate or stream.guessed_rate
    except av.FFmpegError as error:
        raise ValueError(str(error)) from error
    return torch.stack([found[key] for key in wanted]), float(rate) if rate else None


def _upright(frame: "object", resolution: Size) -> Tensor:
    """One of PyAV's frames as uint8 (3, *resolution), turned as its file says."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(-1, 0)  # type: ignore[attr-defined]
    turns = round(getattr(frame, "rotation", 0) / 90)  # counterclockwise
    return fit(pixels.rot90(turns, (1, 2))[None], resolution, pad=False)[0]
