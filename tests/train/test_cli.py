"""The command line: quick help, and for everything that can go wrong one sentence and the right exit status."""

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from oracle import pixel_model
from PIL import Image
from runs import write_idx

from priorguide.sample.bundle import Bundle
from priorguide.train.cli import main, parse_scales
from priorguide.train.errors import UsageError, innermost, sentence
from priorguide.train.sampling import parse_seeds, read_condition

COMMANDS = ("quickstart", "fit", "compare", "export", "sample", "verify", "doctor")
TRAINING_ONLY = ("lightning", "pytorch_lightning", "wandb", "datasets", "jsonargparse", "torchmetrics", "bitsandbytes")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail; returns the one sentence that it says."""

    def run(*arguments: str | Path, status: int = 1) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == status
        said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert said and said[-1].startswith("priorguide: ") and "Traceback" not in "".join(said)
        assert sum(line.startswith("priorguide: ") for line in said) == 1
        assert len(said[-1]) < 400
        return said[-1]

    return run


@pytest.fixture
def config(edges, tmp_path):
    """Writes the edges config with changes, each (path of keys, value), for a run in `tmp_path / "run"`."""

    def write(*changes: tuple[str, object]) -> Path:
        content = yaml.safe_load(edges.read_text())
        for keys, value in (("trainer.default_root_dir", str(tmp_path / "run")), *changes):
            place = content
            *path, last = keys.split(".")
            for key in path:
                place = place[int(key) if key.isdigit() else key]
            place[last] = value
        (file := tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        return file

    return write


COMPARISON = "trainer.callbacks.0.init_args"


# --- help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_reads_well(command):
    code = """import sys, time
from priorguide.train.cli import main
try:
    main([*sys.argv[1:], "--help"])
except SystemExit as end:
    assert end.code == 0
    heavy = {"torch", "numpy", "lightning", "diffusers", "wandb", "rich"} & sys.modules.keys()
    print(time.process_time(), sorted(heavy), file=sys.stderr)
