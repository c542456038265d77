"""Kills a tiny run by SIGKILL at random moments, lets it go on, and asks for the undisturbed run's last bit.

    python tests/benchmarks/kill.py --kills 50 --processes 1
    python tests/benchmarks/kill.py --kills 10 --processes 2 [--strategy fsdp]

A third of the kills comes at any moment, a third while a checkpoint is written, a third while priors are compared.
What must be equal in the end: weights, average, optimiser, schedule, the generators of all processes, the comparisons.
"""

import argparse
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from fits import same
from interrupted import fit, held, make_pictures

from priorguide.callbacks.comparison import PriorComparison
from priorguide.train.checkpoint import WholeFiles
from priorguide.train.fit import quiet

MOMENTS = {"any": 0, "save": 1, "compare": 2}


def noting(call: Callable[..., Any], number: int, phase: Any) -> Callable[..., Any]:
    """The call, with `phase` at (its number, how often it was entered) meanwhile."""

    def noted(*args: Any, **options: Any) -> Any:
        phase[0], phase[number] = number, phase[number] + 1
        try:
            return call(*args, **options)
        finally:
            phase[0] = 0

    return noted


def one_process(
    rank: int, processes: int, strategy: str, port: int, phase: Any, pictures: Path, folder: Path, resume: bool
) -> None:
    quiet()
    os.setpgid(0, 0)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        os.dup2(log.fileno(), 2)
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    if rank == 0:
        WholeFiles.save_checkpoint = noting(WholeFiles.save_checkpoint, 1, phase)
        PriorComparison._compare = noting(PriorComparison._compare, 2, phase)
    fit(pictures, folder, devices=processes, kind=strategy, resume=resume)


def start(processes: int, strategy: str, phase: Any, pictures: Path, folder: Path, resume: bool) -> list[Any]:
    """The run's processes, forked from this one, which has imported everything and computed nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    arguments = (processes, strategy, port, phase, pictures, folder, resume)
    ranks = [fork.Process(target=one_process, args=(rank, *arguments)) for rank in range(processes)]
    for process in ranks:
        process.start()
    return ranks


def finish(ranks: list[Any], folder: Path) -> None:
    for process in ranks:
        process.join(300)
        if process.exitcode != 0:
            log = folder.parent / f"{folder.name}.log"
            raise RuntimeError(f"the run in {folder} failed with {process.exitcode}:\n{log.read_text()[-3000:]}")


def kill(ranks: list[Any], moment: str, phase: Any, seconds: float, draw: random.Random) -> str | None:
    """Kills all processes at the moment; returns the phase that it hit, None if the run was over first."""
    end = time.perf_counter() + draw.uniform(0.02, seconds)
    wanted, times, linger = MOMENTS[moment], draw.randint(1, 9 if moment == "save" else 3), draw.random()
    while ranks[0].is_alive():
        hit = phase[0] == wanted and phase[wanted] == times if wanted else time.perf_counter() > end
        if hit:
            time.sleep(linger * {"any": 0, "save": 0.03, "compare": 0.15}[moment])
            break
    found = next(name for name, number in MOMENTS.items() if number == phase[0])
    alive = ranks[0].is_alive()
    for process in ranks:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return found if alive else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp", help="of several processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    draw, processes, strategy = random.Random(arguments.seed), arguments.processes, arguments.strategy
    table = {name: {"kills": 0, "elsewhere": 0, "went on from": set(), "equal": 0} for name in MOMENTS}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        pictures = make_pictures(root / "pictures")
        phase = multiprocessing.get_context("fork").Array("i", 3, lock=False)
        began = time.perf_counter()
        finish(start(processes, strategy, phase, pictures, root / "undisturbed", False), root / "undisturbed")
        seconds, expected = time.perf_counter() - began, held(root / "undisturbed")
        for number in range(arguments.kills):
            moment = list(MOMENTS)[number % 3]
            folder, row = root / f"run{number}", table[moment]
            phase[:] = [0, 0, 0]
            found = kill(start(processes, strategy, phase, pictures, folder, False), moment, phase, seconds, draw)
            row["kills"] += found is not None
            row["elsewhere"] += found not in (None, moment) and moment != "any"
            last = folder / "checkpoints" / "last.ckpt"
            row["went on from"].add(held(folder)["global_step"] if last.exists() else 0)
            finish(start(processes, strategy, phase, pictures, folder, True), folder)
            if not (equal := same(held(folder), expected)):
                differ = [name for name, value in held(folder).items() if not same(value, expected[name])]
                print(f"kill {number} ({moment}): {differ} differ", flush=True)
            left = sorted(path.name for path in folder.glob("checkpoints/.*"))
            row["equal"] += equal and not left
    print(f"{processes} process(es), {seconds:.1f} s undisturbed, {time.perf_counter() - began:.0f} s in all\n")
    print(
        "| moment | killed | of these just after it | went on from steps | equal bit for bit |\n|---|---|---|---|---|"
    )
    for name, row in table.items():
        steps = ", ".join(map(str, sorted(row["went on from"])))
        print(f"| {name} | {row['kills']} | {row['elsewhere']} | {steps} | {row['equal']} |")
    runs = sum(row["equal"] for row in table.values())
    print(f"\n{runs} of {arguments.kills} runs equal the undisturbed one")
    return 0 if runs == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
