"""Training on encoded samples is training on the data: the same batches, the same end, and never on what is stale."""

import json
import os
import shutil
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

from priorguide.callbacks.preemption import Preempted
from priorguide.data import cache as data_cache
from priorguide.data.buckets import Buckets
from priorguide.data.cache import Cache
from priorguide.data.clips import Clips
from priorguide.data.edits import EditPairs
from priorguide.data.labelled import LabelledImages
from priorguide.data.views import ObjectViews
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dynamicrafter import DynamiCrafter
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.zero123 import Zero123
from priorguide.train.caching import Encoders, _claim, _made_before, made_from
from priorguide.train.cli import main
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


FLIPPED = {"random_flip": True}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def filled(folder: Path, variants: int, tmp_path: Path) -> dict[str, bytes]:
    encode(InstructPix2Pix.tiny(), edits(folder, variants, **FLIPPED), tmp_path)
    return contents(folder)


def test_more_variants_later_are_those_made_at_once(tmp_path, capsys):
    whole, folder = filled(tmp_path / "whole", 3, tmp_path), tmp_path / "cache"
    first = filled(folder, 1, tmp_path)
    before = times(folder)
    capsys.readouterr()
    assert filled(folder, 3, tmp_path) == whole
    assert "cache: encoding 40 of 60 training samples" in capsys.readouterr().out
    shards = [name for name in first if name != "cache.json"]
    assert len(shards) == 3 and all(times(folder)[name] == before[name] for name in shards)


def test_fewer_variants_later_are_the_first_of_them(tmp_path, capsys):
    folder = tmp_path / "cache"
    filled(folder, 3, tmp_path)
    before = times(folder)
    capsys.readouterr()
    filled(folder, 2, tmp_path)
    assert times(folder) == before and "encoding" not in capsys.readouterr().out
    found = edits(folder, 2, **FLIPPED).encoded().__getitems__([(2, 5), (3, 5)])["posterior"]
    wanted = edits(folder, 3, **FLIPPED).encoded().__getitems__([(0, 5), (1, 5)])["posterior"]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("when", ["manifest", "shard"])
def test_a_cache_that_was_killed_while_it_was_given_more_variants(tmp_path, monkeypatch, when):
    """Before its manifest names them, or after, with one of their shards there: with more and with fewer it goes on."""
    whole, folder, replace = filled(tmp_path / "whole", 3, tmp_path), tmp_path / "cache", os.replace
    first = filled(folder, 1, tmp_path)

    class Killed(BaseException):
        """Nothing after it runs, as after a SIGKILL, but for what Python itself unwinds."""

    def killed(source, target):
        name = Path(target).name
        if name == "cache.json" and when == "manifest" or name == "samples-00004.safetensors":
            os.link(source, folder / Path(source).name.replace(str(os.getpid()), "1"))  # what was written aside stays
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        filled(folder, 3, tmp_path)
    assert (json.loads((folder / "cache.json").read_text())["variants"] == 1) == (when == "manifest")
    left = [path for path in folder.iterdir() if path.name.startswith(".")]
    assert len(left) == 1
    assert first.items() - {("cache.json", first["cache.json"])} <= filled(folder, 1, tmp_path).items()
    os.utime(left[0], (0, 0))  # long ago: nobody writes on at it
    assert filled(folder, 3, tmp_path) == whole


def test_a_cache_that_was_killed_at_its_manifest(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".cache.json.1").write_text("{")
    assert "samples-00002.safetensors" in filled(tmp_path / "cache", 1, tmp_path)


@pytest.mark.parametrize("variants", ["1", 1.5, None, []])
def test_a_manifest_of_no_number_of_variants_is_refused(cached, tmp_path, variants):
    made = json.loads((cached / "cache.json").read_text())
    (cached / "cache.json").write_text(json.dumps(made | {"variants": variants}))
    with pytest.raises(ValueError, match="encoded from something else"):
        encode(InstructPix2Pix.tiny(), edits(cached), tmp_path)


# --- SIGTERM


@pytest.fixture
def terminated(monkeypatch):
    """A SIGTERM as the nth batch is encoded; how many were."""
    make, seen = InstructPix2Pix.posterior, []

    def at(number: int) -> list[int]:
        def posterior(self, pixels):
            seen.append(len(pixels))
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return make(self, pixels)

        monkeypatch.setattr(InstructPix2Pix, "posterior", posterior)
        return seen

    return at


