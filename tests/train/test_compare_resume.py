"""An offline comparison that is stopped and started again ends with the same numbers; several checkpoints in one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import same
from oracle import pixel_condition, pixel_model
from resumed import timeless

from priorguide.sample import compare as comparing
from priorguide.sample.compare import compare
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import Sampler
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.parts import Part, Parts, fingerprint
from priorguide.sample.saturation import Energies
from priorguide.train.cli import main

ARMS = ["--scales", "1,2", "--conditions", "20"]


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A copy of the run without its comparison, whose batches are of 6 conditions."""
    folder = shutil.copytree(run, tmp_path / "copied", ignore=shutil.ignore_patterns("comparison", "bundle"))
    config = (folder / "config.yaml").read_text()
    assert "batch_size: 100" in config
    (folder / "config.yaml").write_text(config.replace("batch_size: 100", "batch_size: 6"))
    return folder


class Stop(Exception):
    pass


def stop_after(monkeypatch, chunks: int) -> list[int]:
    """Makes sampling fail at the chunk after the first so many; the list grows by each chunk's size."""
    drawn, real = [], comparing.trajectories

    def trajectories(model, condition, seeds, guidances, **options):
        if options.get("on_guided") is not None:  # and not the timing of costs
            if len(drawn) == chunks:
                raise Stop("stopped")
            drawn.append(len(seeds))
        return real(model, condition, seeds, guidances, **options)

    monkeypatch.setattr(comparing, "trajectories", trajectories)
    return drawn


def test_a_comparison_that_was_stopped_goes_on(copied, monkeypatch, capsys):
    assert main(["compare", str(copied), *ARMS, "--out", str(copied / "undisturbed")]) == 0
    with monkeypatch.context() as patch:
        assert stop_after(patch, 2) is not None and main(["compare", str(copied), *ARMS]) == 1
    assert len(list(copied.glob(".comparison.parts/*/*.safetensors"))) == 2
    capsys.readouterr()
    with monkeypatch.context() as patch:
        drawn = stop_after(patch, 100)
        assert main(["compare", str(copied), *ARMS]) == 0
    assert drawn == [6, 2]
    assert "12 conditions of this comparison are sampled already" in capsys.readouterr().out
    assert timeless(copied / "comparison") == timeless(copied / "undisturbed")
    assert not list(copied.glob(".*")), "what was kept is removed with the record complete"