"""
    done = python(code, *([command] if command else []))
    seconds, heavy = done.stderr.split(" ", 1)
    assert done.returncode == 0 and float(seconds) < 1.5 and heavy.strip() == "[]"
    assert done.stdout.startswith(f"usage: priorguide {command}".strip())
    assert "scale 1 is the conditional prediction alone" in " ".join(done.stdout.split())
    if not command:
        assert all(f"\n    {name}" in done.stdout for name in COMMANDS)


def test_fit_alone_shows_its_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit"])
    assert end.value.code == 0 and "--config FILE" in capsys.readouterr().out


def test_the_full_options_of_fit(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--options"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "--model.lr_warmup_steps" in out and "--checkpoint.every_n_train_steps" in out


def test_print_config_is_a_whole_config(edges, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(edges), "--model.ema_decay", "0.5", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert end.value.code == 0
    assert printed["model"]["ema_decay"] == 0.5 and printed["model"]["snr_gamma"] is None
    assert printed["data"]["class_path"] == "priorguide.data.labelled.LabelledImages"


# --- usage: exit status 2


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["compare"], ["sample", "x", "--nonsense"], ["verify"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "priorguide" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("trainer.max_stepz", 3), "max_stepz"),
        (("model.rate", 1.0), "rate"),
        (("model.model.init_args.widen", 2), "config key 'model.model': Option 'widen' is not accepted"),
        ((f"{COMPARISON}.every", 2), "config key 'trainer.callbacks': Option 'every' is not accepted"),
        (("data.init_args.colour", True), "config key 'data': Option 'colour' is not accepted"),
        (
            ("model.density", "normal"),
            "config key 'model.density': must be one of 'uniform', 'logit_normal', 'mode', got normal",
        ),
        (("model.learning_rate", "fast"), "config key 'model.learning_rate': must be a number, got fast"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_config_that_is_wrong(refused, config, tmp_path, change, expected):
    said = refused("fit", "--config", config(change), status=2)
    assert expected in said and "`priorguide fit --options` lists all keys but those under init_args" in said
    assert not (tmp_path / "run").exists()


def test_an_override_that_is_wrong(refused, config):
    assert "--model.nonsense" in refused("fit", "--config", config(), "--model.nonsense", "3", status=2)
    said = refused("fit", "--config", config(), "--model.learning_rate", "nan", status=2)
    assert "config key 'model.learning_rate'" in said


LIST, KEYS = "must be a list, as [{0}] is, got {0}", "takes keys of its own"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.lora.target_modules", "attention", f"config key 'target_modules': {LIST.format('attention')}"),
        ("model.lora.base_bits", "4", "config key 'base_bits': must be one of 'int8', 'nf4', got 4"),
        ("model.lora.rank", "x", "config key 'rank': must be a whole number, got x"),
        ("model.lora", "5", f"{KEYS} (lora.rank, lora.lora_alpha, lora.target_modules, lora.base_bits), got 5"),
        ("model.betas", "0.9", f"config key 'model.betas': {LIST.format('0.9')}"),
        ("model.channels_last", "perhaps", "must be true or false, got perhaps"),
        ("model.lr_multipliers", "3", f"'model.lr_multipliers': {KEYS}, each with a value, got 3"),
        ("model.drop", "3", "config key 'model.drop': must be a list of mappings, got 3"),
        ("data", "foo", "config key 'data': must give a class_path, with init_args, got foo"),
        ("data.init_args.buckets", "8", f"'buckets': {KEYS} (buckets.max_ratio, buckets.step), got 8"),
        ("data.init_args.buckets", "[8]", f"'buckets': {KEYS}, each with a value, got [8]"),
        ("data.init_args.buckets.step", "x", "config key 'step': must be a whole number, got x"),
        ("data.init_args.colour.step", "8", "config key 'data': its class_path takes no colour.step: leave it out"),
        ("data.init_args.source", "[1]", "config key 'source': must be a text, got [1]"),
    ],
)
def test_a_value_of_another_kind_is_told_in_a_configs_words(refused, config, key, value, expected):
    said = refused("fit", "--config", config(), f"--{key}", value, status=2)
    assert f"{expected} (`priorguide fit --options`" in said and "Expected" not in said


def test_a_config_that_is_no_file_or_no_yaml(refused, tmp_path):
    missing = tmp_path / "missing.yaml"
    assert f"File does not exist: '{missing}'" in refused("fit", "--config", missing, status=2)
    (bad := tmp_path / "bad.yaml").write_text("trainer: [1,")
    assert "Problems parsing config" in refused("fit", "--config", bad, status=2)


# --- runs that cannot be: exit status 1, and nothing is left behind


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([(f"{COMPARISON}.scales", [[1.5, 7.5]])], "a ladder of 1 rung(s) (image) and takes as many scales, got 2"),
        ([("model.drop", [{"parts": ["text"], "probability": 0.1}])], "drop-out names ['text'], but the model's parts"),
        ([("model.drop", [{"parts": ["image"], "probability": 1.5}])], "sum to at most 1, got a sum of 1.5"),
        ([("data.init_args.channels", 2)], "channels must be 1 or 3, got 2"),
        ([("data.init_args.source", "idx:/missing")], "/missing must hold train-images-idx3-ubyte"),
        ([("data.init_args.train_batch_size", 1000)], "train_batch_size must be at most"),
        ([("trainer.default_root_dir", None)], "trainer.default_root_dir must name the run's folder"),
        ([(f"{COMPARISON}.priors.base.init_args.pretrained_model_name_or_path", "nowhere")], "'nowhere' is neither"),
        ([(f"{COMPARISON}.every_n_steps", 0)], "every_n_steps and num_conditions must be at least 1"),
    ],
    ids=lambda value: value[0][0] if isinstance(value, list) else "",
)
def test_a_run_that_cannot_be(refused, config, tmp_path, changes, expected):
    assert expected in refused("fit", "--config", config(*changes))
    assert not (tmp_path / "run").exists()


def test_a_base_with_other_channels(refused, config, tmp_path):
    other = Bundle.save(tmp_path / "other", pixel_model(num_classes=0, image_channels=0, picture_channels=3))
    place = f"{COMPARISON}.priors.base.init_args.pretrained_model_name_or_path"
    said = refused("fit", "--config", config((place, str(other))))
    assert "the prior works on x_0 of shape (12, 8, 8), the fine-tuned model on (4, 8, 8)" in said
    assert not (tmp_path / "run").exists()


def test_an_empty_data_folder(refused, config, tmp_path):
    (empty := tmp_path / "empty").mkdir()
    assert f"{empty} must hold" in refused("fit", "--config", config(("data.init_args.source", str(empty))))
    assert not (tmp_path / "run").exists()


def test_labels_outside_the_range(refused, config, tmp_path):
    labels = write_idx(tmp_path / "idx") / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x0b")
    change = ("data.init_args.source", f"idx:{labels.parent}")
    assert "labels must be in [0, 10), found 11" in refused("fit", "--config", config(change))
    assert not (tmp_path / "run").exists()


def test_more_classes_than_the_model_has(refused, config, tmp_path):
    changes = [("data.init_args.transform", "classes"), ("model.drop", [{"parts": ["label"], "probability": 0.1}])]
    changes += [("model.model.init_args.image_channels", 0), ("model.model.init_args.num_classes", 3)]
    said = refused("fit", "--config", config(*changes))
    assert "the data has 10 classes, the model takes labels in [0, 3)" in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_rate_at_which_training_diverges(refused, config):
    assert "no longer finite" in refused("fit", "--config", config(), "--model.learning_rate", "1e30")


# --- a run's folder and its checkpoints


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A copy of the run, less what was made of it."""
    return shutil.copytree(run, tmp_path / "copied", ignore=shutil.ignore_patterns("comparison", "bundle"))


