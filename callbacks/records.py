"""What a comparison leaves on disk: panels as PNG, metrics as JSON Lines, the full record as JSON."""

import io
import json
import os
from pathlib import Path as File
from typing import Any

from torch import Tensor

from ..sample.evaluate import Evaluation
from .panels import panel
from .quantities import candidate_text


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
    """A batch's pictures of that name, or None where it has none."""
    value = batch.get(key)
    return value if isinstance(value, Tensor) and value.ndim == 4 else None


def comparison_panel(evaluation: Evaluation, batch: dict[str, Any]) -> Any:
    """Condition, every arm and target, a row per condition of the batch, as one PIL picture."""
    count = len(next(iter(batch.values())))
    candidates = {candidate_text(*arm): images[:count] for arm, images in evaluation.pictures.items()}
    return panel(shown(batch, "image"), candidates, shown(batch, "pixels"), batch.get("text", ()))


def write_comparison(folder: File, step: int, evaluation: Evaluation, batch: dict[str, Any]) -> None:
    """`panel-<step>.png`, and one line of metrics.jsonl, in the folder."""
    comparison_panel(evaluation, batch).save(png := io.BytesIO(), "PNG")
    write_whole(folder / f"panel-{step:08d}.png", png.getvalue())
    lines = folder / "metrics.jsonl"
    earlier = lines.read_text() if lines.exists() else ""
    write_whole(lines, earlier + json.dumps({"step": step, "rows": evaluation.rows()}) + "\n")