def test_parts_of_another_comparison_are_not_used(copied, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert main(["compare", str(copied), *ARMS]) == 1
    state = torch.load(last := copied / "checkpoints" / "last.ckpt", weights_only=True)
    name = next(name for name in state["state_dict"] if name.startswith("average.") and name.endswith("weight"))
    state["state_dict"][name] += 0.01
    torch.save(state, last)
    with monkeypatch.context() as patch:
        drawn = stop_after(patch, 100)
        assert main(["compare", str(copied), *ARMS]) == 0
    assert drawn == [6, 6, 6, 2]


def arms(model, base):
    return {
        ("self", (1.0,)): Guidance((1.0,)),
        ("base", (1.0,)): Guidance((1.0,), unconditional(base, onto=model)),
        ("base", (3.0,)): Guidance((3.0,), unconditional(base, onto=model)),
    }


def test_parts_are_taken_as_they_are_and_damaged_ones_made_anew(tmp_path):
    model, base = pixel_model(), pixel_model(1, num_classes=0, image_channels=0)
    condition = pixel_condition()

    def run(parts=None, size=2):
        watch = Energies()
        options = {"batch_size": size, "watch": watch, "parts": parts}
        return compare(model, condition, [1, 2, 3], arms(model, base), Sampler(steps=2), **options), watch.means()

    def opened():
        (parts := Parts(tmp_path / "parts", said.append)).open("key")
        return parts

    said = []
    plain = run()
    assert same(run(opened()), plain) and said == []
    (tmp_path / "parts" / "key" / "00000002.safetensors").write_bytes(b"cut short")
    parts = opened()
    assert parts.batch_size == 2 and "2 conditions of" in said[0]
    assert same(run(parts, size=64), plain), "a part of another length is used, what is left is sampled anew"
    assert opened().batch_size == 2
    parts.remove()
    assert not (tmp_path / "parts").exists()


def test_a_full_disk_leaves_no_half_part(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("priorguide.sample.parts.os.replace", full)
    (parts := Parts(tmp_path / "parts")).open("key")
    with pytest.raises(OSError, match="could not be written"):
        parts.write(0, Part([torch.zeros(2, 1, 4, 4)], []), 2)
    assert not list(tmp_path.iterdir())


def test_a_fingerprint_tells_contents_apart():
    values = [
        torch.zeros(2),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(1, 2),
        [0.0, 0.0],
        {"a": 0.0},
        {"a": 0},
        {"b": 0.0},
        ["a", "b"],
        ["ab"],
        None,
        pixel_model(0).network,
        pixel_model(1).network,
    ]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint(pixel_model(0).network) == fingerprint(pixel_model(0).network)
    assert fingerprint({"a": 1, "b": torch.ones(3)}) == fingerprint({"b": torch.ones(3), "a": 1})


@pytest.mark.slow
def test_comparisons_that_were_killed_end_as_the_undisturbed_one():
    script = Path(__file__).parent.parent / "resumed.py"
    done = subprocess.run([sys.executable, script, "5"], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 5 comparisons equal" in done.stdout


# --- several checkpoints


@pytest.fixture
def longer(edges, copied) -> Path:
    """The run gone on to step 4, the checkpoint of step 2 beside it."""
    shutil.copy(copied / "checkpoints" / "last.ckpt", copied / "early.ckpt")
    arguments = ["--trainer.default_root_dir", str(copied), "--trainer.max_steps", "4", "--ckpt_path", "last"]
    assert main(["fit", "--config", str(edges), *arguments, "--model.learning_rate", "0.01"]) == 0
    return copied


def test_which_checkpoint_and_which_prior(longer, monkeypatch, capsys):
    checkpoints = [str(longer / "checkpoints" / "last.ckpt"), str(longer / "early.ckpt")]
    assert main(["compare", str(longer), "--checkpoint", *checkpoints, "--scales", "1,2", "--conditions", "20"]) == 0
    record = json.loads((longer / "comparison" / "record.json").read_text())
    names = {(row["prior"], *row["scales"]) for row in record["rows"]}
    assert names == {(f"{n}@{s}", x) for s in (2, 4) for n, x in (("none", 1), ("self", 2), ("base", 2))}
    verdict = record["verdict"]
    assert verdict["rule"]["baseline"] == "self@4"
    assert verdict["chosen"].keys() == {"self@4", "base@4", "self@2", "base@2"} and len(verdict["comparisons"]) == 3
    assert set(verdict["chosen"]["self@2"]) <= {1.0, 2.0} and verdict["chosen"]["base@2"] == [2.0]
    assert [entry["step"] for entry in record["checkpoints"]] == [2, 4]
    assert record["candidates"]["base@2"] | {"scales": 0} == record["candidates"]["base@4"] | {"scales": 0, "step": 2}
    page = (longer / "comparison" / "index.html").read_text()
    out = capsys.readouterr().out
    assert all(name in page and name in out for name in ("self@2", "base@2", "self@4", "base@4"))
    # what is deployed is that checkpoint's
    seen = []
    monkeypatch.setattr("priorguide.train.export.verify_apart", lambda folder: "not verified apart")
    monkeypatch.setattr("priorguide.train.export.load_run", lambda run, file: seen.append(file) or load_run(run, file))
    from priorguide.train.fit import load_run

    export = ["export", str(longer), "--prior", "base@2", "--scale", "2", "--out"]
    assert main([*export, str(longer / "bundle")]) == 0
    assert seen == [longer / "early.ckpt"]
    manifest = json.loads((longer / "bundle" / "priorguide.json").read_text())
    assert manifest["provenance"]["step"] == 2 and manifest["prior"] is not None
    (longer / "early.ckpt").unlink()
    assert main([*export, str(longer / "other")]) == 1
    assert "base@2 is a candidate of early.ckpt at step 2, which is no longer there" in capsys.readouterr().err


def test_the_numbers_of_each_checkpoint_are_its_own(longer):
    checkpoints = [longer / "early.ckpt", longer / "checkpoints" / "last.ckpt"]
    for name, files in (("both", checkpoints), ("early", checkpoints[:1]), ("late", checkpoints[1:])):
        command = ["compare", str(longer), "--checkpoint", *map(str, files), *ARMS, "--out", str(longer / name)]
        assert main(command) == 0
    rows = {}
    for name in ("both", "early", "late"):
        found = json.loads((longer / name / "record.json").read_text())["rows"]
        rows[name] = {(row["prior"], *row["scales"]): row["metrics"] for row in found}
    for step, name in ((2, "early"), (4, "late")):
        assert rows[name] == {(n.split("@")[0], s): m for (n, s), m in rows["both"].items() if n.endswith(f"@{step}")}


def test_nothing_is_encoded_twice(longer, monkeypatch):
    encoded = {"encode_condition": 0, "encode_pixels": 0}

    def counted(name: str) -> None:
        real = getattr(PixelUNet, name)

        def encode(self, rows):
            found = real(self, rows)
            encoded[name] += len(found if name == "encode_pixels" else found["image"])
            return found

        monkeypatch.setattr(PixelUNet, name, encode)

    for name in encoded:
        counted(name)
    checkpoints = [str(longer / "early.ckpt"), str(longer / "checkpoints" / "last.ckpt")]
    assert main(["compare", str(longer), "--checkpoint", *checkpoints, *ARMS]) == 0
    assert encoded == {"encode_condition": 20, "encode_pixels": 20}
