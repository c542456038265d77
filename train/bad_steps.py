"""Steps whose gradient is not finite: left out, and written down with the samples that made it."""

import copy
import itertools
import json
from pathlib import Path as File

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


def leave_out_if_bad(module: L.LightningModule, optimizer: torch.optim.Optimizer, left: int) -> bool:
    """Whether the gradient is not finite: then it is taken away, so that the optimiser moves nothing, and the step's
    batches are recorded. ValueError where none is `left` to leave out."""
    trainer = module.trainer
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if _finite(module, *gradients):
        return False
    batch = trainer.fit_loop.epoch_loop.batch_idx
    path = _record(module, range(batch - batch % trainer.accumulate_grad_batches, batch + 1))
    if left < 1:
        raise ValueError(f"{_sentence(module, 'gradient')}; the batches of all such steps are in {path}")
    optimizer.zero_grad(set_to_none=True)
    return True


def _finite(module: L.LightningModule, *tensors: Tensor) -> bool:
    """Whether all are finite, on every process; waits for the device once."""
    norms = torch._foreach_norm([local(tensor.detach()).float() for tensor in tensors]) if tensors else []
    here = not norms or bool(torch.stack(list(norms)).isfinite().all())
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return here if alone else module.trainer.strategy.reduce_boolean_decision(here, all=True)


def _sentence(module: L.LightningModule, name: str) -> str:
    return (
        f"the {name} is no longer finite at step {module.global_step}: lower the learning rate, clip gradients "
        "(trainer.gradient_clip_val), or train in 32 bits"
    )


def _record(module: L.LightningModule, batches: range) -> File:
    """A line in the run's bad_steps.jsonl: the step, the epoch, its batches there, and each process's samples.

    samples: positions in the training set, by process; null where the sampler's order follows from more than its
    epoch.
    """
    trainer = module.trainer
    loader = trainer.train_dataloader
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    samples = None
    if isinstance(sampler, DistributedSampler) and size:
        chosen = itertools.islice(iter(copy.copy(sampler)), batches.start * size, batches.stop * size)
        own = torch.tensor([one[-1] if isinstance(one, tuple) else one for one in chosen], device=module.device)
        samples = module.all_gather(own).reshape(trainer.world_size, -1).tolist()  # type: ignore[union-attr]
    path = File(trainer.default_root_dir) / "bad_steps.jsonl"
    if trainer.is_global_zero:
        line = {"step": trainer.global_step, "epoch": trainer.current_epoch, "batches": list(batches)}
        with path.open("a") as file:
            file.write(json.dumps({**line, "samples": samples}) + "\n")
    return path
