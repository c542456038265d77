"""Checkpoints: Lightning's own, written whole or not at all, always one of the last step, read without unpickling."""

import errno
import os
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..sample.checkpoint import read_checkpoint


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then renames it: a disk that fills up leaves the previous one as it was.

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
            os.replace(aside, path)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
            reason = os.strerror(error.errno or errno.EIO) if isinstance(error, OSError) else "is the disk full?"
            raise OSError(f"{path} could not be written ({reason}); earlier checkpoints are as they were") from error
        finally:
            aside.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | File, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)


class Checkpoint(ModelCheckpoint):
    """ModelCheckpoint that writes whole files, and last.ckpt also when training ends between two due steps."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one that the user chose
            trainer.strategy.checkpoint_io = WholeFiles()
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
