"""What a run is doing besides training, as a line of the trainer's progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


@contextmanager
def line(trainer: L.Trainer, what: str) -> Iterator[Callable[[int, int], None]]:
    """Takes (done, total) while the block runs: the line has the rate and the time left. RichProgressBar alone."""
    bar = trainer.progress_bar_callback
    progress = bar.progress if isinstance(bar, RichProgressBar) and bar.is_enabled else None
    if progress is None:
        yield lambda done, total: None
        return
    task = progress.add_task(what, total=1)
    try:
        yield lambda done, total: progress.update(task, completed=done, total=total)
    finally:
        progress.remove_task(task)
