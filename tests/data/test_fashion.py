"""The embedded set and the IDX reader."""

import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path as File

import numpy as np
import pytest
import torch

from priorguide.data import fashion
from priorguide.data.fashion import build, read_idx, read_idx_pair, read_parquet

IDX = File(os.environ.get("FASHION_MNIST_IDX", "/usr/share/datasets/fashion-mnist"))  # where Debian puts it


def write_idx(path, array, kind=8):
    content = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_pair(folder, name, count, side=28, gz=True):
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
    labels = rng.integers(0, 10, count, dtype=np.uint8)
    end = ".gz" if gz else ""
    write_idx(folder / f"{name}-images-idx3-ubyte{end}", images)
    write_idx(folder / f"{name}-labels-idx1-ubyte{end}", labels)
    return images, labels


@pytest.mark.parametrize("gz", [True, False])
def test_idx_round_trip(tmp_path, gz):
    images, labels = write_pair(tmp_path, "train", 7, gz=gz)
    pixels, numbers = read_idx_pair(tmp_path, "train")
    assert pixels.shape == (7, 1, 28, 28) and pixels.dtype == torch.uint8 and numbers.dtype == torch.int64
    assert (pixels[:, 0].numpy() == images).all() and (numbers.numpy() == labels).all()


def test_idx_faults_are_named(tmp_path):
    path = tmp_path / "x"
    for content, message in [
        (b"", "must begin as an IDX file"),
        (b"\x89PNG\r\n", "must begin as an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "must begin as an IDX file"),  # floats
        (b"\x00\x00\x08\x03\x00\x00", "cut short"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", "must have 13 bytes for shape .5,., got 11"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x02abc", "must have 10 bytes"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(path)
    (tmp_path / "y.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"y\.gz is not readable"):
        read_idx(tmp_path / "y.gz")
    (tmp_path / "z.gz").write_bytes(gzip.compress(b"\x00\x00\x08\x01" * 500)[:-9])
    with pytest.raises(ValueError, match=r"z\.gz is not readable"):
        read_idx(tmp_path / "z.gz")


def test_pair_faults_are_named(tmp_path):
    with pytest.raises(ValueError, match="must hold train-images-idx3-ubyte or train-images-idx3-ubyte.gz"):
        read_idx_pair(tmp_path, "train")
    write_pair(tmp_path, "train", 4, gz=False)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="images must have shape"):
        read_idx_pair(tmp_path, "train")
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([1, 2, 3, 10], np.uint8))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 10\), found 10"):
        read_idx_pair(tmp_path, "train")


def test_build_writes_what_read_parquet_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "SHIPPED", {"train": ("train", 3, 8), "test": ("t10k", 0, 4)})
    images, labels = write_pair(tmp_path, "train", 9)
    write_pair(tmp_path, "t10k", 4)
    build(tmp_path, tmp_path / "out")
    pixels, numbers = read_parquet("train", tmp_path / "out")
    assert (pixels[:, 0].numpy() == images[3:8]).all() and numbers.tolist() == labels[3:8].tolist()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "splits.json",
        "test.parquet",
        "train.parquet",
    ]
    monkeypatch.setattr(fashion, "SHIPPED", {"train": ("train", 3, 10)})
    with pytest.raises(ValueError, match="at least 10 images, got 9"):
        build(tmp_path, tmp_path / "more")


def test_embedded_set():
    splits = json.loads((fashion.FOLDER / "splits.json").read_text())["splits"]
    for split in ("train", "test"):
        pixels, labels = read_parquet(split)
        assert pixels.shape == (5000, 1, 28, 28) and pixels.dtype == torch.uint8
        assert labels.min() == 0 and labels.max() == 9 and labels.bincount().min() > 400
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == splits[split]["pixels_sha256"]
    assert sum(path.stat().st_size for path in fashion.FOLDER.glob("*.parquet")) <= 6_000_000
    assert "Zalando" in (fashion.FOLDER / "LICENSE").read_text(encoding="utf-8")


def test_embedded_set_is_an_ordinary_data_set(tmp_path):
    import datasets

    files = {"train": str(fashion.FOLDER / "train.parquet")}
    rows = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))["train"]
    assert rows.features["label"].names == list(fashion.CLASS_NAMES)
    assert rows[0]["image"].size == (28, 28) and rows[0]["image"].mode == "L"


@pytest.mark.skipif(not IDX.is_dir(), reason="the IDX files are not here (Debian package dataset-fashion-mnist)")
def test_rebuilt_set_equals_the_shipped_one(tmp_path):
    build(IDX, tmp_path)
    for split in ("train", "test"):
        for rebuilt, shipped in zip(read_parquet(split, tmp_path), read_parquet(split), strict=True):
            assert torch.equal(rebuilt, shipped)
    ours, theirs = (json.loads((folder / "splits.json").read_text()) for folder in (tmp_path, fashion.FOLDER))
    assert ours == theirs


def test_command_reports_a_bad_folder_in_one_line(tmp_path):
    command = [sys.executable, "-m", "priorguide.data.fashion", "--idx", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))
