"""Comparisons of clips: panels, animations, the page, W&B, files."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from test_report import Page, a_record
from wandb_fit import no_wandb_settings
from wandb_reader import read_log

from priorguide.callbacks.gallery import BUDGET
from priorguide.callbacks.panels import GAP, STRIP, STRIP_SIDE, animated_panel, panel, strip
from priorguide.callbacks.records import shown, write_comparison
from priorguide.callbacks.report import write_report
from priorguide.callbacks.wandb_log import log_comparison
from priorguide.callbacks.wandb_run import finish, start
from priorguide.sample.evaluate import Evaluation
from priorguide.sample.pictures import to_uint8
from priorguide.train.sampling import write_pictures

FRAMES = 7


def some_clips(count=2, side=16, step=0.1):
    """Clips (count, 3, 7, side, side) whose frames are of one grey each: `step` brighter with each frame."""
    grey = step * torch.arange(FRAMES) + 0.05 * torch.arange(count)[:, None] + 0.1
    return grey.reshape(count, 1, FRAMES, 1, 1).expand(-1, 3, -1, side, side).clamp(0, 1)


def a_batch(count=2):
    clips = some_clips(count)
    return {
        "pixels": clips,
        "image": clips[:, :, 0],
        "text": [f"clip {i}" for i in range(count)],
        "fps": torch.full((count,), 10.0),
        "frame_stride": torch.ones(count, dtype=torch.int64),
    }


def an_evaluation(count=2):
    return Evaluation({("self", (2.0,)): some_clips(count, step=0.05), ("base", (2.0,)): some_clips(count)}, {})


def test_a_strip_shows_frames_evenly_from_first_to_last():
    found = strip(some_clips())
    assert found.shape == (2, 3, 16, STRIP * 17 - 1)
    for place, frame in enumerate((0, 2, 4, 6)):
        assert torch.equal(found[:, :, :, 17 * place : 17 * place + 16], some_clips()[:, :, frame])
    assert (found[..., 16::17] == 1).all()
    assert strip(some_clips()[:, :, :2]).shape[-1] == 2 * 17 - 1


def test_a_panel_of_clips_has_a_strip_in_each_cell():
    batch, arms = a_batch(), {"self": some_clips(step=0.05), "base": some_clips()}
    image = np.asarray(panel(batch["image"], arms, batch["pixels"], zoom=2))
    wide, gap = 2 * (STRIP * 17 - 1), 4 * GAP
    top = image.shape[0] - 2 * (32 + GAP)
    assert image.shape[1] == GAP + (32 + gap) + 3 * (wide + gap)
    for r in range(2):
        y = top + r * (32 + GAP)
        cells = [batch["image"][r, 0, 0, 0], *(arm[r, 0, 6, 0, 0] for arm in (*arms.values(), batch["pixels"]))]
        ends = [GAP + 32 + c * (gap + wide) for c in range(4)]
        for value, end in zip(cells, ends, strict=True):  # the last pixels of each cell are those of the last frame
            assert (image[y : y + 32, end - 32 : end] == to_uint8(value.reshape(1, 1, 1))).all()
            assert (image[y : y + 32, end : end + gap] == 255).all()


def test_large_clips_are_shrunk_in_panels():
    image = panel(None, {"self": torch.rand(1, 3, 5, 100, 2 * STRIP_SIDE)})
    assert image.width == GAP + STRIP * (STRIP_SIDE + 1) - 1 + 4 * GAP


def test_an_animated_panel_plays_all_clips_at_once():
    batch, arms = a_batch(), {"short": some_clips()[:, :, :3], "long": some_clips(side=8)}
    frames = animated_panel(batch["image"], arms, None, ["a", "b"])
    assert len(frames) == FRAMES and len({frame.size for frame in frames}) == 1
    width, height = frames[0].size
    lefts = [width - (3 - c) * (96 + GAP) + 48 for c in range(3)]  # the middles of the columns
    for number, frame in enumerate(frames):
        greys = [frame.getpixel((x, height - 50))[0] for x in lefts]
        expected = [batch["image"][1], arms["short"][1, :, min(number, 2)], arms["long"][1, :, number]]
        assert greys == [to_uint8(picture)[0, 0, 0] for picture in expected]


def test_clips_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="self must be pictures"):
        panel(None, {"self": torch.zeros(2, 4, 5, 8, 8)})
    with pytest.raises(ValueError, match="target must be pictures"):
        panel(None, {"self": some_clips()}, some_clips(3))


def test_a_comparison_leaves_a_panel_and_an_animation(tmp_path):
    batch = a_batch(8)
    assert shown(batch, "pixels").ndim == 5 and shown(batch, "image").ndim == 4 and shown(batch, "fps") is None
    write_comparison(tmp_path, 3, an_evaluation(8), batch)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["metrics.jsonl", "panel-00000003.gif", "panel-00000003.png", "pictures.safetensors"]
    with Image.open(tmp_path / names[1]) as played, Image.open(tmp_path / names[2]) as panel:
        assert played.n_frames == FRAMES and played.info["duration"] == 100
        assert played.height < panel.height  # the first six of eight


def test_clips_play_in_the_page(tmp_path):
    batch = a_batch(8)
    pictures = {
        "condition": batch["image"],
        "target": batch["pixels"],
        "caption": batch["text"],
        "fps": batch["fps"],
        "candidates": {"self, scale 2": some_clips(8, step=0.05), "base, scale 2": some_clips(8)},
    }
    page = Page(write_report(tmp_path, a_record(), pictures).read_text())
    by_name = {attrs["alt"]: attrs["src"] for attrs in page.all("img") if ": clip" in attrs["alt"]}
    assert len(by_name) == 8 * 4 and len(page.all("source")) == 8 * 3
    assert by_name["condition: clip 0"].startswith("data:image/png;base64,")
    kind, data = by_name["self, scale 2: clip 1"].split(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as played:
        assert (kind, played.n_frames, played.size) == ("data:image/webp;base64", FRAMES, (16, 16))
        played.seek(6)
        played.load()
        assert played.info["duration"] == 100
        expected = to_uint8(pictures["candidates"]["self, scale 2"][1, :, 6]).astype(int)
        assert np.abs(np.asarray(played.convert("RGB")) - expected).max() < 8
    for attrs in page.all("source"):
        assert attrs["media"] == "(prefers-reduced-motion: reduce)"
        with Image.open(io.BytesIO(base64.b64decode(attrs["srcset"].split(",")[1]))) as still:
            assert getattr(still, "n_frames", 1) == 1 and still.width > 3 * still.height
    assert "Clips play compressed" in page.text


def test_large_clips_are_shrunk_to_keep_the_page_small(tmp_path):
    noise = torch.rand(8, 3, FRAMES, 160, 160, generator=torch.Generator().manual_seed(0))
    file = write_report(tmp_path, a_record(), {"candidates": {"self": noise, "base": noise.flip(0)}})
    page = Page(file.read_text())
    sizes = sum(
        len(attrs.get("src") or attrs.get("srcset", "")) for name in ("img", "source") for attrs in page.all(name)
    )
    assert sizes < 1.01 * BUDGET and file.stat().st_size < 5_000_000
    assert "of 160 pixels" in page.text


def test_clips_reach_wandb_as_animations(tmp_path, monkeypatch):
    with no_wandb_settings(monkeypatch, tmp_path):
        logger = WandbLogger(save_dir=tmp_path, offline=True)
        start([logger], tmp_path, {})
        log_comparison([logger], 3, an_evaluation(), a_batch())
        finish()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    log = read_log(folder)
    logged = {key: value for row in log.history for key, value in row.items()}
    assert {key for key in logged if key.startswith("pictures/")} == {
        f"pictures/{prior}/2/{i:02d}" for prior in ("self", "base") for i in range(2)
    }
    with Image.open(folder / "files" / logged["pictures/self/2/01"]["path"]) as played:
        assert (played.format, played.n_frames, played.info["duration"]) == ("GIF", FRAMES, 100)
        played.seek(6)
        expected = to_uint8(some_clips(step=0.05)[1, :, 6]).astype(int)
        assert np.abs(np.asarray(played.convert("RGB")) - expected).max() <= 2
    [artifact] = log.artifacts["run_table"]
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    table = json.loads(next(file for name, file in files.items() if name.endswith(".table.json")).read_text())
    assert table["columns"] == ["index", "text", "fps", "frame_stride", "condition", "self/2", "base/2", "target"]
    cells = dict(zip(table["columns"], table["data"][1], strict=True))
    for column, kind in (("target", "GIF"), ("condition", "PNG")):
        with Image.open(files[cells[column]["path"]]) as shown_there:
            assert shown_there.format == kind


@pytest.mark.parametrize("fps", [None, torch.tensor([5.0, 5.0, 20.0, 20.0])])
def test_sampled_clips_in_a_folder(tmp_path, monkeypatch, fps):
    monkeypatch.setattr("priorguide.sample.pictures.find_spec", lambda name: None)
    write_pictures(tmp_path, some_clips(4), [3, 3, 9, 9], 2, fps)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"{i:04d}-seed-{seed}.gif" for i, seed in enumerate([3, 3, 9, 9])), "grid.gif"]
    lasting = []
    for name in names:
        with Image.open(tmp_path / name) as played:
            assert played.n_frames == FRAMES
            lasting.append(played.info["duration"])
    assert lasting == ([120] * 5 if fps is None else [200, 200, 50, 50, 200])
