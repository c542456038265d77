"""A SIGTERM ends training at its next step, on every process, with a checkpoint and exit status 75."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import LightningEnvironment

STATUS = 75
"""EX_TEMPFAIL of sysexits.h: the same command with `--ckpt_path last` goes on."""


class Preempted(SystemExit):
    """Training was asked to stop, and stops on every process: a process that does not catch it exits with its code."""


class Preemption(L.Callback):
    """Notes a SIGTERM while training and, at the end of the optimiser's step, or of a batch of validation, raises
    `Preempted` on every process. A validation that was left is made again by the run that goes on.

    First among the callbacks, so that a comparison that is due is left to the run that goes on. `Checkpoint` saves at
    the exception. The processes agree by one reduction per step of the optimiser; Lightning's own handler would start a
    collective inside the signal handler, where the other processes may be in another one.
    """

    _whole = True

    def __init__(self) -> None:
        self.asked: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes SIGTERM over from Lightning, which restores the handlers that were there when training ends."""
        self.asked, self._whole, self._last_step = _note_sigterm(trainer)[0], True, trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._whole = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
        total.ready = total.started = total.completed  # it was left within a batch no longer

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._stop_if_asked(trainer, validating=True)

    def _stop_if_asked(self, trainer: L.Trainer, validating: bool = False) -> None:
        if not self._whole:
            return  # between micro-batches there is nothing to save: gradients are in no checkpoint
        if not trainer.strategy.reduce_boolean_decision(bool(self.asked), all=False):
            return
        if validating:  # Lightning takes up a validation that was left within a batch: here as if in the first one
            progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset_on_run()
            progress.total.processed = progress.total.completed = progress.total.started - 1
        raise stopped(trainer)


def _note_sigterm(trainer: L.Trainer) -> tuple[list[int], Any]:
    """(what a SIGTERM is put into from now on, which also passes it on to the processes that this one started, the
    handler that was there before: None in a thread, where there is none)."""
    asked: list[int] = []

    def note(number: int, *_: Any) -> None:
        launcher = trainer.strategy.launcher
        if not asked and hasattr(launcher, "kill"):
            launcher.kill(signal.SIGTERM)  # type: ignore[union-attr]
        asked.append(number)

    here = threading.current_thread() is threading.main_thread()
    return asked, signal.signal(signal.SIGTERM, note) if here else None


@contextmanager
def sigterm_noted(trainer: L.Trainer) -> Iterator[list[int]]:
    """Within it a SIGTERM ends nothing, but is in this list, on the processes that Lightning started too."""
    asked, before = _note_sigterm(trainer)
    try:
        yield asked
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def stopped(trainer: L.Trainer) -> Preempted:
    """The exception, with this process's exit status: 0 for those that Lightning started, since its launcher kills the
    first process when another one fails."""
    ours = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
    return Preempted(0 if ours and trainer.local_rank else STATUS)
