"""The decision record: all that a decision rests on, as JSON. And the full comparison that makes it."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor

from ..callbacks.comparison import PriorComparison
from ..callbacks.figures import distances
from ..callbacks.judging import health, judged, unguided_pictures
from ..callbacks.quantities import AGREEMENTS, candidate_text, present
from ..callbacks.records import shown, write_whole
from ..callbacks.shares import Encoded, check_enough
from ..sample import saturation
from ..sample.candidates import Candidate
from ..sample.checkpoints import at, parted
from ..sample.evaluate import Drawn, Evaluation
from ..sample.health import in_words
from ..sample.manifest import sha256
from ..sample.matched import matched, needed
from ..sample.parts import Parts, fingerprint
from .fine_tune import FineTune
from .fit import FitCLI, last_checkpoint, load_weights
from .provenance import commit, portable, provenance

WATCHED = "watched"
"""Where in a run's folder `priorguide compare --watch` leaves what it measured."""


ALONE = 6
"""Pictures that each prior draws without a condition."""
SIZES = "batch_sizes.json"
"""Where in a run's folder the batch sizes are that comparisons found by trying."""


def comparison_of(cli: FitCLI) -> PriorComparison:
    """The run's PriorComparison callback, which holds the candidates. ValueError where it has none."""
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, PriorComparison):
            return callback
    raise ValueError("the run's config has no PriorComparison callback: it names the candidates to compare")


def full_comparison(
    cli: FitCLI,
    state: dict[str, Any],
    scales: Sequence[tuple[float, ...]] | None = None,
    conditions: int | None = None,
    checkpoints: Sequence[File] = (),
    parts: Parts | None = None,
    run: File | None = None,
) -> tuple[dict[str, Any], dict[str, Any], Evaluation]:
    """(record, pictures for the page, evaluation) of the run's candidates over all scales, with a progress bar.

    checkpoints: what `state` is of; of several, by rising step, every candidate is compared with every checkpoint's
    weights under names such as base@400, and the baseline is that of the last one. Afterwards the model has the last
    one's weights. parts: where finished chunks are kept and taken from. run: the run's folder, as its config says.
    """
    callback, fine_tune, data = comparison_of(cli), cli.model, cli.datamodule
    assert isinstance(fine_tune, FineTune)
    data.setup("fit")
    fine_tune.to(cli.trainer.strategy.root_device)
    count, start, rule = conditions or callback.num_conditions, time.perf_counter(), callback.rule
    run = run or File(cli.trainer.default_root_dir)
    sizes = run / SIZES
    if callback.batch_size is None and sizes.is_file():
        callback.sizes |= json.loads(sizes.read_text())
    files = list(checkpoints) or [last_checkpoint(run)]
    steps: list[int | None] = []
    check_enough(data, count, callback.reference_needed())
    held = Encoded(data.held_out(count))  # for all checkpoints, whose encoders are frozen
    drawn: Drawn | None = None
    healths: dict[str, Any] = {}
    alone: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    with progress() as bar:
        if parts is not None:
            parts.say = bar.console.print
        for number, file in enumerate(files):
            if len(files) > 1:
                state = load_weights(cli, file)
            step = state["global_step"] if len(files) > 1 else None
            entries.append(checkpoint_of(file, run, state.get("global_step")))
            task = bar.add_task("comparing" if step is None else f"comparing step {step}", total=None)

            def advance(done: int, total: int, task: Any = task) -> None:
                bar.update(task, completed=done, total=total)

            how: dict[str, Any] = {"on_step": advance, "parts": parts, "encoded": held}
            one = callback.draw(fine_tune, data, count, scales=scales, full=True, **how)
            if callback.batch_size is None:
                write_whole(sizes, json.dumps(callback.sizes))
            one = one if step is None else one.at(step)
            drawn = one if drawn is None else drawn | one
            losses = bar.add_task("losses of the null", total=1)
            healths |= health_of(callback, fine_tune, held, count, step)
            for name, own in unguided_pictures(callback, fine_tune, held, min(ALONE, count)).items():
                alone[name if step is None else at(name, step)] = own
            bar.update(losses, completed=1)
            steps.append(step)
            if step is not None and number + 1 == len(files):
                rule = replace(rule, baseline=at(rule.baseline, step))
        assert drawn is not None
        judging = bar.add_task("measuring", total=1)
        evaluation = judged(callback, drawn, data, fine_tune.device, rule)
        bar.update(judging, completed=1)
    watched = [
        {
            "prior": arm[0],
            "scales": list(arm[1]),
            **one.to_json(),
            "sentence": saturation.in_words(arm, one, rule.baseline),
        }
        for arm, one in evaluation.saturation.items()
    ]
    batch = callback.examples(data, count)
    record: dict[str, Any] = {
        "rows": evaluation.rows(),
        "verdict": evaluation.verdict.to_json() if evaluation.verdict else None,
        "floor": {name: estimate.value for name, estimate in evaluation.floor.items()},
        "history": history_of(state, run),
        "sampling": {
            "scheduler": callback.sampler.scheduler,
            "steps": callback.sampler.steps,
            "eta": callback.sampler.eta,
            "batch_size": min(callback.sizes.values()),
            **callback.sampler.options,
        },
        "candidates": candidates_of(callback, evaluation, steps),
        "checkpoints": entries,
        "health": healths,
        "saturation": watched,
        "conditions": count,
        "reference": (real := callback.reference_needed()),
        "step": state.get("global_step"),
        "config": {"comparison": config_of(cli), **provenance(cli, state)},
        "commit": commit(),
        "data": {
            "held_out_sha256": fingerprint(held.batch),
            **({"reference_sha256": fingerprint(data.reference(real, offset=count))} if real else {}),
        },
        "seconds_comparing": time.perf_counter() - start,
        "environment": environment(fine_tune.device),
    }
    chosen = evaluation.verdict.chosen if evaluation.verdict else {}
    arms = {(prior, tuple(s)): evaluation.pictures[prior, tuple(s)] for prior, s in chosen.items()}
    pictures = {
        "condition": shown(batch, "image"),
        "target": shown(batch, "pixels"),
        "caption": batch.get("text"),
        "fps": batch.get("fps"),
        "candidates": {candidate_text(*arm): images for arm, images in arms.items()},
        "arms": evaluation.pictures,
        "alone": alone,
    }
    return record | read_off(record), pictures, evaluation


