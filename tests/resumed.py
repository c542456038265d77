"""Offline comparisons killed by SIGKILL at random moments and started again must end as an undisturbed one.

python tests/resumed.py COMPARISONS
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from oracle import pixel_model
from runs import CONFIGS, small, write_idx

TIMES = ("seconds_per_image", "peak_bytes", "seconds_comparing", "commit")


def timeless(folder: Path) -> Any:
    """A comparison's record, less what it took."""

    def less(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: less(item) for name, item in value.items() if name not in TIMES}
        return [less(item) for item in value] if isinstance(value, list) else value

    return less(json.loads((folder / "record.json").read_text()))


def one(arguments: list[str], log: Path) -> None:
    from priorguide.train.cli import main

    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        raise SystemExit(main(arguments))


def apart(arguments: list[str], log: Path, seconds: float | None = None) -> int | None:
    """The command in a process forked from this one, killed after so many seconds; its exit status."""
    process = multiprocessing.get_context("fork").Process(target=one, args=(arguments, log))
    process.start()
    assert process.pid is not None
    if seconds is not None:
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    process.join(300)
    return process.exitcode


def comparisons(count: int, folder: Path) -> int:
    """How many of `count` comparisons, each killed until it comes to its end, equal the undisturbed one."""
    from priorguide.sample.bundle import Bundle

    base = Bundle.save(folder / "base", pixel_model(4, num_classes=0, image_channels=0))
    config = small(CONFIGS / "fashion_edges.yaml", folder / "run", base, write_idx(folder / "idx"))
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"].endswith("PriorComparison"):
            callback["init_args"] |= {"batch_size": 2}
            callback["init_args"]["sampler"]["steps"] = 10
    (folder / "edges.yaml").write_text(yaml.safe_dump(config))
    log = folder / "log.txt"
    assert apart(["fit", "--config", str(folder / "edges.yaml")], log) == 0, log.read_text()
    command = ["compare", str(folder / "run"), "--scales", "1,1.5,2,3", "--out"]
    start = time.monotonic()
    assert apart([*command, str(folder / "undisturbed")], log) == 0, log.read_text()
    whole, equal = time.monotonic() - start, 0
    dice = random.Random(0)
    for number in range(count):
        out, kills = folder / str(number), 0
        while apart([*command, str(out)], log, dice.uniform(0.1, 1.1) * whole if kills < 4 else None) != 0:
            kills += 1
            assert kills < 8, log.read_text()
        alike = timeless(out) == timeless(folder / "undisturbed")
        left = [path.name for path in folder.iterdir() if path.name.startswith(f".{number}")]
        equal += alike and not left
        print(
            f"comparison {number}: {kills} kills, {'equal' if alike else 'NOT equal'}, left behind: {left}", flush=True
        )
    text = log.read_text()
    print(f"gone on with what was kept: {text.count('sampled already')} times")
    print(f"{equal} of {count} comparisons equal")
    return equal


if __name__ == "__main__":
    import lightning  # noqa: F401 - before the fork, as all that takes seconds to import
    import torch

    import priorguide.train.compare  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        wanted = int(sys.argv[1])
        sys.exit(0 if comparisons(wanted, Path(place)) == wanted else 1)
