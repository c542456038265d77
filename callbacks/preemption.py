"""A SIGTERM ends training at its next step, on every process, with a checkpoint and exit status 75."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy

STATUS = 75
"""EX_TEMPFAIL of sysexits.h: the same command with `--ckpt_path last` goes on."""


class Preempted(SystemExit):
    """Training was asked to stop, and stops on every process: a process that does not catch it exits with its code."""


class Preemption(L.Callback):
    """Notes a SIGTERM while training and, at the end of the optimiser's step, raises `Preempted` on every process.

    First among the callbacks, so that a comparison that is due is left to the run that goes on. `Checkpoint` saves at
    the exception. The processes agree by one reduction per step of the optimiser; Lightning's own handler would start a
    collective inside the signal handler, where the other processes may be in another one.
    """

    asked = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes SIGTERM over from Lightning, which restores the handlers that were there when training ends."""
        self.asked, self._last_step = False, trainer.global_step

        def note(*_: Any) -> None:
            launcher = trainer.strategy.launcher
            if not self.asked and hasattr(launcher, "kill"):
                launcher.kill(signal.SIGTERM)  # type: ignore[union-attr] # the processes that this one started
            self.asked = True

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, note)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # between micro-batches there is nothing to save: gradients are in no checkpoint
        self._last_step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            raise stopped(trainer)


def stopping(trainer: L.Trainer) -> Callable[[int, int], None] | None:
    """For `on_step` of a sampling loop: raises `Preempted` once a SIGTERM has come; to be used within `together`.

    Processes that share a network's weights (ModelParallelStrategy) must call it equally often, and leave together.
    """
    own = next((c for c in trainer.callbacks if isinstance(c, Preemption)), None)  # type: ignore[attr-defined]
    shared = isinstance(trainer.strategy, ModelParallelStrategy)

    def on_step(step: int, total: int) -> None:
        assert own is not None
        if trainer.strategy.reduce_boolean_decision(own.asked, all=False) if shared else own.asked:
            raise stopped(trainer)

    return None if own is None else on_step


@contextmanager
def together(trainer: L.Trainer) -> Iterator[None]:
    """Every process leaves the block by `Preempted` where one does."""
    left = False
    try:
        yield
    except Preempted:
        left = True
    if trainer.strategy.reduce_boolean_decision(left, all=False):
        raise stopped(trainer)


def stopped(trainer: L.Trainer) -> Preempted:
    """The exception, with this process's exit status: 0 for those that Lightning started, since its launcher kills the
    first process when another one fails."""
    ours = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
    return Preempted(0 if ours and trainer.local_rank else STATUS)
