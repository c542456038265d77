"""What a comparison leaves on disk: panels as PNG, of clips as GIF too, metrics as JSON Lines."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..sample.checkpoints import parted
from ..sample.evaluate import Evaluation
from ..sample.guidance import Arm
from ..sample.pictures import FPS, gif
from .panels import animated_panel, panel
from .quantities import candidate_text

PLAYED = 6
"""Conditions in an animated panel."""
LOGGED = "pictures.safetensors"
"""The pictures of the panel as they are, for `priorguide export` to compare its own with."""


def write_whole(path: File, content: str | bytes) -> None:
    """Writes a file aside, then renames it: a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def shown(batch: dict[str, Any], key: str) -> Tensor | None:
    """A batch's pictures or clips of that name, or None where it has none."""
    value = batch.get(key)
    return value if isinstance(value, Tensor) and value.ndim in (4, 5) else None


def rates(batch: Mapping[str, Any], count: int) -> list[float]:
    """Frames per second of each of the first `count` clips of a batch, which may have them as "fps" (B,)."""
    fps = batch.get("fps")
    return [FPS] * count if fps is None else fps[:count].tolist()


def comparison_panel(evaluation: Evaluation, batch: dict[str, Any]) -> Any:
    """Condition, every arm and target, a row per condition of the batch, as one PIL picture."""
    return panel(*_columns(evaluation, batch, len(next(iter(batch.values())))))


def write_panel(stem: File, evaluation: Evaluation, batch: dict[str, Any]) -> None:
    """The comparison's panel as stem.png; of clips also stem.gif, in which the first PLAYED play side by side."""
    comparison_panel(evaluation, batch).save(png := io.BytesIO(), "PNG")
    write_whole(stem.with_name(f"{stem.name}.png"), png.getvalue())
    if next(iter(evaluation.pictures.values())).ndim == 5:
        count = min(PLAYED, len(next(iter(batch.values()))))
        played, fps = animated_panel(*_columns(evaluation, batch, count)), rates(batch, count)
        write_whole(stem.with_name(f"{stem.name}.gif"), gif(played, sum(fps) / count))


def write_logged(file: File, step: int | None, pictures: Mapping[Arm, Tensor], count: int) -> None:
    """The first `count` pictures of every arm in 8 bits, under "<prior>/<scale>,<scale>", and the step."""
    levels = {}
    for (prior, scales), images in pictures.items():
        levels[f"{prior}/{','.join(map(repr, scales))}"] = (images[:count] * 255).round().to(torch.uint8).contiguous()
    write_whole(file, save(levels, {"step": str(step)}))


def read_logged(file: File, step: int | None) -> dict[Arm, Tensor]:
    """Pictures (N, C, H, W) in [0, 1] by arm, of those that `write_logged` wrote which are of this step's weights."""
    if not file.is_file():
        return {}
    with safe_open(file, "pt") as held:
        last = held.metadata().get("step")
    found = {}
    for name, images in load_file(file).items():
        candidate, _, scales = name.rpartition("/")
        prior, own = parted(candidate)
        if str(step) == (last if own is None else str(own)):
            found[prior, tuple(map(float, scales.split(",")))] = images.float() / 255
    return found


def _columns(evaluation: Evaluation, batch: dict[str, Any], count: int) -> tuple[Any, dict[str, Tensor], Any, Any]:
    """The arguments of a panel of the first `count` conditions."""
    candidates = {candidate_text(*arm): images[:count] for arm, images in evaluation.pictures.items()}
    condition, target = (
        None if part is None else part[:count] for part in (shown(batch, "image"), shown(batch, "pixels"))
    )
    return condition, candidates, target, batch.get("text", ())[:count]


def write_comparison(folder: File, step: int, evaluation: Evaluation, batch: dict[str, Any]) -> None:
    """The panel `panel-<step>`, its pictures as the newest ones, and one line of metrics.jsonl, in the folder."""
    write_panel(folder / f"panel-{step:08d}", evaluation, batch)
    write_logged(folder / LOGGED, step, evaluation.pictures, len(next(iter(batch.values()))))
    lines = folder / "metrics.jsonl"
    held = lines.read_text().splitlines() if lines.exists() else []
    earlier = [line for line in held if json.loads(line)["step"] < step]  # a run that was killed may come here again
    write_whole(lines, "\n".join([*earlier, json.dumps({"step": step, "rows": evaluation.rows()})]) + "\n")