def read_off(record: dict[str, Any]) -> dict[str, Any]:
    """What follows from a record's rows and verdict: distances "matched" at equal agreement with the condition, and
    the conditions "needed" to settle what the verdict left open."""
    rows, verdict, found = record["rows"], record["verdict"], distances(record)
    if not verdict:
        return {}
    agreements = [key for key in present(rows) if key in AGREEMENTS]
    baseline, chosen = verdict["rule"]["baseline"], verdict["chosen"]
    equal = matched(rows, chosen, baseline, found[0], agreements) if found else []
    return {"matched": equal, "needed": needed(verdict)}


def health_of(
    callback: PriorComparison, fine_tune: FineTune, held: Encoded, count: int, step: int | None
) -> dict[str, dict[str, Any]]:
    """The health of every prior, with a sentence for each but the model's own, under the names of the rows."""
    found = {}
    for name, one in health(callback, fine_tune, held, count).items():
        name = name if step is None else at(name, step)
        found[name] = {**one.to_json(), "sentence": in_words(name, one) if any(one.gap) else None}
    return found


def candidates_of(callback: PriorComparison, evaluation: Evaluation, steps: Sequence[int | None]) -> dict[str, Any]:
    """Every candidate by its name in the rows: whose prediction it is, how it guides, at which scales, and the step of
    its checkpoint where there are several."""
    found = {}
    for name, candidate in callback.priors.items():
        for step in steps:
            full = name if step is None else at(name, step)
            grid = [list(scales) for prior, scales in evaluation.metrics if prior == full]
            found[full] = {"candidate": name, "step": step, **_options(candidate), "scales": grid}
    return found


def _options(candidate: Candidate) -> dict[str, Any]:
    options = {name: value for name, value in vars(candidate).items() if name not in ("prior", "scales")}
    prior = candidate.prior
    network = prior if prior is None or isinstance(prior, str) else type(prior).__name__
    return {"network": network, **portable(json.loads(json.dumps(options)))}


def checkpoint_of(file: File, run: str | File, step: int | None) -> dict[str, Any]:
    """A checkpoint as a record names it: its step, its hash, and its file, as seen from the run's folder."""
    inside = file.resolve().is_relative_to(File(run).resolve())
    name = str(file.resolve().relative_to(File(run).resolve())) if inside else file.name
    return {"file": name, "step": step, "sha256": sha256(file)}


def find_checkpoint(record: Mapping[str, Any], run: str | File, name: str) -> File | None:
    """The checkpoint that a record means by a candidate such as base@400; None where it was made of one checkpoint.
    ValueError where that checkpoint is no longer there."""
    step = parted(name)[1]
    entry = next((e for e in record.get("checkpoints", ()) if e["step"] == step), None)
    if step is None or entry is None:
        return None
    places = [File(run) / entry["file"], *sorted((File(run) / "checkpoints").glob("*.ckpt"))]
    for file in places:
        if file.is_file() and sha256(file) == entry["sha256"]:
            return file
    raise ValueError(
        f"{name} is a candidate of {entry['file']} at step {step}, which is no longer there as it was compared; "
        "give another --checkpoint, or compare again"
    )


def config_of(cli: FitCLI) -> dict[str, Any]:
    """What the run's config says of the comparison."""
    for entry in cli.config.trainer.callbacks or []:
        if entry.class_path.endswith("PriorComparison"):
            return portable(entry.init_args.as_dict())
    return {}


def history_of(state: Mapping[str, Any], run: str | File) -> list[dict[str, Any]]:
    """The comparisons made while the run trained, by step: by its own callback, and by `compare --watch`."""
    own: list[dict[str, Any]] = next((s["history"] for s in state.get("callbacks", {}).values() if "history" in s), [])
    lines = File(run) / WATCHED / "metrics.jsonl"
    seen = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
    by_step = {entry["step"]: entry for entry in (*seen, *own)}
    return [by_step[step] for step in sorted(by_step)]


def progress() -> Progress:
    """A bar with rate and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


class Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


def environment(device: torch.device) -> dict[str, str]:
    """What the figures were measured with."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
        **{name: importlib.metadata.version(name) for name in ("priorguide", "torch", "diffusers", "lightning")},
    }
