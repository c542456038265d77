"""What goes to Weights & Biases: fixed keys per prior, scale and condition, on a step axis of their own."""

from collections.abc import Iterable, Mapping
from pathlib import Path as File
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from ..sample.evaluate import Evaluation
from ..sample.pictures import to_pil
from .records import comparison_panel, scale_name, shown


def runs(loggers: Iterable[Logger]) -> list[Any]:
    """The W&B runs among the loggers."""
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]


def log_comparison(loggers: Iterable[Logger], step: int, evaluation: Evaluation, batch: Mapping[str, Any]) -> None:
    """One comparison: compare/<prior>/<scale>/<metric>, pictures/<prior>/<scale>/<condition>, a table across priors.

    The step axis is compare/step. Keys never change within a task, so that W&B's step slider works and runs overlay.
    """
    found = runs(loggers)
    if not found:
        return
    import wandb

    values: dict[str, Any] = {"compare/step": step}
    for row in evaluation.rows():
        for metric, estimate in row["metrics"].items():
            values[f"compare/{row['prior']}/{scale_name(row['scales'])}/{metric}"] = estimate["value"]
    condition, target = shown(dict(batch), "image"), shown(dict(batch), "pixels")
    count = len(next(iter(batch.values())))
    for (prior, scales), pictures in evaluation.pictures.items():
        for i in range(count):
            values[f"pictures/{prior}/{scale_name(scales)}/{i:02d}"] = wandb.Image(to_pil(pictures[i]))
    columns = {
        **({"condition": condition} if condition is not None else {}),
        **{f"{prior}/{scale_name(scales)}": pictures for (prior, scales), pictures in evaluation.pictures.items()},
        **({"target": target} if target is not None else {}),
    }
    rows = [[i, *(wandb.Image(to_pil(pictures[i])) for pictures in columns.values())] for i in range(count)]
    values["compare/table"] = wandb.Table(columns=["index", *columns], data=rows)
    values["compare/panel"] = wandb.Image(comparison_panel(evaluation, dict(batch)))
    for run in found:
        run.define_metric("compare/step", hidden=True)
        run.define_metric("compare/*", step_metric="compare/step")
        run.define_metric("pictures/*", step_metric="compare/step")
        run.log(values)


def log_result(folder: File, record: Mapping[str, Any], recorded: Any) -> None:
    """Placeholder until the verdict is logged."""


def finish() -> None:
    """Ends the W&B run."""
