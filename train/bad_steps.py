"""Steps whose gradient is not finite, or far too long: left out, and written down with the samples that made it."""

import copy
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from .sharding import local


def check_network(module: L.LightningModule, network: nn.Module) -> None:
    """ValueError on every process where a weight is not finite on one."""
    if not _finite(module, *(p for p in network.parameters() if p.is_floating_point())):
        raise ValueError(_sentence(module, "network"))


def check_loss(module: L.LightningModule, loss: Tensor, batch_idx: int) -> None:
    """ValueError on every process where the loss is not finite on one; the batch is recorded."""
    if not _finite(module, loss):
        path = _record(module, range(batch_idx, batch_idx + 1))
        raise ValueError(f"{_sentence(module, 'loss')}; the batch is in {path}")


@dataclass
class Usual:
    """How long gradients are: the mean of the logarithm, over about the last hundred steps that were not left out."""

    log: float = 0.0
    steps: int = 0

    def add(self, length: float) -> None:
        self.steps += 1
        self.log += (math.log(max(length, 1e-30)) - self.log) / min(self.steps, 100)

    def fault(self, length: float, times: float) -> str | None:
        """What is wrong with a gradient of this length; nothing is too long in the first ten steps."""
        if not math.isfinite(length):
            return "is no longer finite"
        if self.steps >= 10 and (growth := length / math.exp(self.log)) > times:
            return f"is {growth:.0f} times as long as usual (max_gradient_growth: {times:g})"
        return None


def leave_out_if_bad(
    module: L.LightningModule, optimizer: torch.optim.Optimizer, left: int, usual: Usual, times: float
) -> bool:
    """Whether the gradient is not finite, or more than `times` as long as usual: then it is taken away, so that the
    optimiser moves nothing, and the step's batches are recorded. ValueError where none is `left` to leave out."""
    trainer = module.trainer
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    length = _length(module, gradients)
    if (fault := usual.fault(length, times)) is None:
        usual.add(length)
        return False
    batch = trainer.fit_loop.epoch_loop.batch_idx
    path = _record(module, range(batch - batch % trainer.accumulate_grad_batches, batch + 1), fault)
    if left < 1:
        raise ValueError(f"{_sentence(module, 'gradient', fault)}; the batches of all such steps are in {path}")
    optimizer.zero_grad(set_to_none=True)
    return True


def _length(module: L.LightningModule, gradients: list[Tensor]) -> float:
    """Of all gradients together, the same on every process; waits for the device once."""
    if not gradients:
        return 0.0
    norms = torch.stack(list(torch._foreach_norm([local(gradient.detach()).float() for gradient in gradients])))
    square = norms.double().square().sum()
    if _alone():
        return math.sqrt(square)
    parts = any(local(gradient) is not gradient for gradient in gradients)  # else all have the same
    return math.sqrt(module.trainer.strategy.reduce(square, reduce_op="sum" if parts else "mean"))


def _alone() -> bool:
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def _finite(module: L.LightningModule, *tensors: Tensor) -> bool:
    """Whether all are finite, on every process; waits for the device once."""
    norms = torch._foreach_norm([local(tensor.detach()).float() for tensor in tensors]) if tensors else []
    here = not norms or bool(torch.stack(list(norms)).isfinite().all())
    return here if _alone() else module.trainer.strategy.reduce_boolean_decision(here, all=True)


def _sentence(module: L.LightningModule, name: str, fault: str = "is no longer finite") -> str:
    return (
        f"the {name} {fault} at step {module.global_step}: lower the learning rate, clip gradients "
        "(trainer.gradient_clip_val), or train in 32 bits"
    )


def _record(module: L.LightningModule, batches: range, fault: str = "is no longer finite") -> File:
    """A line in the run's bad_steps.jsonl: the step, the epoch, its batches there, the fault, each process's samples.

    samples: positions in the training set, by process; null where the sampler's order follows from more than its
    epoch.
    """
    trainer = module.trainer
    loader: Any = trainer.train_dataloader
    sampler, samples = getattr(loader, "sampler", None), None
    if isinstance(sampler, DistributedSampler):
        whole = sampler if loader.batch_size is None else loader.batch_sampler
        chosen = itertools.chain(*itertools.islice(iter(copy.copy(whole)), batches.start, batches.stop))
        own = torch.tensor([one[-1] if isinstance(one, tuple) else one for one in chosen], device=module.device)
        samples = module.all_gather(own).reshape(trainer.world_size, -1).tolist()  # type: ignore[union-attr]
    path = File(trainer.default_root_dir) / "bad_steps.jsonl"
    if trainer.is_global_zero:
        line = {"step": trainer.global_step, "epoch": trainer.current_epoch, "batches": list(batches), "fault": fault}
        with path.open("a") as file:
            file.write(json.dumps({**line, "samples": samples}) + "\n")
    return path
