"""`priorguide fit`: LightningCLI over FineTune and any data module."""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any, NoReturn

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from ..callbacks.comparison import PriorComparison
from ..callbacks.placement import without_copies
from ..callbacks.preemption import Preemption
from ..callbacks.records import write_whole
from ..callbacks.redact import redact
from ..callbacks.wandb_run import start
from ..sample.checkpoint import read_checkpoint
from .checkpoint import Checkpoint, newest_whole
from .errors import UsageError, innermost, sentence
from .fine_tune import FineTune
from .step import keep_freed_memory

LESS_MEMORY = (
    "lower data.init_args.train_batch_size and raise trainer.accumulate_grad_batches by as much, set "
    "model.gradient_checkpointing to true or trainer.precision to bf16-mixed, or add --config configs/lora.yaml or "
    "configs/fsdp.yaml"
)


class FitParser(LightningArgumentParser):
    """The parser that names the key at fault in one sentence, without pages of usage, and completes no half key."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(sentence(message, ex)) from ex


class SaveConfig(SaveConfigCallback):
    """config.yaml in the run's folder, whatever the logger, once everything else has passed its checks."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None: ...

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            config = self.parser.dump(self.config, skip_none=False)
            write_whole(File(trainer.default_root_dir) / "config.yaml", config)
            say_effective_batch(trainer)


def say_effective_batch(trainer: L.Trainer) -> None:
    """Prints and logs how many samples make a step of the optimiser."""
    loader: Any = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "sampler", None), "size", None)
    if size is None:
        return
    accumulated, processes = trainer.accumulate_grad_batches, trainer.world_size
    print(
        f"effective batch: {size * accumulated * processes} = {size} (train_batch_size) x {accumulated} "
        f"(accumulate_grad_batches) x {processes} (processes); train/loss is that of one process's last {size}, "
        "val/loss the mean over all"
    )
    for logger in trainer.loggers:
        logger.log_hyperparams({"effective_batch": size * accumulated * processes})


class FitCLI(LightningCLI):
    """LightningCLI with the one subcommand `fit`; with `run=False` it only builds what the config describes."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; torch's choice if absent")
        parser.add_argument("--tf32", type=bool, default=True, help="32-bit products on GPUs in TF32: quicker, rounded")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.enable_version_counter": False})
        parser.link_arguments(
            "trainer.default_root_dir", "checkpoint.dirpath", compute_fn=lambda root: f"{root}/checkpoints"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with _no_argv():
            super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        if self.subcommand and torch.cuda.is_available():  # not what exports, whose pictures are replayed bit for bit
            torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        elif self.subcommand:
            keep_freed_memory()
        root = config.trainer.default_root_dir
        if root is None:
            raise ValueError("trainer.default_root_dir must name the run's folder, which everything is written to")
        if self.subcommand and (File(root) / "config.yaml").exists() and not config.ckpt_path:
            raise ValueError(f"{root} holds a run already; choose a new trainer.default_root_dir, or --ckpt_path last")
        for logger in _loggers(config.trainer.logger):
            if logger.class_path.endswith("WandbLogger"):
                logger.init_args.save_dir = root
                logger.init_args.group = logger.init_args.group or File(root).name  # compare and export join it
                for words in ("name", "notes", "tags", "config"):
                    logger.init_args[words] = redact(logger.init_args[words])

    def _parse_ckpt_path(self) -> None:
        """Lightning would read hyperparameters from the checkpoint here; ours has none, the config has them all."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.insert(0, Preemption())  # type: ignore[attr-defined]
        return trainer

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PriorComparison):
                callback.priors = without_copies(callback.priors, self.model.model)

    def before_fit(self) -> None:
        if self.config_init[self.subcommand].ckpt_path == "last":
            newest = newest_whole(self.trainer.default_root_dir)
            self.config_init[self.subcommand].ckpt_path = newest and str(newest)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PriorComparison):
                callback.check(self.model.model)
        config = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        start(self.trainer.loggers, self.trainer.default_root_dir, yaml.safe_load(config))


def _loggers(config: Any) -> list[Any]:
    loggers = config if isinstance(config, list) else [config]
    return [logger for logger in loggers if hasattr(logger, "class_path")]


@contextmanager
def _no_argv() -> Iterator[None]:
    """LightningCLI warns of arguments both given and on the command line, which ours parsed first. No longer than that:
    Lightning starts further processes by this very command line."""
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = argv


def build(args: list[str] | dict[str, Any], run: bool) -> FitCLI:
    """The CLI object on these arguments, or on a whole config; `run`: fit at once."""
    quiet()
    try:
        return FitCLI(
            FineTune,
            L.LightningDataModule,
            save_config_callback=SaveConfig,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=FitParser,
            parser_kwargs={"prog": "priorguide", "description": "Fine-tunes a conditional diffusion model."},
            args=["fit", *args] if run else args,
            run=run,
        )
    except Exception as error:
        if (inner := innermost(error)) is error:
            raise
        raise inner from None


def fit(args: list[str]) -> FitCLI:
    """Trains as the arguments say; see `priorguide fit --help`."""
    try:
        return build(args, run=True)
    except UsageError as error:
        raise UsageError(
            f"{error} (`priorguide fit --options` lists all keys but those under init_args, which the configs show)"
        ) from error
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"out of memory: {LESS_MEMORY} ({str(error).split('. ')[0]})") from error
    except RuntimeError as error:
        if not re.search(r"closed by peer|reset by peer|Broken pipe|NCCL|process group", str(error)):
            raise
        raise ConnectionError(
            f"another process of this run has died, and says why itself; `--ckpt_path last` goes on from the last "
            f"checkpoint ({str(error).splitlines()[0]})"
        ) from error


def last_checkpoint(folder: str | File) -> File:
    """Where a fit leaves its last checkpoint."""
    return File(folder) / "checkpoints" / "last.ckpt"


def load_run(folder: str | File, checkpoint: str | File | None = None) -> tuple[FitCLI, dict[str, Any]]:
    """A finished or running fit from its folder: its objects with the checkpoint's weights, and the checkpoint.

    checkpoint: `checkpoints/last.ckpt` by default. ValueError names what is missing or cut short.
    """
    folder = File(folder)
    config = folder / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} is not a run: it has no config.yaml; give the default_root_dir of a fit")
    path = File(checkpoint) if checkpoint else last_checkpoint(folder)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    stored = yaml.safe_load(config.read_text())
    keys = ("seed_everything", "threads", "tf32", "trainer", "checkpoint", "model", "data")
    stored = {key: stored[key] for key in keys if key in stored}
    # One process on what this machine has, wherever the run was trained.
    stored["trainer"] |= {"logger": False, "accelerator": "auto", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    read_checkpoint(path)  # before all that takes time
    cli = build(stored, run=False)
    return cli, load_weights(cli, path)


def load_weights(cli: FitCLI, path: str | File) -> dict[str, Any]:
    """Puts a checkpoint's weights in the place of those that a `load_run` has; returns the checkpoint."""
    state = read_checkpoint(path)
    cli.model.on_load_checkpoint(state)
    cli.model.load_state_dict(state["state_dict"], strict=False)
    cli.model.eval()
    return state


def quiet() -> None:
    """Leaves out what Lightning says to newcomers on every start."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*litlogger.*")
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
