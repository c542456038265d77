"""`priorguide quickstart`: fine-tune, compare, choose, export, report, on real pictures, in minutes on a CPU."""

import os
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path as File

from rich.console import Console

from ..callbacks.wandb_log import log_bundle, log_result
from ..callbacks.wandb_run import finish, follow_up
from .compare import refuse_existing, save_comparison, show
from .export import export_checked
from .fit import fit, last_checkpoint, load_run
from .record import full_comparison


@dataclass(frozen=True)
class Task:
    """One of the tasks: its config, and what the full comparison adds to the config's own."""

    config: str
    title: str
    description: str
    scales: tuple[float, ...]
    conditions: int


TASKS = {
    "edges": Task(
        "fashion_edges.yaml",
        "Edges to garments",
        "An unconditional model of garments, fine-tuned on 1,000 pairs to draw a garment from its edge map.",
        (1, 1.5, 2, 3),
        1500,
    ),
    "classes": Task(
        "fashion_classes.yaml",
        "Garments by class",
        "An unconditional model of garments, fine-tuned on 500 labelled pictures to draw a garment of a class.",
        (1, 1.5, 2, 3),
        800,
    ),
    "rotate": Task(
        "fashion_rotate.yaml",
        "Turning a garment",
        "An unconditional model of upright garments, fine-tuned on 1,500 pairs to turn a garment by multiples of 45 "
        "degrees: most of what it learns to draw lies outside the base's domain.",
        (1, 1.5, 2, 3),
        800,
    ),
}


def quickstart(task_name: str, out: str | None, seed: int, threads: int | None) -> File:
    """Runs a task into a new folder: config, checkpoints, comparisons, bundle/, report/index.html."""
    task = TASKS[task_name]
    folder = File(out) if out else File("quickstart") / task_name
    refuse_existing(folder)
    start = time.perf_counter()
    console = Console()
    console.rule(f"{task.title}: fine-tuning")
    cli = fit(
        [
            "--config", str(files("priorguide.configs") / task.config),
            "--seed_everything", str(seed),
            "--threads", str(threads or os.cpu_count() or 1),
            "--trainer.default_root_dir", str(folder),
        ]
    )  # fmt: skip
    tuned = time.perf_counter()
    console.rule("comparing self and base from the same noise and conditions")
    cli, state = load_run(folder)
    record, pictures, evaluation = full_comparison(cli, state, [(s,) for s in map(float, task.scales)], task.conditions)
    record |= {"title": task.title, "task": task_name, "description": task.description}
    show(record)
    console.rule("exporting")
    console.print(export_checked(cli, state, folder / "bundle", record, evaluation.pictures))
    end = time.perf_counter()
    record |= {
        "seconds_fine_tuning": tuned - start,
        "seconds_total": end - start,
        "bundle": "../bundle",
        "how_to_sample": how_to_sample(folder / "bundle"),
    }
    save_comparison(folder / "report", cli, record, pictures, evaluation)
    with follow_up(folder, "quickstart") as run:
        log_result(run, record, folder / "report" / "index.html")
        log_bundle(run, last_checkpoint(folder), folder / "bundle", record)
    if where := finish():
        console.print(where, soft_wrap=True)
    console.print(f"{(end - start) / 60:.1f} minutes; the page: {folder / 'report' / 'index.html'}")
    return folder


def how_to_sample(bundle: File) -> list[dict[str, str]]:
    """The ways to sample from the bundle, as printed on the page."""
    return [
        {
            "title": "Command line",
            "code": f"priorguide sample {bundle} --recorded --out samples",
        },
        {
            "title": "Python",
            "code": "from priorguide.sample.bundle import Bundle\n\n"
            f'bundle = Bundle.load("{bundle}")\n'
            "recorded = bundle.recorded()\n"
            "pixels = bundle.sample(recorded.condition, recorded.seeds)  # (B, C, H, W) in [0, 1]",
        },
    ]
