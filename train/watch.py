"""`priorguide compare RUN --watch`: compares each checkpoint of a run once, as it appears, in a process of its own."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as File
from typing import Any

import yaml

from ..callbacks.quantities import candidate_text, measured, metric, reading
from ..callbacks.records import write_panel, write_whole
from ..callbacks.report import write_report
from ..callbacks.wandb_log import log_to
from ..callbacks.wandb_run import follow_up
from ..sample.checkpoint import read_checkpoint
from ..sample.evaluate import Evaluation
from .fine_tune import FineTune
from .fit import FitCLI, load_run, load_weights
from .record import WATCHED, comparison_of, history_of

POLL = 5.0
"""Seconds between two looks at the checkpoints' folder."""


def watch_run(
    run: str | File,
    idle: float = 3600.0,
    scales: Sequence[tuple[float, ...]] | None = None,
    conditions: int | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[int]:
    """Compares every checkpoint in RUN/checkpoints as the run's own callback would, and returns the steps compared.

    RUN/watched gets a line of metrics.jsonl and a panel per step, and a page of the curves over training, from which
    `priorguide compare` draws its own too. Steps that are in there are left alone. Ends once the run's last step is
    compared, or when no checkpoint has come for `idle` seconds. The run itself is only ever read.
    """
    run, cli = File(run), None
    seen, done, since = Seen(run / "checkpoints"), steps_in(run / WATCHED), time.monotonic()
    compared: list[int] = []
    while True:
        waiting = sorted((step, file) for step, file in seen.steps().items() if step not in done)
        for step, file in waiting:
            try:
                if cli is None:
                    cli, state = load_run(run, file)
                else:
                    state = load_weights(cli, file)
            except FileNotFoundError:  # as a run that keeps its newest checkpoints alone removes them
                print(f"step {step}: {file.name} was removed before it could be read")
                continue
            if (now := int(state["global_step"])) in done:  # last.ckpt, which has moved on
                continue
            evaluation = evaluated(cli, scales, conditions)
            write(cli, run, state, evaluation, conditions)
            done.add(now)
            compared.append(now)
            print(f"step {now}: {in_brief(cli, evaluation)}")
            since = time.monotonic()
            break  # what there is to do may have changed meanwhile
        else:
            if finished(run, seen.steps(), done):
                print(f"the run is complete: {len(done)} steps compared, in {run / WATCHED / 'index.html'}")
                return compared
            if time.monotonic() - since > idle:
                torn = f"; not whole: {', '.join(sorted(seen.torn))}" if seen.torn else ""
                print(f"no new checkpoint for {idle:g} seconds: {len(done)} steps compared{torn}")
                return compared
            sleep(POLL)


class Seen:
    """The checkpoints in a folder by their step, each file read once as long as it stays the same."""

    def __init__(self, folder: File):
        self.folder, self.torn = folder, set[str]()
        self._known: dict[tuple[str, int, int], int] = {}

    def steps(self) -> dict[int, File]:
        """What is whole; a file that is not, such as one being copied, may be so the next time."""
        found: dict[int, File] = {}
        self.torn = set()
        for file in sorted(self.folder.glob("*.ckpt")):
            try:
                stat = file.stat()
                key = file.name, stat.st_mtime_ns, stat.st_size
                if key not in self._known:
                    self._known[key] = int(read_checkpoint(file)["global_step"])
                found.setdefault(self._known[key], file)
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, OSError):
                self.torn.add(file.name)
        return found


def steps_in(folder: File) -> set[int]:
    return {entry["step"] for entry in lines_of(folder)}


def lines_of(folder: File) -> list[dict[str, Any]]:
    """What was measured so far."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def evaluated(cli: FitCLI, scales: Sequence[tuple[float, ...]] | None, conditions: int | None) -> Evaluation:
    """The comparison that the run's callback would have made of the weights that are in place."""
    assert isinstance(cli.model, FineTune)
    cli.datamodule.setup("fit")
    cli.model.to(cli.trainer.strategy.root_device)
    return comparison_of(cli).evaluate(cli.model, cli.datamodule, scales=scales, num_conditions=conditions)


def write(cli: FitCLI, run: File, state: dict[str, Any], evaluation: Evaluation, conditions: int | None) -> None:
    """One step's panel, its line of metrics, and the page anew, each file whole or not at all; and W&B's part."""
    callback, folder, step = comparison_of(cli), run / WATCHED, int(state["global_step"])
    batch = callback.examples(cli.datamodule, min(callback.num_pictures, conditions or callback.num_conditions))
    write_panel(folder / f"panel-{step:08d}", evaluation, batch)
    entries = {entry["step"]: entry for entry in lines_of(folder)} | {step: {"step": step, "rows": evaluation.rows()}}
    write_whole(folder / "metrics.jsonl", "".join(json.dumps(entries[one]) + "\n" for one in sorted(entries)))
    record = {"title": f"{run.name} at step {step}", "rows": evaluation.rows(), "history": history_of(state, run)}
    write_report(folder / "index.html", record)
    with follow_up(run, "watch") as logged:
        if logged is not None:
            log_to([logged], step, evaluation, batch)


def in_brief(cli: FitCLI, evaluation: Evaluation) -> str:
    """Every arm's value of the metric that decides."""
    key = comparison_of(cli).rule.decide_by
    found = [(row, reading(row["metrics"], key)) for row in evaluation.rows()]
    told = [f"{candidate_text(row['prior'], row['scales'])} {measured(*value)}" for row, value in found if value]
    return f"{metric(key).head} {'; '.join(told)}" if told else "pictures alone, no metric network"


def finished(run: File, there: Mapping[int, File], done: set[int]) -> bool:
    """Whether the newest checkpoint is compared, and is of the last step or epoch that the run's config names."""
    if not there or (newest := max(there)) not in done or not (run / "config.yaml").is_file():
        return False
    trainer = yaml.safe_load((run / "config.yaml").read_text())["trainer"]
    steps, epochs = trainer.get("max_steps") or -1, trainer.get("max_epochs") or -1
    if 0 < steps <= newest:
        return True
    loop = read_checkpoint(there[newest]).get("loops", {}).get("fit_loop", {})
    return bool(0 < epochs <= loop.get("epoch_progress", {}).get("current", {}).get("completed", 0))
