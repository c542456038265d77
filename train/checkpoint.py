"""Checkpoints: Lightning's own, written whole or not at all, always one of the last step, read without unpickling."""

import errno
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..callbacks.preemption import Preempted
from ..sample.checkpoint import read_checkpoint


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, reads it back and renames it: a disk that fills up leaves the previous one
    as it was.

    Lightning's own goes through the temporary folder, and onto the previous file byte by byte where that is another
    disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | File, storage_options: Any = None) -> None:
        path = File(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            read_checkpoint(aside)  # its table and its pickle; the tensors are mapped, not read
            os.replace(aside, path)
        except (OSError, RuntimeError, ValueError) as error:  # torch's writer reports a full disk as a RuntimeError
            reason = os.strerror(error.errno or errno.EIO) if isinstance(error, OSError) else _why(error)
            raise OSError(f"{path} could not be written ({reason}); earlier checkpoints are as they were") from error
        finally:
            aside.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | File, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else "is the disk full?"


class Checkpoint(ModelCheckpoint):
    """ModelCheckpoint that writes whole files, and last.ckpt also when training ends or is preempted between two due
    steps."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one that the user chose
            trainer.strategy.checkpoint_io = WholeFiles()
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            for aside in File(str(self.dirpath)).glob(".*.ckpt.*"):  # of a process that was killed while it wrote
                aside.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step  # what it goes on from

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps:  # here the place in the epoch is known: later it counts as over
            self._save_unsaved(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Preempted):
            super().on_exception(trainer, pl_module, exception)
        # After the last step a run would not begin again to make the comparison that was left: it goes on from before.
        elif trainer.global_step != trainer.max_steps or not self._has_last(trainer):
            self._save_unsaved(trainer)

    def _has_last(self, trainer: L.Trainer) -> bool:
        return bool(trainer.strategy.broadcast((File(str(self.dirpath)) / "last.ckpt").is_file()))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_unsaved(trainer)

    def _save_unsaved(self, trainer: L.Trainer) -> None:
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def newest_whole(folder: str | File) -> File | None:
    """The checkpoint that a run in this folder goes on from, None where there is none.

    It is last.ckpt, or a newer one that Lightning left for a requeued Slurm job; where these are damaged, the newest
    other one, with a warning. ValueError where all are damaged.
    """

    def by_age(*paths: File) -> list[File]:
        return sorted((path for path in paths if path.is_file()), key=lambda path: -path.stat().st_mtime_ns)

    kept = File(folder) / "checkpoints"
    first = by_age(kept / "last.ckpt", *File(folder).glob("hpc_ckpt_*.ckpt"))
    found = first + [path for path in by_age(*kept.glob("*.ckpt")) if path not in first]
    faults: list[str] = []
    for path in found:
        try:
            _read_through(path)
        except ValueError as error:
            faults.append(str(error))
            continue
        if faults:
            warnings.warn(f"{'; '.join(faults)}; this run goes on from {path}", stacklevel=2)
        return path
    if faults:
        raise ValueError(f"no checkpoint of {folder} can be read: {'; '.join(faults)}")
    return None


def _read_through(path: File) -> None:
    """ValueError where a byte of the file is not what was written."""
    read_checkpoint(path)
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as held:
            name = held.testzip()
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:  # an entry's own header is damaged
        raise ValueError(f"{path} is not a whole checkpoint: {error}") from error
    if name is not None:
        raise ValueError(f"{path} is not a whole checkpoint: {name} has changed since it was written")
