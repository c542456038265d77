"""A tiny fit that logs to W&B, with secrets planted in its config."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import wandb
import yaml

from priorguide.callbacks.wandb_run import finish

KEY = secrets.token_hex(20)
PLANTED = {
    "api_key": KEY,
    "webhook": f"https://robot:hunter2{secrets.token_hex(4)}@example.org/hook?room=3&access_token=t{secrets.token_hex(8)}",
    "headers": {"Authorization": f"Bearer b{secrets.token_hex(12)}"},
    "note": f"uses hf_{secrets.token_hex(16)} to download",
}
SECRETS = [
    KEY,
    PLANTED["webhook"].split("@")[0].split(":")[-1],
    PLANTED["webhook"].split("=")[-1],
    PLANTED["headers"]["Authorization"].split()[-1],
    PLANTED["note"].split()[1],
]
STEPS, ARMS, PICTURES = [2, 4, 6], ["none/1", "self/2", "base/2"], 3


class Notifier(L.Callback):
    """Somebody's own callback, with secrets among its arguments."""

    def __init__(self, api_key: str, webhook: str, headers: dict[str, str], note: str):
        pass


def write_config(file: Path, root: Path, logger: dict[str, Any]) -> Path:
    """The config of the fit into `root`, with these arguments of WandbLogger, written to the file."""
    create = "priorguide.sample.models.pixel.PixelUNet.create"
    small = {"resolution": 16, "fold": 4, "block_out_channels": [16, 32]}
    compare = {
        "priors": {"self": None, "base": {"class_path": create, "init_args": small}},
        "scales": [1.0, 2.0],
        "every_n_steps": 2,
        "num_conditions": 4,
        "num_pictures": PICTURES,
        "num_reference": 4,
        "sampler": {"scheduler": "ddim", "steps": 2},
        "metric_network": None,
        "rule": {"decide_by": "psnr", "guards": {}},
    }
    config = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS[-1],
            "default_root_dir": str(root),
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "log_every_n_steps": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": logger},
            "callbacks": [
                {"class_path": f"{__name__}.Notifier", "init_args": PLANTED},
                {"class_path": "priorguide.callbacks.comparison.PriorComparison", "init_args": compare},
            ],
        },
        "model": {
            "model": {"class_path": create, "init_args": {**small, "image_channels": 1}},
            "drop": [{"parts": ["image"], "probability": 0.1}],
            "ema_decay": 0.9,
        },
        "data": {
            "class_path": "priorguide.data.labelled.LabelledImages",
            "init_args": {
                "source": "fashion",
                "transform": "edges",
                "resolution": 16,
                "train_batch_size": 8,
                "max_train_samples": 48,
                "label_column": SECRETS[-1],  # unused by this source; it is in the bundle's provenance
            },
        },
    }
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


@contextmanager
def no_wandb_settings(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """Neither settings nor keys of the machine's, and none left behind."""
    for name in [*(name for name in os.environ if name.startswith("WANDB_")), "WANDB_MODE", "WANDB_DATA_DIR"]:
        patch.setenv(name, "")  # so that the name is restored, whatever is done to it
        patch.delenv(name)
    patch.setenv("NETRC", str(folder / "no-netrc"))
    wandb.teardown()
    yield
    finish()
    wandb.teardown()