def test_output_folders_that_exist(refused, edges, run):
    assert f"{run} holds a run already" in refused("fit", "--config", edges)
    assert f"{run / 'comparison'} exists already" in refused("compare", run)
    assert f"{run / 'bundle'} exists already" in refused("export", run)
    assert f"{run} exists already" in refused("export", run, "--model-only", "--out", run)
    assert f"{run} exists already" in refused("sample", run / "bundle", "--recorded", "--out", run)


def test_folders_that_are_not_there(refused, tmp_path):
    assert "is not a run: it has no config.yaml" in refused("compare", tmp_path)
    assert "is not a run: it has no config.yaml" in refused("export", tmp_path, "--prior", "self", "--scale", "2")
    assert "there is no such folder" in refused("sample", tmp_path / "none")
    assert "it is not a bundle" in refused("verify", tmp_path)


def test_a_run_goes_on_from_its_last_checkpoint(edges, copied):
    arguments = ["--trainer.default_root_dir", str(copied), "--trainer.max_steps", "4", "--ckpt_path", "last"]
    assert main(["fit", "--config", str(edges), *arguments]) == 0
    held = torch.load(copied / "checkpoints" / "last.ckpt", weights_only=True)
    assert held["global_step"] == 4
    assert yaml.safe_load((copied / "config.yaml").read_text())["trainer"]["max_steps"] == 4
    lines = (copied / "compare" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_a_checkpoint_cut_short(refused, edges, copied, tmp_path):
    last = copied / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    expected = "last.ckpt is not a whole checkpoint"
    assert expected in refused("compare", copied)
    assert expected in refused("export", copied, "--prior", "base", "--scale", "2")
    new = tmp_path / "new"
    said = refused("fit", "--config", edges, "--trainer.default_root_dir", new, "--ckpt_path", last)
    assert expected in said and not new.exists()
    assert not (copied / "comparison").exists() and not (copied / "bundle").exists()
    missing = refused("compare", copied, "--checkpoint", copied / "none.ckpt")
    assert "there is no checkpoint" in missing


@contextmanager
def files_of_at_most(size: int):
    """As on a disk that fills up: no file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_disk_that_fills_up_while_training(refused, edges, copied):
    before = contents(copied / "checkpoints")
    arguments = ["--trainer.default_root_dir", copied, "--trainer.max_steps", "4", "--ckpt_path", "last"]
    with files_of_at_most(200_000):
        said = refused("fit", "--config", edges, *arguments)
    assert "could not be written" in said and "earlier checkpoints are as they were" in said
    assert contents(copied / "checkpoints") == before


def test_a_disk_that_fills_up_while_comparing_and_exporting(refused, copied):
    before = contents(copied)
    with files_of_at_most(10_000):
        assert "could not be written" in refused("compare", copied, "--scales", "1,2")
        assert "could not be written" in refused("export", copied, "--prior", "base", "--scale", "2")
        assert "could not be written" in refused("export", copied, "--model-only")
    assert contents(copied) == before
    assert not [path for path in copied.iterdir() if path.name.startswith(".")]


def test_a_disk_that_fills_up_while_sampling(refused, run, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    said = refused("sample", run / "bundle", "--recorded", "--steps", "1", "--out", tmp_path / "out")
    assert "No space left on device" in said and not list(tmp_path.iterdir())


# --- compare and export


def test_scales_that_do_not_fit(refused, run, tmp_path):
    out = tmp_path / "out"
    for scales in ("1;2", "-1"):
        assert "scales must look like 1,1.5,3" in refused("compare", run, "--out", out, "--scales", scales, status=2)
    assert "--seeds goes with --condition" in refused("compare", run, "--out", out, "--seeds", "0:2", status=2)
    assert "--conditions must be at least 1" in refused("compare", run, "--out", out, "--conditions", "0", status=2)
    for words in (
        ("compare", run, "--out", out, "--scales", "1.5:7.5"),
        ("export", run, "--out", out, "--prior", "self", "--scale", "1:2"),
    ):
        said = refused(*words)
        assert "takes as many scales, got 2" in said and "; such as [1.5], on the command line 1.5" in said
    assert not out.exists()


def test_more_conditions_than_there_are(refused, run, tmp_path):
    said = refused("compare", run, "--out", tmp_path / "out", "--conditions", "100")
    assert "needs 100 held-out conditions (num_conditions) and 20 others" in said and "the data hold out 40" in said
    assert not (tmp_path / "out").exists()


def test_a_prior_that_is_no_candidate(refused, run, tmp_path):
    said = refused("export", run, "--out", tmp_path / "out", "--prior", "other", "--scale", "2")
    assert "prior must be among the run's candidates ['base', 'self'], got 'other'" in said


def test_export_without_a_comparison(refused, copied):
    assert "run `priorguide compare" in refused("export", copied)


# --- sample and verify


def test_a_changed_bundle(refused, run, tmp_path):
    bundle = shutil.copytree(run / "bundle", tmp_path / "bundle")
    weights = bundle / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for command in (["verify", bundle], ["sample", bundle, "--recorded", "--out", tmp_path / "out"]):
        assert "has changed since it was written" in refused(*command)
    assert not (tmp_path / "out").exists()


def test_conditions_that_cannot_be(refused, run, tmp_path):
    def said(*arguments):
        return refused("sample", run / "bundle", "--out", tmp_path / "out", *arguments, status=2)

    Image.new("L", (8, 8)).save(small := tmp_path / "small.png")
    (text := tmp_path / "text.png").write_text("no picture")
    assert "the conditions to give are ['image'], got []" in said()
    assert "the conditions to give are ['image'], got ['label']" in said("--condition", "label=3")
    assert "must have shape (B, 1, 16, 16), got (1, 1, 8, 8)" in said("--condition", f"image={small}")
    assert "must have shape (B, 1, 16, 16), got (1,)" in said("--condition", "image=3")
    assert "text.png is not a readable picture" in said("--condition", f"image={text}")
    Image.new("L", (16, 16)).save(good := tmp_path / "good.png")
    assert "seeds must look like 0:16 or 3,5,8" in said("--condition", f"image={good}", "--seeds", "a")
    assert "scales must look like" in said("--condition", f"image={good}", "--scale", "x")
    assert "takes one scale per rung, such as 3" in said("--condition", f"image={good}", "--scale", "1,2")
    assert "leave --condition and --seeds out" in said("--recorded", "--seeds", "0:2")
    assert "each condition is given once" in said(*["--condition", f"image={good}"] * 2)
    assert not (tmp_path / "out").exists()


def test_conditions_of_ones_own(run, tmp_path):
    """One picture, two seeds: a grid and an animation of each line come with several conditions only."""
    Image.new("L", (16, 16)).save(picture := tmp_path / "edges.png")
    given = ["--condition", f"image={picture}", "--seeds", "0:2"]
    assert main(["sample", str(run / "bundle"), "--out", str(out := tmp_path / "samples"), *given]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0000-seed-0.png", "0001-seed-1.png", "asked.json"]
    where = ["--out", str(out := tmp_path / "compared")]
    assert main(["compare", str(run), "--scales", "1,2", *given, *where]) == 0
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == {"self-1", "self-2", "base-1", "base-2"}
    drawn = {name: (out / name / "0001-seed-1.png").read_bytes() for name in folders}
    assert drawn["self-1"] == drawn["base-1"] and drawn["self-2"] != drawn["base-2"]
    assert Image.open(out / "panel.png").width > 4 * 96


def test_labels_by_their_classes_names():
    model = pixel_model(image_channels=0)
    assert read_condition(model, ["label=dress"], ("shirt", "dress", "bag"))["label"].tolist() == [1]
    assert read_condition(model, ["label=2"], ("shirt", "dress", "bag"))["label"].tolist() == [2]
    with pytest.raises(UsageError, match=r"number or name \(shirt, dress, bag\), got 'hat'"):
        read_condition(model, ["label=hat"], ("shirt", "dress", "bag"))


def test_labels_of_a_bundle_that_cannot_be():
    model = pixel_model(image_channels=0)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), found 3 to 3"):
        model.encode_condition(model.read_condition(label="3"))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), found -1 to -1"):
        model.encode_condition(model.read_condition(label="-1"))


def test_a_model_alone_cannot_be_sampled(refused, base):
    assert "holds a model without guidance" in refused("sample", base, "--seeds", "0")


def test_sample_and_verify_without_the_training_libraries(run, tmp_path):
    """In a process where they are not installed; what needs them says so."""
    Image.new("L", (16, 16)).save(picture := tmp_path / "edges.png")
    code = f"""import sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.split(".")[0] in {TRAINING_ONLY} else found(name, path, target)
PathFinder.find_spec = classmethod(find_spec)
from priorguide.train.cli import main
bundle, picture, out = sys.argv[1:]
assert main(["verify", bundle]) == 0
assert main(["doctor", bundle]) == 0
assert main(["sample", bundle, "--condition", f"image={{picture}}", "--seeds", "3,5", "--out", out]) == 0
assert main(["sample", bundle, "--recorded", "--steps", "1", "--out", out + "2"]) == 0
assert main(["fit", "--config", "any.yaml"]) == 1
assert not set({TRAINING_ONLY}) & sys.modules.keys()
"""
    out = tmp_path / "out"
    done = python(code, str(run / "bundle"), str(picture), str(out))
    assert done.returncode == 0, done.stderr
    assert "bit for bit the same" in done.stdout
    assert "needs lightning: pip install 'priorguide[train]'" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["0000-seed-3.png", "0001-seed-5.png", "asked.json"]
    with Image.open(out / "0000-seed-3.png") as sampled:
        assert sampled.size == (16, 16) and len(np.unique(sampled)) > 10


# --- the rest


def test_a_traceback_on_request(run, monkeypatch):
    monkeypatch.setenv("PRIORGUIDE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="exists already"):
        main(["compare", str(run)])


def test_interrupted(capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("priorguide.train.sampling.verify", interrupt)
    assert main(["verify", "anything"]) == 130
    assert capsys.readouterr().err == "priorguide: interrupted\n"


def test_scales_and_seeds():
    assert parse_scales(None) is None
    assert parse_scales("1,1.5,3") == [(1.0,), (1.5,), (3.0,)]
    assert parse_scales("1.5:7.5,1:2") == [(1.5, 7.5), (1.0, 2.0)]
    assert parse_seeds("2:5") == [2, 3, 4] and parse_seeds("7") == [7] and parse_seeds("3,5") == [3, 5]


def test_the_innermost_error_is_found():
    """The sentence of our own, of those that a parser wraps it in; and no deeper than that."""
    cause = OSError("no such file")
    ours = ValueError("x is not a bundle")
    ours.__cause__ = cause
    union = ValueError("Does not validate against any of the Union subtypes\nSubtypes: ...")
    union.__cause__ = ours
    outer = TypeError('Parser key "model":\n  Does not validate')
    outer.__cause__ = union
    assert innermost(outer) is ours and innermost(ours) is ours and innermost(union) is ours
    assert sentence('Parser key "model":\n  Does not', outer) == "config key 'model': x is not a bundle"
    assert sentence("two\n  lines") == "two lines"
