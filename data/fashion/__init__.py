"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): the subset that ships with the package, and its IDX files.

    python -m priorguide.data.fashion --idx FOLDER --out FOLDER

rebuilds the subset from the four original files (plain or .gz), which Debian's package dataset-fashion-mnist also has.
Who may see which images: the base 0-40,000 of the training file, fine-tuning 40,000-45,000, the metric's classifier
45,000-60,000; evaluation has the test file.
"""

import gzip
import hashlib
import io
import json
import os
from pathlib import Path as File

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FOLDER = File(__file__).parent
SHIPPED = {"train": ("train", 40_000, 45_000), "test": ("t10k", 0, 5_000)}
"""Split: the IDX file it is cut from, first index, index after the last. The order is the original's."""


def read_idx(path: str | File) -> np.ndarray:
    """An IDX file of bytes, plain or gzip, as uint8 of the shape in its header. ValueError names a bad file."""
    path = File(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is not readable: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or not 1 <= content[3] <= 4:
        raise ValueError(
            f"{path} must begin as an IDX file of bytes (00 00 08, dimensions), got {content[:4].hex(' ')}"
        )
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist()) if len(content) >= start else ()
    expected = start + int(np.prod(shape, dtype=np.int64))
    if not shape or len(content) != expected:
        raise ValueError(f"{path} must have {expected} bytes for shape {shape}, got {len(content)}: is it cut short?")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_idx_pair(folder: str | File, name: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, H, W) uint8 and labels (N,) int64 in [0, 10) of "train" or "t10k". ValueError names a fault."""
    paths = {}
    for kind in ("images-idx3", "labels-idx1"):
        plain = File(folder) / f"{name}-{kind}-ubyte"
        found = [path for path in (plain, plain.with_name(plain.name + ".gz")) if path.is_file()]
        if not found:
            raise ValueError(f"{folder} must hold {plain.name} or {plain.name}.gz, found neither")
        paths[kind] = found[0]
    images, labels = (read_idx(path) for path in paths.values())
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: {name} images must have shape (N, H, W) and labels (N,), got {images.shape} and {labels.shape}"
        )
    if labels.size and labels.max() >= len(CLASS_NAMES):
        raise ValueError(f"{paths['labels-idx1']}: labels must be in [0, {len(CLASS_NAMES)}), found {labels.max()}")
    return torch.tensor(images)[:, None], torch.tensor(labels, dtype=torch.int64)


def read_parquet(split: str, folder: str | File = FOLDER) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) uint8 and labels (N,) int64 of the "train" or "test" file that `build` wrote."""
    import datasets
    import pyarrow.parquet

    rows = datasets.Dataset(pyarrow.parquet.read_table(File(folder) / f"{split}.parquet"))
    rows = rows.cast_column("image", datasets.Image(decode=False)).with_format(None)
    images = [np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in rows["image"]]
    return torch.from_numpy(np.stack(images))[:, None], torch.tensor(rows["label"][:])


def build(idx: str | File, out: str | File) -> dict[str, int]:
    """Write train.parquet, test.parquet, splits.json to `out` from the IDX files in `idx`; bytes per parquet file."""
    import datasets

    out = File(out)
    out.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))})
    sizes, facts = {}, {}
    for split, (name, start, stop) in SHIPPED.items():
        images, labels = read_idx_pair(idx, name)
        if len(images) < stop:
            raise ValueError(f"{idx}: {name} must have at least {stop} images, got {len(images)}")
        cells = [{"bytes": _png(image), "path": None} for image in images[start:stop, 0].numpy()]
        rows = datasets.Dataset.from_dict({"image": cells, "label": labels[start:stop].tolist()}, features=features)
        path = out / f"{split}.parquet"
        rows.to_parquet(temporary := path.with_suffix(".tmp"))
        os.replace(temporary, path)
        sizes[split] = path.stat().st_size
        facts[split] = {
            "file": f"{name}-images-idx3-ubyte",
            "first": start,
            "last": stop - 1,
            "pixels_sha256": hashlib.sha256(images[start:stop].numpy().tobytes()).hexdigest(),
        }
    record = {
        "command": "python -m priorguide.data.fashion --idx FOLDER --out FOLDER",
        "seed": None,  # nothing is drawn: the images keep their original order
        "splits": facts,
        "kept_apart": {"base": "train 0:40000", "classifier": "train 45000:60000"},
    }
    (temporary := out / "splits.tmp").write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, out / "splits.json")
    return sizes


def _png(image: np.ndarray) -> bytes:
    Image.fromarray(image).save(file := io.BytesIO(), "PNG", optimize=True)
    return file.getvalue()
