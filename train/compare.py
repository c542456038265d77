"""`priorguide compare`: the full comparison of a run's candidates, its record and its page."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..callbacks.comparison import PriorComparison
from ..callbacks.figures import distances
from ..callbacks.panels import panel
from ..callbacks.quantities import AGREEMENTS, candidate_text, present
from ..callbacks.records import shown, write_panel, write_whole
from ..callbacks.report import with_decision, write_report
from ..callbacks.tables import terminal_table
from ..callbacks.votes import told, with_override, with_votes
from ..callbacks.wandb_log import log_result, scale_name
from ..callbacks.wandb_run import follow_up
from ..sample import saturation
from ..sample.compare import compare
from ..sample.evaluate import Evaluation
from ..sample.health import in_words
from ..sample.manifest import new_folder
from ..sample.matched import matched, needed
from .fine_tune import FineTune
from .fit import FitCLI, load_run
from .sampling import crossed, parse_seeds, read_condition, write_pictures


def compare_run(
    run: str | File,
    checkpoint: str | None = None,
    scales: Sequence[tuple[float, ...]] | None = None,
    conditions: int | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """Compares the checkpoint's candidates, and writes record.json, panel.png and index.html into a new folder."""
    folder = File(out) if out else File(run) / "comparison"
    refuse_existing(folder)
    cli, state = load_run(run, checkpoint)
    record, pictures, evaluation = full_comparison(cli, state, scales, conditions)
    save_comparison(folder, cli, record, pictures, evaluation)
    show(record)
    with follow_up(run, "compare") as logged:
        log_result(logged, record, folder / "index.html")
    return record


def compare_on(
    run: str | File,
    given: Sequence[str],
    seeds: str,
    checkpoint: str | None = None,
    scales: Sequence[tuple[float, ...]] | None = None,
    out: str | None = None,
) -> None:
    """Every candidate at every scale on conditions of one's own, `name=value`: pictures alone, in a new folder.

    panel.png has a row per condition and seed, and a folder per arm holds its pictures.
    """
    folder = File(out) if out else File(run) / "comparison_on"
    refuse_existing(folder)
    wanted = parse_seeds(seeds)
    cli, _ = load_run(run, checkpoint)
    callback, device = comparison_of(cli), cli.trainer.strategy.root_device
    with cli.model.to(device).averaged() as model, callback.on_device(device):
        condition, each = crossed(read_condition(model, given, getattr(cli.datamodule, "class_names", ())), wanted)
        candidates = callback.candidates(model, scales)
        pictures = compare(model, condition, each, candidates, callback.sampler, batch_size=callback.batch_size)
    titles = {candidate_text(*arm): images for arm, images in pictures.items()}
    with new_folder(folder) as aside:
        panel(None, titles, captions=[f"seed {seed}" for seed in each]).save(aside / "panel.png")
        for (prior, at), images in pictures.items():
            (place := aside / f"{prior}-{scale_name(at)}").mkdir()
            write_pictures(place, images, each, len(wanted), condition.get("fps"))
    print(f"{len(pictures)} candidates on {len(each)} conditions and seeds in {folder}")


def decide_run(
    run: str | File,
    votes: Sequence[str] = (),
    override: tuple[str, tuple[float, ...]] | None = None,
    reason: str = "",
    out: str | None = None,
) -> None:
    """Adds the team's votes, or its override of the verdict, to a comparison's record and page."""
    folder = File(out) if out else File(run) / "comparison"
    if not (folder / "record.json").is_file():
        raise ValueError(f"there is no {folder / 'record.json'}: run `priorguide compare {run}` first")
    record = json.loads((folder / "record.json").read_text())
    for file in votes:
        record = with_votes(record, file)
    if override:
        record = with_override(record, *override, reason)
    page = with_decision((folder / "index.html").read_text(encoding="utf-8"), record)
    write_whole(folder / "record.json", json.dumps(record, indent=1))
    write_whole(folder / "index.html", page)
    for line in told(record):
        print(line)