def test_sigterm_while_a_fit_encodes_stops_at_the_next_batch(cached, tmp_path, terminated, capsys):
    """Two batches of four make a shard: the third is in the second one, which is lost."""
    folder, seen = tmp_path / "other", terminated(3)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as stop:
        tuned(edits(folder), tmp_path)
    assert stop.value.code == 75 and signal.getsignal(signal.SIGTERM) == before and len(seen) == 3
    assert sorted(times(folder)) == ["cache.json", "samples-00000.safetensors"]
    assert "cache: stopped by a SIGTERM; the same command goes on" in capsys.readouterr().out
    kept = times(folder)
    tune = tuned(edits(folder), tmp_path)
    assert contents(folder) == contents(cached) and kept.items() <= times(folder).items()
    assert same(weights(tune), weights(tuned(edits(cached), tmp_path)))


def test_sigterm_while_the_command_encodes(tmp_path, terminated):
    more = ("--trainer.default_root_dir", str(tmp_path / "run"), "--data.init_args.train_batch_size", "4")
    arguments = command(tmp_path / "cache", "cache", *more, "--data.init_args.max_train_samples", "20")[3:]
    terminated(3)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 75
    kept = times(tmp_path / "cache")
    assert sorted(kept) == ["cache.json", "samples-00000.safetensors"]
    assert main(arguments) == 0
    assert kept.items() <= times(tmp_path / "cache").items()
    arguments[arguments.index(str(tmp_path / "cache"))] = str(tmp_path / "whole")
    assert main(arguments) == 0
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


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
        ({"resolution": 8}, "resolution 16, now 8"),
        ({"random_flip": True}, "random_flip False, now True"),
        ({"center_crop": False}, "center_crop True, now False"),
        ({"max_train_samples": 16}, "max_train_samples 20, now 16"),
        ({"seed": 1}, "seed 0, now 1"),
        ({"variants": 2, "random_flip": True}, "random_flip False, now True"),
        ({"random_flip": True, "resolution": 8}, "random_flip False, now True; resolution 16, now 8"),
    ],
)
def test_a_cache_of_other_data_is_refused_with_the_keys_alone(cached, tmp_path, change, words):
    with pytest.raises(ValueError, match=rf"encoded from something else \({words}\): choose"):
        encode(InstructPix2Pix.tiny(), edits(cached, **change), tmp_path)


@pytest.mark.parametrize(
    ("kind", "before", "change", "words"),
    [
        ("edits", {"random_flip": True}, {"random_flip": False}, "random_flip True, now False"),
        ("views", {}, {"seed": 1}, "seed 0, now 1"),
        ("views", {"max_train_samples": None}, {"resolution": 8}, "resolution 16, now 8"),
        ("clips", {}, {"frame_stride": [1, 2]}, r"frame_stride \[1, 1\], now \[1, 2\]"),
        (
            "clips",
            {},
            {"random_flip": True, "resolution": "16x8"},
            "random_flip False, now True; resolution 16, now 16x8",
        ),
        ("labels", {}, {"channels": 3}, "channels 1, now 3"),
        ("labels", {}, {"transform": "rotate"}, "transform .*, now .*"),
        ("labels", {}, {"train_range": "0:50"}, "train_range None, now 0:50"),
        ("labels", {}, {"resolution": 16, "seed": 3}, "resolution 8, now 16; seed 0, now 3"),
    ],
)
def test_the_keys_of_every_kind_of_data(kind, before, change, words, tmp_path):
    make, options = {
        "edits": (EditPairs, {"source": "fashion", "resolution": 16}),
        "views": (ObjectViews, {"resolution": 16}),
        "clips": (Clips, {"resolution": 16, "frames": 4}),
        "labels": (LabelledImages, {"resolution": 8}),
    }[kind]

    def claim(variants: int, **changed):
        data = make(**{**SMALL, **options, **before, **changed}, cache=Cache(str(tmp_path / "cache"), variants))
        encoders = Encoders(DiT.create(input_size=8, num_classes=10, channels=1, width=16, depth=1, num_heads=2))
        _claim(tmp_path / "cache", made_from(encoders, data, "32-true"), data)

    claim(2)
    claim(1)
    claim(3, num_workers=2, train_batch_size=2)
    with pytest.raises(ValueError, match=rf"encoded from something else \({words}\): choose"):
        claim(1, **change)


