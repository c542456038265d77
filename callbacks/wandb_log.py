"""What goes to Weights & Biases: fixed keys per prior, scale and condition, on a step axis of their own."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as File
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor

from ..sample.checkpoints import row_name
from ..sample.evaluate import Evaluation
from ..sample.guidance import Arm
from ..sample.manifest import MANIFEST, sha256
from ..sample.pictures import FPS, gif, to_pil
from .records import comparison_panel, rates, shown
from .wandb_run import forgiving

STEP = "compare/step"
"""The axis of everything that a comparison logs: the optimiser's steps."""
COSTS = ("seconds_per_image", "evaluations", "extra_bytes", "peak_bytes")
DECISION = (
    "verdict", "candidates", "checkpoints", "rows", "conditions", "reference", "sampling", "config", "commit", "data",
    "environment", "seconds_comparing", "needed", "matched", "cheaper", "votes", "override",
)  # fmt: skip
"""What of a record is in the summary, as it is in the bundle and on the page."""
UPLOAD_LIMIT = 2**28
"""Artifacts of more bytes than these stay where they are; W&B then has their paths and digests."""


def log_comparison(loggers: Iterable[Logger], step: int, evaluation: Evaluation, batch: Mapping[str, Any]) -> None:
    """`log_to` the runs of those loggers that are W&B's."""
    log_to([logger.experiment for logger in loggers if isinstance(logger, WandbLogger)], step, evaluation, batch)


def log_to(runs: Sequence[Any], step: int, evaluation: Evaluation, batch: Mapping[str, Any]) -> None:
    """One comparison: compare/<prior>/<scale>/<metric>, pictures/<prior>/<scale>/<condition>, a table across priors.

    Keys never change within a task, so that W&B's step slider works and runs overlay. As in `Evaluation.rows`, arms
    of lowest scale 1 are one, named none.
    """
    if not runs:
        return
    with forgiving():
        import wandb

        count = min(len(next(iter(batch.values()))), *map(len, evaluation.pictures.values()))
        arms, fps = _distinct(evaluation.pictures), rates(batch, count)
        values: dict[str, Any] = {"compare/panel": wandb.Image(comparison_panel(evaluation, dict(batch)))}
        for row in evaluation.rows():
            for metric, estimate in row["metrics"].items():
                values[f"compare/{row['prior']}/{scale_name(row['scales'])}/{metric}"] = estimate["value"]
        for name, pictures in arms.items():
            for i in range(count):
                values[f"pictures/{name}/{i:02d}"] = _media(pictures[i], fps[i])
        for run in runs:
            _log(run, step, values)
            _log(run, step, {"compare/table": _table(batch, arms, count)})  # apart, since tables can fail to upload


def scale_name(scales: Sequence[float]) -> str:
    """ "3" or "1.5,7.5": scales in keys."""
    return ",".join(f"{scale:g}" for scale in scales)


def _distinct(pictures: Mapping[Arm, Tensor]) -> dict[str, Tensor]:
    """<prior>/<scale> -> pictures or clips (N, ...); those that no prior had a part in once, as "none"."""
    named = {(row_name(prior, scales), scales): value for (prior, scales), value in pictures.items()}
    return {f"{prior}/{scale_name(scales)}": value for (prior, scales), value in named.items()}


def _table(batch: Mapping[str, Any], arms: Mapping[str, Tensor], count: int) -> Any:
    """A row per condition: its number, its label or text, its picture, what each arm made of it, and the target."""
    import wandb

    columns: dict[str, Sequence[Any]] = {"index": range(count)}
    for name, value in batch.items():
        if isinstance(value, list) and isinstance(value[0], str) or isinstance(value, Tensor) and value.ndim == 1:
            columns[name] = list(value) if isinstance(value, list) else value.tolist()
    pictured = {"condition": shown(dict(batch), "image"), **arms, "target": shown(dict(batch), "pixels")}
    for name, pictures in pictured.items():
        if pictures is not None:
            columns[name] = [_media(*each) for each in zip(pictures[:count], rates(batch, count), strict=True)]
    return wandb.Table(list(columns), [[column[i] for column in columns.values()] for i in range(count)])


def _media(pixels: Tensor, fps: float = FPS) -> Any:
    """A picture (C, H, W), or a clip (C, F, H, W) as a GIF: W&B would need moviepy to make one of an array."""
    import wandb

    if pixels.ndim == 3:
        return wandb.Image(to_pil(pixels))
    return wandb.Video(io.BytesIO(gif([to_pil(frame) for frame in pixels.unbind(1)], fps)), format="gif")