def refuse_existing(folder: File) -> None:
    """ValueError where the folder exists: nothing is written over."""
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose a new --out, or remove it")


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
) -> tuple[dict[str, Any], dict[str, Any], Evaluation]:
    """(record, pictures for the page, evaluation) of the run's candidates over all scales, with a progress bar."""
    callback, fine_tune, data = comparison_of(cli), cli.model, cli.datamodule
    assert isinstance(fine_tune, FineTune)
    data.setup("fit")
    fine_tune.to(cli.trainer.strategy.root_device)
    start = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("comparing", total=None)
        evaluation = callback.evaluate(
            fine_tune,
            data,
            scales=scales,
            num_conditions=conditions,
            full=True,
            on_step=lambda step, total: bar.update(task, completed=step, total=total),
        )
    count = conditions or callback.num_conditions
    found = callback.health(fine_tune, data, count)
    others = {name: in_words(name, one) for name, one in found.items() if any(one.gap)}  # not the model's own
    health = {name: {**one.to_json(), "sentence": others.get(name)} for name, one in found.items()}
    watched = [
        {"prior": arm[0], "scales": list(arm[1]), **one.to_json(), "sentence": saturation.in_words(arm, one)}
        for arm, one in evaluation.saturation.items()
    ]
    record: dict[str, Any] = {
        "rows": evaluation.rows(),
        "verdict": evaluation.verdict.to_json() if evaluation.verdict else None,
        "floor": {name: estimate.value for name, estimate in evaluation.floor.items()},
        "history": next((s["history"] for s in state.get("callbacks", {}).values() if "history" in s), []),
        "sampling": {
            "scheduler": callback.sampler.scheduler,
            "steps": callback.sampler.steps,
            "eta": callback.sampler.eta,
            **callback.sampler.options,
        },
        "health": health,
        "saturation": watched,
        "conditions": count,
        "reference": callback.num_reference,
        "step": state.get("global_step"),
        "seconds_comparing": time.perf_counter() - start,
        "environment": environment(),
    }
    chosen = evaluation.verdict.chosen if evaluation.verdict else {}
    arms = {(prior, tuple(s)): evaluation.pictures[prior, tuple(s)] for prior, s in chosen.items()}
    batch = callback.examples(data, count)
    pictures = {
        "condition": shown(batch, "image"),
        "target": shown(batch, "pixels"),
        "caption": batch.get("text"),
        "fps": batch.get("fps"),
        "candidates": {candidate_text(*arm): images for arm, images in arms.items()},
        "arms": evaluation.pictures,
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


def save_comparison(
    folder: File, cli: FitCLI, record: dict[str, Any], pictures: dict[str, Any], evaluation: Evaluation
) -> None:
    """record.json, panel.png and index.html in a new folder, or nothing."""
    callback = comparison_of(cli)
    batch = callback.examples(cli.datamodule, min(callback.num_pictures, record["conditions"]))
    with new_folder(folder) as aside:
        write_panel(aside / "panel", evaluation, batch)
        write_report(aside / "index.html", {"title": "Which prior to deploy", **record}, pictures)
        (aside / "record.json").write_text(json.dumps(record, indent=1))


def show(record: dict[str, Any]) -> None:
    """The table and the sentence, on the terminal."""
    console = Console(width=max(100, Console().width))
    console.print(terminal_table(record))
    if record.get("verdict"):
        console.print(record["verdict"]["sentence"], style="bold")
    told = [*record.get("health", {}).values(), *record.get("saturation", [])]
    for sentence in filter(None, (entry["sentence"] for entry in told)):
        console.print(sentence)


def progress() -> Progress:
    """A bar with rate and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def environment() -> dict[str, str]:
    """What the figures were measured with."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        **{name: importlib.metadata.version(name) for name in ("priorguide", "torch", "diffusers", "lightning")},
    }
