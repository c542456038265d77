"""Every kind of broken, odd or hostile picture in every data module: named and skipped up to a limit, or read."""

import io
import json
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from priorguide.data.clips import Clips
from priorguide.data.edits import EditPairs
from priorguide.data.labelled import LabelledImages
from priorguide.data.solids import look_from
from priorguide.data.views import ObjectViews

SIZE = 16


def encoded(kind, image=None, **options):
    (image or Image.new("RGB", (SIZE, SIZE), (200, 100, 50))).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def bomb(width=30_000, height=30_000):
    """A PNG of a few bytes that takes 2.7 GB once it is decoded."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(bytes(99)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
BAD = {
    "no bytes": b"",
    "no picture": b"hello",
    "cut short": encoded("JPEG", NOISE)[:1500],
    "bomb": bomb(),
    "strip": encoded("PNG", Image.new("L", (4000, 8))),
    "missing": None,
}
ODD = {
    "cmyk": encoded("JPEG", Image.new("CMYK", (20, 20), (10, 20, 30, 40))),
    "palette": encoded("PNG", Image.new("RGB", (20, 20), (1, 2, 3)).quantize(4)),
    "16 bits": encoded("PNG", Image.fromarray(np.full((20, 20), 40_000, np.uint16))),
    "animated": encoded("GIF", save_all=True, append_images=[NOISE.resize((SIZE, SIZE))] * 2),
    "large": encoded("JPEG", Image.new("RGB", (4000, 3000), (9, 9, 9))),
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


def labelled(folder, content, limit):
    paths = [folder / kind / f"{number}.png" for kind in ("cat", "dog") for number in range(4)]
    for path in paths:
        write(path, encoded("PNG"))
    options = {"resolution": SIZE, "channels": 3, "val_fraction": 0.1, "train_batch_size": 2, "max_bad_images": limit}
    data = LabelledImages(str(folder), **options)
    data.setup()
    write(bad := data.splits.train.pictures[int(data.splits.train.rows[0])], content)
    return data, bad


def edits(folder, content, limit):
    lines = []
    for number in range(8):
        names = [f"{side}/{number}.png" for side in ("input", "edited")]
        for name in names:
            write(folder / name, encoded("PNG"))
        lines.append({"input_file_name": names[0], "edited_file_name": names[1], "text": "edit"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = EditPairs(str(folder), resolution=SIZE, val_fraction=0.1, train_batch_size=2, max_bad_images=limit)
    data.setup()
    row = int(data.splits.train.rows[0])
    write(bad := folder / "edited" / f"{row}.png", content)
    return data, bad


def views(folder, content, limit):
    for thing in range(4):
        for view in range(3):
            write(folder / f"{thing}" / f"{view:03d}.png", encoded("PNG"))
            np.save(folder / f"{thing}" / f"{view:03d}.npy", look_from(1 + view / 9, view, 2))
    data = ObjectViews(str(folder), resolution=SIZE, train_batch_size=2, max_bad_images=limit)
    data.setup()
    write(bad := data.splits.train.pictures[0], content)
    return data, bad


def clips(folder, content, limit):
    for number in range(6):
        for frame in range(2):
            write(folder / f"clip {number}" / f"{frame}.png", encoded("PNG"))
        (folder / f"clip {number}.txt").write_text("a clip")
    data = Clips(str(folder), resolution=SIZE, frames=2, train_batch_size=2, max_bad_clips=limit)
    data.setup()
    clip, _ = data.splits.train.listing.pictures[int(data.splits.train.rows[0])]
    write(clip / "1.png", content)
    return data, clip


MODULES = [labelled, edits, views, clips]


def epoch(data):
    return [len(batch["pixels"]) for batch in data.train_dataloader()]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_and_skipped_up_to_the_limit(tmp_path, module, kind, caplog):
    data, bad = module(tmp_path / "some", BAD[kind], 1)
    with caplog.at_level(logging.WARNING):
        assert set(epoch(data)) == {2}, "batches keep their size"
    assert caplog.text.count("skipped an unreadable") == 1 and str(bad) in caplog.text
    data, bad = module(tmp_path / "none", BAD[kind], 0)
    with pytest.raises(ValueError, match="at most 0 (picture|clip)s may be unreadable") as caught:
        epoch(data)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_file_is_read(tmp_path, module, kind, caplog):
    data, _ = module(tmp_path, ODD[kind], 0)
    assert set(epoch(data)) == {2} and "skipped" not in caplog.text
