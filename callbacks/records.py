"""What a comparison leaves on disk: panels as PNG, of clips as GIF too, metrics as JSON Lines."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

from torch import Tensor

from ..sample.evaluate import Evaluation
from ..sample.pictures import FPS, gif
from .panels import animated_panel, panel
from .quantities import candidate_text

PLAYED = 6
"""Conditions in an animated panel."""


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


def _columns(evaluation: Evaluation, batch: dict[str, Any], count: int) -> tuple[Any, dict[str, Tensor], Any, Any]:
    """The arguments of a panel of the first `count` conditions."""
    candidates = {candidate_text(*arm): images[:count] for arm, images in evaluation.pictures.items()}
    condition, target = (
        None if part is None else part[:count] for part in (shown(batch, "image"), shown(batch, "pixels"))
    )
    return condition, candidates, target, batch.get("text", ())[:count]


def write_comparison(folder: File, step: int, evaluation: Evaluation, batch: dict[str, Any]) -> None:
    """The panel `panel-<step>`, and one line of metrics.jsonl, in the folder."""
    write_panel(folder / f"panel-{step:08d}", evaluation, batch)
    lines = folder / "metrics.jsonl"
    held = lines.read_text().splitlines() if lines.exists() else []
    earlier = [line for line in held if json.loads(line)["step"] < step]  # a run that was killed may come here again
    write_whole(lines, "\n".join([*earlier, json.dumps({"step": step, "rows": evaluation.rows()})]) + "\n")
