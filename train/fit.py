"""`priorguide fit`: LightningCLI over FineTune and any data module."""

import logging
import netrc
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any

import lightning as L
import torch
import yaml

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from .checkpoint import Checkpoint
from .fine_tune import FineTune


class FitCLI(LightningCLI):
    """LightningCLI with the one subcommand `fit`; with `run=False` it only builds what the config describes."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; torch's own choice if absent")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.enable_version_counter": False})
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=lambda root: f"{root}/checkpoints")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        root = config.trainer.default_root_dir
        if root is None:
            raise ValueError("trainer.default_root_dir must name the run's folder, which everything is written to")
        if self.subcommand and (File(root) / "config.yaml").exists() and not config.ckpt_path:
            raise ValueError(f"{root} holds a run already; choose a new trainer.default_root_dir, or --ckpt_path last")
        for logger in _loggers(config.trainer.logger):
            if logger.class_path.endswith("WandbLogger"):
                logger.init_args.save_dir = root
                logger.init_args.offline = logger.init_args.offline or not has_wandb_key()


def _loggers(config: Any) -> list[Any]:
    loggers = config if isinstance(config, list) else [config]
    return [logger for logger in loggers if hasattr(logger, "class_path")]


def has_wandb_key() -> bool:
    """Whether W&B would find a key: WANDB_API_KEY, or a netrc entry; WANDB_MODE can still forbid its use."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextmanager
def _no_argv() -> Iterator[None]:
    """LightningCLI warns of arguments both given and on the command line, which ours parsed first."""
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = argv


def build(args: Sequence[str] | dict[str, Any], run: bool) -> FitCLI:
    """The CLI object on these arguments, or on a whole config; `run`: fit at once."""
    quiet()
    with _no_argv():
        return FitCLI(
            FineTune,
            L.LightningDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "priorguide", "description": "Fine-tunes a conditional diffusion model."},
            args=["fit", *args] if run else args,
            run=run,
        )


def fit(args: Sequence[str]) -> FitCLI:
    """Trains as the arguments say; see `priorguide fit --help`."""
    return build(args, run=True)


def load_run(folder: str | File, checkpoint: str | File | None = None) -> tuple[FitCLI, dict[str, Any]]:
    """A finished or running fit from its folder: its objects with the checkpoint's weights, and the checkpoint.

    checkpoint: `checkpoints/last.ckpt` by default. ValueError names what is missing or cut short.
    """
    folder = File(folder)
    config = folder / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} is not a run: it has no config.yaml; give the default_root_dir of a fit")
    path = File(checkpoint) if checkpoint else folder / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    stored = yaml.safe_load(config.read_text())
    stored = {key: stored[key] for key in ("seed_everything", "threads", "trainer", "checkpoint", "model", "data")}
    stored["trainer"]["logger"] = False
    cli = build(stored, run=False)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a whole checkpoint ({type(error).__name__}); use an earlier one") from error
    cli.model.on_load_checkpoint(state)
    cli.model.load_state_dict(state["state_dict"], strict=False)
    cli.model.eval()
    return cli, state


def quiet() -> None:
    """Leaves out what Lightning says to newcomers on every start."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*litlogger.*")
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
