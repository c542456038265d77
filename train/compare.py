"""`priorguide compare`: the full comparison of a run's candidates, its record and its page."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

from rich.console import Console

from ..callbacks.panels import panel
from ..callbacks.quantities import candidate_text
from ..callbacks.records import LOGGED, write_logged, write_panel, write_whole
from ..callbacks.report import with_decision, write_report
from ..callbacks.tables import terminal_table
from ..callbacks.votes import told, with_override, with_votes
from ..callbacks.wandb_log import log_result, scale_name
from ..callbacks.wandb_run import follow_up
from ..sample.checkpoint import read_checkpoint
from ..sample.compare import compare, within_memory
from ..sample.evaluate import Evaluation
from ..sample.manifest import new_folder
from ..sample.parts import Parts
from .fit import FitCLI, last_checkpoint, load_run
from .record import comparison_of, full_comparison
from .sampling import crossed, parse_seeds, read_condition, write_pictures


def compare_run(
    run: str | File,
    checkpoints: Sequence[str] = (),
    scales: Sequence[tuple[float, ...]] | None = None,
    conditions: int | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """Compares the candidates, with one checkpoint's weights or with several's, and writes record.json, panel.png, its
    pictures and index.html into a new folder.

    Until then finished chunks lie in a folder beside it, from which the same comparison goes on where it was stopped.
    """
    folder = File(out) if out else File(run) / "comparison"
    refuse_existing(folder)
    files = by_step([File(checkpoint) for checkpoint in checkpoints] or [last_checkpoint(run)])
    cli, state = load_run(run, files[-1])
    parts = Parts(folder.with_name(f".{folder.name}.parts"))
    record, pictures, evaluation = full_comparison(cli, state, scales, conditions, files, parts, File(run))
    save_comparison(folder, cli, record, pictures, evaluation)
    parts.remove()
    for aside in folder.parent.glob(f".{folder.name}.*.partial"):  # of a process that was killed while it wrote
        shutil.rmtree(aside, ignore_errors=True)
    show(record)
    with follow_up(run, "compare") as logged:
        log_result(logged, record, folder / "index.html")
    return record


def by_step(files: Sequence[File]) -> list[File]:
    """The checkpoints by rising step; of two of one step, such as last.ckpt and its twin, the first given."""
    if len(files) < 2:
        return list(files)
    found: dict[int, File] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"there is no checkpoint {file}")
        step = int(read_checkpoint(file)["global_step"])
        if (twin := found.setdefault(step, file)) is not file:
            print(f"{file.name} is of step {step}, as {twin.name} is, and left out")
    return [found[step] for step in sorted(found)]


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
        pictures, _ = within_memory(
            lambda size: compare(model, condition, each, candidates, callback.sampler, batch_size=size),
            callback.batch_size or len(each),
        )
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


def save_comparison(
    folder: File, cli: FitCLI, record: dict[str, Any], pictures: dict[str, Any], evaluation: Evaluation
) -> None:
    """record.json, panel.png, its pictures and index.html in a new folder, or nothing."""
    callback = comparison_of(cli)
    count = min(callback.num_pictures, record["conditions"])
    batch = callback.examples(cli.datamodule, count)
    with new_folder(folder) as aside:
        write_panel(aside / "panel", evaluation, batch)
        write_logged(aside / LOGGED, record["step"], evaluation.pictures, count)
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
