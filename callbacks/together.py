"""Processes that sample together: where one leaves, none waits for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from .preemption import Preempted, Preemption, stopped

GO_ON, NO_MEMORY, STOP = 0, 1, 2
"""What a process has to tell the others; the greatest holds for all."""


class _NoMemoryElsewhere(torch.OutOfMemoryError):
    """Another process has run out of memory."""


class Together:
    """A comparison on all processes of a trainer.

    Processes with whole networks go their own ways, and meet at the end. Those that share a network's weights
    (ModelParallelStrategy) must call it equally often: they meet before each part of it is gathered, and at each
    denoising step, so that all leave where one has run out of memory or is to stop.
    """

    def __init__(self, trainer: L.Trainer, show: Callable[[int, int], None] = lambda done, total: None):
        self.trainer, self.show = trainer, show
        self.shared = isinstance(trainer.strategy, ModelParallelStrategy)
        self.preemption = next((c for c in trainer.callbacks if isinstance(c, Preemption)), None)  # type: ignore[attr-defined]

    def on_step(self, step: int, total: int) -> None:
        """For a sampling loop: shows how far it is, and raises `Preempted` once a SIGTERM has come."""
        self.show(step, total)
        asked = self.preemption is not None and self.preemption.asked
        if self.shared:
            self._meet(STOP if asked else GO_ON)
        elif asked:
            raise stopped(self.trainer)

    @contextmanager
    def until_all_are_done(self) -> Iterator[None]:
        """Every process leaves the block by `Preempted` where one does."""
        left = False
        try:
            yield
        except Preempted:
            left = True
        if self.trainer.strategy.reduce_boolean_decision(left, all=False):
            raise stopped(self.trainer)

    def trying(self, run: Callable[[int], Any], network: nn.Module) -> Callable[[int], Any]:
        """`run`, which samples from the network: it raises OutOfMemoryError on all processes that share the network's
        weights where it does on one, and leaves the network ready for another try."""
        if not self.shared:
            return run
        from torch.distributed.fsdp import FSDPModule

        parts = [module for module in network.modules() if isinstance(module, FSDPModule)]

        def tried(size: int) -> Any:
            hooks = [part.register_forward_pre_hook(self._before_gathering, prepend=True) for part in parts]
            try:
                found = run(size)
                self._meet(GO_ON)
                return found
            except torch.OutOfMemoryError as error:
                parts[0].reset_iter_state()  # type: ignore[operator] # the network itself
                if not isinstance(error, _NoMemoryElsewhere):
                    with suppress(_NoMemoryElsewhere):
                        self._meet(NO_MEMORY)
                raise
            finally:
                for hook in hooks:
                    hook.remove()

        return tried

    def _before_gathering(self, *_: Any) -> None:
        self._meet(GO_ON)

    def _meet(self, told: int) -> None:
        strategy = self.trainer.strategy
        worst = int(strategy.reduce(torch.tensor(told, device=strategy.root_device), reduce_op="max"))
        if worst == STOP:
            raise stopped(self.trainer)
        if worst == NO_MEMORY:
            raise _NoMemoryElsewhere("another process of this run has run out of memory")