def test_a_cache_of_another_encoder_or_file_is_refused(cached, tmp_path):
    model = InstructPix2Pix.tiny()
    model.text_encoder.get_parameter("final_layer_norm.weight").data[0] += 1e-3
    with pytest.raises(
        ValueError, match=r"encoded from something else \(other encoders\): choose another cache.folder"
    ):
        encode(model, edits(cached), tmp_path)


def test_contents_decide_not_the_times_or_places_of_files(tmp_path, capsys):
    folder, copy, cache = pairs(tmp_path / "pairs"), tmp_path / "copy", tmp_path / "files"

    def again(source: Path, **options) -> None:
        encode(
            InstructPix2Pix.tiny(),
            edits(cache, **{"source": str(source), "max_train_samples": None, **options}),
            tmp_path,
        )

    again(folder)
    capsys.readouterr()
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    for path in (folder, copy):
        os.utime(path / "input3.png", (0, 0))
        again(path)
    assert "encoding" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"\(random_flip False, now True\)"):
        again(copy, random_flip=True)
    with pytest.raises(ValueError, match=r"\(buckets None, now of max_ratio 4 and step 8\)"):
        again(copy, buckets=Buckets(4, 8))
    content, at = (copy / "edited5.png").read_bytes(), (copy / "edited5.png").stat().st_mtime_ns
    (copy / "edited5.png").write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    os.utime(copy / "edited5.png", ns=(at, at))
    with pytest.raises(ValueError, match=r"\(\S*copy/edited5.png has changed\)"):
        again(copy)
    (copy / "edited5.png").write_bytes(content)
    again(copy)
    text = (copy / "metadata.jsonl").read_text()
    (copy / "metadata.jsonl").write_text(text.replace('"edit 3"', '"edit 4"'))
    with pytest.raises(ValueError, match=r"\(other data\)"):
        again(copy)
    (copy / "metadata.jsonl").write_text(text + "\n" + text.splitlines()[0])
    with pytest.raises(ValueError, match=r"\(rows 11, now 12\)"):
        again(copy)


def test_a_cache_of_the_format_before_is_still_one(cached, tmp_path):
    """Format 1 knew files by their times, and data by the objects that they lie in."""
    data, manifest = edits(cached), cached / "cache.json"
    made = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(_made_before(data, made)))
    with pytest.raises(ValueError, match="by an earlier version: other data, encoders or settings"):
        encode(InstructPix2Pix.tiny(), edits(cached, random_flip=True), tmp_path)
    encode(InstructPix2Pix.tiny(), data, tmp_path)
    assert json.loads(manifest.read_text()) == made


def test_variants_of_data_that_draw_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="set cache.variants to 1, not 2"):
        encode(InstructPix2Pix.tiny(), edits(tmp_path / "cache", 2), tmp_path)


@pytest.mark.parametrize("name", ["photo.png", "photo.png/cache"])
def test_a_folder_that_is_a_file_is_refused(tmp_path, name):
    (tmp_path / "photo.png").write_text("mine")
    with pytest.raises(ValueError, match=r"data.init_args.cache.folder must .*photo.png"):
        encode(InstructPix2Pix.tiny(), edits(tmp_path / name), tmp_path / "run")
    assert (tmp_path / "photo.png").read_text() == "mine"


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
@pytest.mark.parametrize("by", ["SIGKILL", "SIGTERM"])
def test_two_processes_that_are_killed_go_on_where_they_were(tmp_path, by):
    """Both by a SIGKILL; by a SIGTERM that the first one alone is sent."""
    folder = tmp_path / "cache"
    more = ("--data.init_args.max_train_samples", "1500", "--trainer.strategy", "ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    encoding = command(folder, "cache", *more, devices=2)
    with subprocess.Popen(encoding, env=environment, start_new_session=True) as run:
        while len(list(folder.glob("samples-*"))) < 3 and run.poll() is None:
            time.sleep(0.05)
        if by == "SIGKILL":
            os.killpg(run.pid, signal.SIGKILL)
        else:
            run.terminate()
            assert run.wait(60) == 75
    before = {name: at for name, at in times(folder).items() if not name.startswith(".")}
    done = subprocess.run(encoding, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    shards = -(-1500 // 256) * 2
    left = shards - len(before) + 1
    assert left > 0 and len(list(folder.glob("samples-*"))) == shards
    assert before.items() <= times(folder).items() and "of 3000 training samples" in done.stdout
    assert f"cache: {folder} is whole, 1500 rows x 2" in done.stdout