def _log(run: Any, step: int, values: Mapping[str, Any]) -> None:
    """Logs on our own axis. Each key is declared by its name: Lightning's "*" matches as well as a pattern of ours."""
    run.define_metric(STEP, hidden=True)
    for key in values:
        run.define_metric(key, step_metric=STEP)
    run.log({STEP: step, **values})


def log_result(run: Any | None, record: Mapping[str, Any], page: File | None = None) -> None:
    """A full comparison: verdict and decision record in the summary, all arms in the table result/scales, the page.

    record: as `priorguide compare` writes it. page: its index.html. Summary: verdict/prior, /scale, /sentence,
    /confident; for each prior at its chosen scale best/<prior>/scale, /<metric> and its costs, and where it was judged
    /difference, /low, /high and /outcome; decision/<part>, the parts of the record that DECISION names, as JSON.
    """
    if run is None:
        return
    import wandb

    rows = record["rows"]
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    columns = ["prior", "scale", *(name for metric in metrics for name in (metric, f"{metric}_error")), *COSTS]
    table = wandb.Table(columns=columns, data=[_flat(row, metrics) for row in rows])
    values: dict[str, Any] = {"result/scales": table}
    if page is not None:
        values["result/page"] = wandb.Html(page.read_text(), inject=False)
    _log(run, int(record.get("step") or 0), values)
    run.summary.update(summary_of(record))


def _flat(row: Mapping[str, Any], metrics: Sequence[str]) -> list[Any]:
    estimates = [row["metrics"].get(metric, {}) for metric in metrics]
    numbers = [value for e in estimates for value in (e.get("value"), e.get("error"))]
    return [row["prior"], _scale(row["scales"]), *numbers, *(row.get(cost) for cost in COSTS)]


def _scale(scales: Sequence[float]) -> float | str:
    """A number where there is one, to sort and plot by."""
    return float(scales[0]) if len(scales) == 1 else scale_name(scales)


def summary_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary says of a record; nothing but the step where there is no verdict."""
    verdict = record.get("verdict")
    summary: dict[str, Any] = {"verdict/step": record.get("step")}
    summary |= {f"decision/{part}": json.dumps(record[part]) for part in DECISION if record.get(part) is not None}
    if not verdict:
        return summary
    for name in ("prior", "sentence", "confident", "decide_by", "conditions"):
        summary[f"verdict/{name}"] = verdict[name]
    summary["verdict/scale"] = _scale(verdict["scales"])
    rows = {(row["prior"], tuple(row["scales"])): row for row in record["rows"]}
    for prior, scales in verdict["chosen"].items():
        row = rows[row_name(prior, scales), tuple(scales)]
        summary[f"best/{prior}/scale"] = _scale(scales)
        summary |= {f"best/{prior}/{name}": estimate["value"] for name, estimate in row["metrics"].items()}
        summary |= {f"best/{prior}/{cost}": row[cost] for cost in COSTS if cost in row}
    for entry in verdict["comparisons"]:
        low, high = entry["interval"]
        told = {"difference": entry["difference"], "low": low, "high": high, "outcome": entry["outcome"]}
        summary |= {f"best/{entry['prior']}/{name}": value for name, value in told.items()}
    return summary


def log_bundle(run: Any | None, checkpoint: File, bundle: File, record: Mapping[str, Any] | None = None) -> None:
    """The checkpoint as an artifact of type "model", the bundle as one of type "bundle" that says what it came from."""
    if run is None:
        return
    step = (json.loads((bundle / MANIFEST).read_text())["provenance"] or {}).get("step")
    source = {"checkpoint": checkpoint.name, "checkpoint_sha256": sha256(checkpoint), "step": step}
    model = _artifact(run, "checkpoint", "model", [checkpoint], checkpoint.parent, source)
    verdict = {k: v for k, v in summary_of(record).items() if k.startswith("verdict/")} if record else {}
    told = {**source, "checkpoint_artifact": model.name, "manifest_sha256": sha256(bundle / MANIFEST), **verdict}
    _artifact(run, "bundle", "bundle", sorted(f for f in bundle.rglob("*") if f.is_file()), bundle, told)


def _artifact(run: Any, name: str, kind: str, files: Sequence[File], root: File, metadata: Mapping[str, Any]) -> Any:
    import wandb

    artifact = wandb.Artifact(f"{name}-{run.id}", kind, metadata=dict(metadata))
    whole = sum(file.stat().st_size for file in files) <= UPLOAD_LIMIT
    for file in files:
        inside = str(file.relative_to(root))
        if whole:
            artifact.add_file(str(file), inside, skip_cache=True, policy="immutable")  # no second copy on this disk
        else:
            artifact.add_reference(file.absolute().as_uri(), inside)
    return run.log_artifact(artifact)
