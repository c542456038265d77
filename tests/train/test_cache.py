"""Training on encoded samples is training on the data: the same batches, the same end, and never on what is stale."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fits import same, seed, trainer, weights
from interrupted import fit, held, make_pictures
from PIL import Image
from runs import CONFIGS

from priorguide.data import cache as data_cache
from priorguide.data.cache import Cache
from priorguide.data.clips import Clips
from priorguide.data.edits import EditPairs
from priorguide.data.labelled import LabelledImages
from priorguide.data.views import ObjectViews
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dynamicrafter import DynamiCrafter
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.zero123 import Zero123
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop

SMALL = {"max_train_samples": 20, "max_val_samples": 4, "train_batch_size": 4}


def edits(folder: Path | None, variants: int = 1, **options) -> EditPairs:
    cache = folder and Cache(str(folder), variants)
    return EditPairs(**{"source": "fashion", "resolution": 16, "cache": cache, **SMALL, **options})


def encode(model, data, folder: Path) -> FineTune:
    """What `priorguide cache` does."""
    tune = FineTune(model, ema_decay=0)
    trainer(folder, 0).fit(tune, datamodule=data)
    return tune


def tuned(data, folder: Path) -> FineTune:
    seed()
    drop = [Drop(("text",), 0.3), Drop(("text", "image"), 0.3)]
    tune = FineTune(InstructPix2Pix.tiny(), drop=drop, learning_rate=1e-3, ema_decay=0.9)
    trainer(folder, 6).fit(tune, datamodule=data)  # 5 steps an epoch
    return tune


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(data_cache, "SHARD_ROWS", 8)


@pytest.fixture
def cached(tmp_path) -> Path:
    """The cache of `edits`, in three shards."""
    encode(InstructPix2Pix.tiny(), edits(tmp_path / "cache"), tmp_path)
    return tmp_path / "cache"


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.iterdir())}


# --- equal


def test_training_with_a_cache_equals_training_without(tmp_path):
    """Posterior noise, times, noise and drop-out are drawn anew at every step, and are the same draws."""
    plain, tune = tuned(edits(None), tmp_path), tuned(edits(tmp_path / "cache"), tmp_path)
    for network in ("model.network", "average"):
        expected, found = (weights(t.get_submodule(network)) for t in (plain, tune))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert tune.model.vae is None and tune.model.text_encoder is None
    with tune.averaged() as model:
        condition = model.encode_condition(edits(None).held_out(2))
        assert model.decode(model.draw(torch.zeros(2, 4, 8, 8))).shape == (2, 3, 16, 16)
        assert not model.vae.training and condition["text"].shape[0] == 2
    assert tune.model.vae is None


@pytest.mark.parametrize("kind", ["flips", "crops", "views", "clips", "labels"])
def test_a_cached_batch_is_a_fresh_one_encoded(kind, tmp_path):
    """Variant v is what epoch v would have drawn, in the same order."""
    model, make, options = {
        "flips": (InstructPix2Pix, EditPairs, {"source": "fashion", "random_flip": True}),
        "crops": (InstructPix2Pix, EditPairs, {"source": str(pairs(tmp_path / "pairs")), "center_crop": False}),
        "views": (Zero123, ObjectViews, {}),
        "clips": (DynamiCrafter, Clips, {"frames": 4, "frame_stride": [1, 2], "condition_frame": "random"}),
        "labels": (DiT, LabelledImages, {"channels": 1, "resolution": 8, "num_classes": 10}),
    }[kind]
    model = model.tiny().eval()
    if kind == "labels":
        model = DiT.create(input_size=8, num_classes=10, channels=1, width=16, depth=1, num_heads=2).eval()
    options = {"resolution": 16, **options, **SMALL, "max_train_samples": 8}
    variants = 1 if kind == "labels" else 2
    data, plain = make(**options, cache=Cache(str(tmp_path / "cache"), variants)), make(**options)
    tune = encode(model, data, tmp_path)
    found, fresh = data.train_dataloader(), plain.train_dataloader()
    for epoch in (0, 1, 2, 3):
        found.sampler.set_epoch(epoch)
        fresh.sampler.set_epoch(epoch)
        with tune.averaged() as model:
            model.training = False
            batches = list(zip(found, fresh, strict=True))
            assert len(batches) == 2
            for one, other in batches if epoch < variants or variants == 1 else ():
                (x_0, condition), (expected_x_0, expected) = model.encode(one), model.encode(other)
                torch.testing.assert_close(x_0, expected_x_0, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(condition, expected, rtol=1e-3, atol=1e-4)


def pairs(folder: Path) -> Path:
    """Pairs that are wider than high."""
    folder.mkdir()
    generator, lines = np.random.default_rng(0), []
    for number in range(12):
        for name in ("input", "edited"):
            pixels = generator.integers(0, 256, (16, 24 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{number}.png")
        row = {"input_image": f"input{number}.png", "edited_image": f"edited{number}.png", "edit": f"edit {number}"}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_run_on_a_cache_that_crashed_ends_as_the_undisturbed_one(tmp_path):
    from test_resume import Crash

    pictures, cache = make_pictures(tmp_path / "pictures"), Cache(str(tmp_path / "cache"), 2)
    fit(pictures, tmp_path / "whole", cache=cache, workers=0)
    with pytest.raises(RuntimeError, match="crash"):
        fit(pictures, tmp_path / "crashed", callbacks=(Crash(9),), cache=cache, workers=1)
    fit(pictures, tmp_path / "crashed", resume=True, cache=cache, workers=0)
    assert same(held(tmp_path / "crashed"), held(tmp_path / "whole"))


# --- faults


def test_a_killed_or_torn_cache_is_completed(cached, tmp_path):
    whole, names = times(cached), sorted(times(cached))
    assert names == ["cache.json", *(f"samples-{n:05d}.safetensors" for n in range(3))]
    second, last = cached / names[2], cached / names[3]
    content = second.read_bytes()
    last.unlink()
    second.write_bytes(content[:-10])
    encode(InstructPix2Pix.tiny(), edits(cached), tmp_path)
    after = times(cached)
    assert sorted(after) == names and second.read_bytes() == content
    assert [name for name in names if after[name] == whole[name]] == names[:2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolution": 8}, "pictures.resolution 16, now 8"),
        ({"random_flip": True}, "pictures.random_flip None, now True"),
        ({"max_train_samples": 16}, "rows 20, now 16"),
        ({"seed": 1}, "other data"),
        ({"variants": 2, "random_flip": True}, "variants 1, now 2"),
    ],
)
def test_a_cache_of_other_data_is_refused(cached, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        encode(InstructPix2Pix.tiny(), edits(cached, **change), tmp_path)


def test_a_cache_of_another_encoder_or_file_is_refused(cached, tmp_path):
    model = InstructPix2Pix.tiny()
    model.text_encoder.get_parameter("final_layer_norm.weight").data[0] += 1e-3
    with pytest.raises(
        ValueError, match=r"encoded from something else \(other encoders\): choose another cache.folder"
    ):
        encode(model, edits(cached), tmp_path)
    folder = pairs(tmp_path / "pairs")
    options = {"source": str(folder), **SMALL, "max_train_samples": None}
    encode(InstructPix2Pix.tiny(), edits(tmp_path / "files", **options), tmp_path)
    os.utime(folder / "input3.png", (0, 0))
    with pytest.raises(ValueError, match="other data"):
        encode(InstructPix2Pix.tiny(), edits(tmp_path / "files", **options), tmp_path)


def test_variants_of_data_that_draw_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="set cache.variants to 1, not 2"):
        encode(InstructPix2Pix.tiny(), edits(tmp_path / "cache", 2), tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.png").write_text("mine")
    with pytest.raises(ValueError, match="must be new, empty or a cache"):
        encode(InstructPix2Pix.tiny(), edits(tmp_path), tmp_path / "run")


def test_a_disk_that_fills_up_while_encoding(tmp_path, monkeypatch):
    number, replace = iter(range(9)), os.replace

    def full(source, target):
        if str(target).endswith("safetensors") and next(number) == 1:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        encode(InstructPix2Pix.tiny(), edits(tmp_path / "cache"), tmp_path)
    assert sorted(times(tmp_path / "cache")) == ["cache.json", "samples-00000.safetensors"]


def test_a_shard_that_goes_missing_is_named(cached):
    (cached / "samples-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="samples-00001.safetensors is not there or damaged: run the same command"):
        list(edits(cached).train_dataloader())


# --- the command itself


def command(folder: Path, name: str, *more: str, devices: int = 1) -> list[str]:
    configs = [f"{CONFIGS / name}.yaml" for name in ("instruct_pix2pix", "instruct_pix2pix_offline")]
    arguments = ["--config", configs[0], "--config", configs[1], "--trainer.devices", str(devices)]
    arguments += ["--data.init_args.cache.folder", str(folder), "--data.init_args.cache.variants", "2", *more]
    return [sys.executable, "-m", "priorguide.train.cli", name, *arguments]


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_where_they_were(tmp_path):
    folder = tmp_path / "cache"
    more = ("--data.init_args.max_train_samples", "1500", "--trainer.strategy", "ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    encoding = command(folder, "cache", *more, devices=2)
    with subprocess.Popen(encoding, env=environment, start_new_session=True) as run:
        while len(list(folder.glob("samples-*"))) < 3 and run.poll() is None:
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGKILL)
    before = {name: at for name, at in times(folder).items() if not name.startswith(".")}
    done = subprocess.run(encoding, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    shards = -(-1500 // 256) * 2
    left = shards - len(before) + 1
    assert left > 0 and len(list(folder.glob("samples-*"))) == shards
    assert before.items() <= times(folder).items() and "of 3000 training samples" in done.stdout
    assert f"cache: {folder} is whole, 1500 rows x 2" in done.stdout
