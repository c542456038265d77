"""What the tests of the command line share: the project's configs cut down to a few seconds, and data for them."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

CONFIGS = Path(__file__).parent.parent / "configs"
SYSTEMS = sorted(path.stem.removesuffix("_offline") for path in CONFIGS.glob("*_offline.yaml"))
"""Of published models, whose configs also run offline on tiny ones."""


def configs(*names: str) -> list[str]:
    """The arguments that lay these configs of the project over one another."""
    return [word for name in names for word in ("--config", str(CONFIGS / f"{name}.yaml"))]


def write_idx(folder: Path, train: int = 40, test: int = 40) -> Path:
    """The four IDX files of `train` and `test` grey 28x28 pictures of ten classes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        pictures = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = b"\x00\x00\x08\x03" + np.array(pictures.shape, ">u4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pictures.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = b"\x00\x00\x08\x01" + np.array(labels.shape, ">u4").tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return folder


def small(config: Path, root: Path, base: Path, idx: Path | None = None) -> dict[str, Any]:
    """A config of the project's, cut down to two quick steps in `root`, from `base` in place of the shipped one."""
    content = yaml.safe_load(config.read_text().replace("fashion-base", str(base)))
    options = content["trainer"]
    options |= {"default_root_dir": str(root), "max_steps": 2, "limit_val_batches": 1, "logger": False}
    options |= {"val_check_interval": None, "enable_progress_bar": False, "enable_model_summary": False}
    kept = []
    for callback in options["callbacks"]:
        if callback["class_path"].endswith("PriorComparison"):
            callback["init_args"] |= {"num_conditions": 20, "num_pictures": 2, "num_reference": 20, "every_n_steps": 2}
            callback["init_args"]["sampler"]["steps"] = 2
        if not callback["class_path"].endswith("ProgressBar"):
            kept.append(callback)
    options["callbacks"] = kept
    content["checkpoint"]["every_n_train_steps"] = 2
    content["threads"] = 1
    data = content["data"].setdefault("init_args", {})
    data["train_batch_size"] = 8
    if idx is not None:
        data |= {"source": f"idx:{idx}", "max_train_samples": None, "train_range": None}
    return content
