"""Training on pictures at their own aspect ratio: oblong latents, the cache, resuming, comparisons on squares."""

import json
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fits import same, seed, trainer, weights
from interrupted import fit, held, make_pictures
from pairs import run as run_pair
from PIL import Image
from runs import CONFIGS, configs
from test_resume import Crash
from torch import nn

from priorguide.data import cache as data_cache
from priorguide.data.buckets import Buckets
from priorguide.data.cache import Cache
from priorguide.data.edits import EditPairs
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.zero123 import Zero123
from priorguide.train.cli import main
from priorguide.train.fine_tune import FineTune
from priorguide.train.fit import load_run
from priorguide.train.objective import Drop

BUCKETS = Buckets(step=4)
"""At 16 px: 16 x 16, 20 x 12, 12 x 20; latents of half of that."""
SHAPES = ((24, 24), (24, 36), (36, 24))
LATENTS = {(8, 8), (6, 10), (10, 6)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """24 edit pairs of squares, of pictures 3:2 and 2:3, of the sizes in turns."""
    folder = tmp_path_factory.mktemp("pairs")
    generator, lines = np.random.default_rng(0), []
    for number in range(24):
        names = [f"{name}{number}.png" for name in ("input", "edited")]
        for name in names:
            Image.fromarray(generator.integers(0, 256, (*SHAPES[number % 3], 3), dtype=np.uint8)).save(folder / name)
        lines.append(json.dumps({"input_image": names[0], "edited_image": names[1], "edit": f"edit {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def edits(folder: Path, **options) -> EditPairs:
    options = {"resolution": 16, "train_batch_size": 4, "buckets": BUCKETS, "random_flip": True, **options}
    return EditPairs(str(folder), **options)


def tuned(data: EditPairs, folder: Path, seen: list | None = None) -> FineTune:
    seed()
    model = InstructPix2Pix.tiny()
    denoise = model.denoise

    def watched(x_t, t, condition):
        if seen is not None:
            seen.append((x_t.shape, condition["image"].shape))
        return denoise(x_t, t, condition)

    model.denoise = watched
    drop = [Drop(("text",), 0.3), Drop(("text", "image"), 0.3)]
    tune = FineTune(model, drop=drop, learning_rate=1e-3, ema_decay=0.9)
    trainer(folder, 9).fit(tune, datamodule=data)  # in mid-epoch, the second
    return tune


def test_training_gets_oblong_latents_and_a_cache_changes_nothing(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(data_cache, "SHARD_ROWS", 4)
    fresh, seen = [], []
    plain = tuned(edits(pairs), tmp_path, fresh)
    cache = Cache(str(tmp_path / "cache"), variants=2)
    cached = tuned(edits(pairs, cache=cache), tmp_path, seen)
    assert fresh == seen and {tuple(x_t[2:]) for x_t, _ in fresh} == LATENTS
    assert all(x_t == image for x_t, image in fresh)
    for network in ("model.network", "average"):
        expected, found = (weights(t.get_submodule(network)) for t in (plain, cached))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    for change, words in (
        ({"buckets": Buckets(1.5, 4)}, "buckets of max_ratio 2.0 and step 4, now of max_ratio 1.5 and step 4"),
        ({"buckets": None}, "buckets of max_ratio 2.0 and step 4, now None"),
    ):
        with pytest.raises(ValueError, match=rf"was encoded from something else \({words}\)"):
            tuned(edits(pairs, cache=cache, **change), tmp_path)


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_that_crashed_ends_as_the_undisturbed_one(cached, tmp_path):
    """In the middle of an epoch, whose batches are of several shapes and sizes."""
    pictures = make_pictures(tmp_path / "pictures", train=29, shapes=((16, 16), (16, 24), (24, 16), (16, 25)))
    options = {"buckets": BUCKETS, "cache": Cache(str(tmp_path / "cache"), 2) if cached else None, "steps": 9}
    fit(pictures, tmp_path / "whole", workers=0, **options)
    for number in (7, 13):
        folder = tmp_path / str(number)
        with pytest.raises(RuntimeError, match="crash"):
            fit(pictures, folder, callbacks=(Crash(number),), workers=cached, **options)
        fit(pictures, folder, resume=True, workers=0, **options)
        assert same(held(folder), held(tmp_path / "whole")), number


@pytest.mark.slow
def test_a_compiled_network_is_compiled_for_every_size(tmp_path, monkeypatch):
    """Ten shapes of batches, more than torch would compile by itself."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    shapes = ((16, 16), (20, 12), (12, 20), (32, 8), (8, 32))
    pictures = make_pictures(tmp_path / "pictures", train=30, shapes=shapes)
    options = {"buckets": Buckets(4, 4), "steps": 5, "every": 100, "workers": 0}
    plain = fit(pictures, tmp_path / "plain", **options)
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        compiled = fit(pictures, tmp_path / "compiled", compile=True, **options)
    assert counters["stats"]["unique_graphs"] == 10
    found, wanted = (weights(tune.model.network) for tune in (compiled, plain))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_go_on_where_they_were(kind, tmp_path):
    pictures = make_pictures(tmp_path / "pictures", train=29, shapes=((16, 16), (16, 24), (24, 16), (16, 25)))
    options = {"pictures": pictures, "buckets": BUCKETS, "lr_scheduler": "constant", "batch_size": 3, "kind": kind}
    run_pair(tmp_path / "whole", steps=9, **options)
    run_pair(tmp_path / "parts", steps=5, **options)
    run_pair(tmp_path / "parts", steps=9, resume=True, **options)
    assert same(held(tmp_path / "parts"), held(tmp_path / "whole"))


# --- the command


def command(pairs: Path, root: Path, *more: str) -> list[str]:
    arguments = configs("instruct_pix2pix", "instruct_pix2pix_offline")
    arguments += ["--trainer.default_root_dir", str(root), "--data.init_args.source", str(pairs), "--threads", "1"]
    arguments += ["--data.init_args.train_batch_size", "4", "--data.init_args.val_fraction", "0.4"]
    arguments += ["--trainer.max_steps", "4", "--data.init_args.buckets.step", "4", *more]
    return ["fit", *arguments]


def test_fit_compare_and_export(pairs, tmp_path, capsys):
    """Comparison and bundle are of squares, as without buckets."""
    (small := tmp_path / "small.yaml").write_text(yaml.safe_dump(smaller()))
    assert main([*command(pairs, tmp_path / "run"), "--config", str(small)]) == 0
    said = capsys.readouterr().out
    assert said.count("buckets: of 14 training pictures") == 1
    assert "effective batch: 4 = 4 (train_batch_size) x 1" in said
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["data"]["init_args"]["buckets"] == {"max_ratio": 2.0, "step": 4}
    assert main(["compare", str(tmp_path / "run"), "--conditions", "4"]) == 0
    assert main(["export", str(tmp_path / "run")]) == 0
    assert "buckets:" not in capsys.readouterr().out, "no header is read"
    data = load_run(tmp_path / "run")[0].datamodule
    assert data.held_out(2)["image"].shape == (2, 3, 16, 16)


def smaller() -> dict:
    """A comparison of few pictures."""
    content = yaml.safe_load((CONFIGS / "instruct_pix2pix_offline.yaml").read_text())
    comparison = content["trainer"]["callbacks"][1]
    sizes = {"num_conditions": 4, "num_reference": 6, "num_pictures": 2, "every_n_steps": 4}
    comparison["init_args"] |= {**sizes, "sampler": {"scheduler": "ddim", "steps": 2}}
    return {"trainer": {"callbacks": [comparison]}}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ("--data.init_args.buckets.step", "2"),
            "must be a multiple of 4 for this InstructPix2Pix, got 2",
        ),
        (("--data.init_args.buckets.step", "12"), "resolution must be a multiple of buckets.step (12), got 16"),
        (("--data.init_args.buckets.max_ratio", "0.9"), "buckets.max_ratio must be at least 1, got 0.9"),
    ],
)
def test_buckets_that_cannot_be(pairs, tmp_path, capsys, more, words):
    assert main(command(pairs, tmp_path / "run", *more)) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert words in error.splitlines()[-1] and "Traceback" not in error


def test_a_model_that_takes_its_own_size_alone(pairs, tmp_path):
    with pytest.raises(ValueError, match=r"^Zero123 takes pictures of its own size alone: leave .*buckets out$"):
        trainer(tmp_path, 1).fit(FineTune(Zero123.tiny()), datamodule=edits(pairs))
