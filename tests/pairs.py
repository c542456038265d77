"""Two processes over gloo that make the tiny run together, forked from one that has imported everything."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["pairs", "interrupted"])

Before = Callable[[int], dict[str, Any]]
"""What a process of this rank does before it fits; returns options of the fit."""


def _process(rank: int, machines: int, port: int, log: Path, before: Before | None, options: dict[str, Any]) -> None:
    from interrupted import fit

    from priorguide.train.fit import quiet

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": "0" if machines > 1 else str(rank), "NODE_RANK": str(rank) if machines > 1 else "0"}
    quiet()
    fit(devices=2 // machines, machines=machines, **options, **(before(rank) if before else {}))
    sys.stderr.flush()


@contextmanager
def started(
    folder: Path, before: Before | None = None, machines: int = 1, **options: Any
) -> Iterator[list[BaseProcess]]:
    """Both processes of a fit in the folder, which leave what they say beside it, in NAME.0 and NAME.1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"folder": folder, "workers": 0, **options}
    given = [(rank, machines, port, log(folder, rank), before, options) for rank in (0, 1)]
    pair = [context.Process(target=_process, args=each) for each in given]
    try:
        for process in pair:
            process.start()
        yield pair
        for process in pair:
            process.join(180)
    finally:
        for process in pair:
            process.kill()
            process.join()


def log(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.name}.{rank}")


def run(folder: Path, before: Before | None = None, codes: tuple[int, int] = (0, 0), **options: Any) -> None:
    """Both processes until they end, with these exit statuses."""
    with started(folder, before, **options) as pair:
        pass
    found = tuple(process.exitcode for process in pair)
    assert found == codes, f"{found}\n{log(folder, 0).read_text()[-3000:]}\n{log(folder, 1).read_text()[-3000:]}"
