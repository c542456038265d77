"""A run that was interrupted and goes on is the run that was not, bit for bit."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from fits import same
from interrupted import fit, held, make_pictures

from priorguide.data.buckets import Buckets


class Crash(L.Callback):
    """Ends the run in the middle of its n-th micro-batch, whatever was last saved."""

    def __init__(self, number: int):
        self.number, self.seen = number, itertools.count(1)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.rand(3)  # others may draw between two steps
        if next(self.seen) == self.number:
            raise RuntimeError("crash")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    fit(pictures, folder := tmp_path_factory.mktemp("undisturbed"))
    return folder


def test_a_run_that_crashed_ends_as_the_undisturbed_one(pictures, undisturbed, tmp_path):
    """In mid-accumulation, at the end of an epoch, in the next one."""
    for number in (6, 9, 12):
        folder = tmp_path / str(number)
        with pytest.raises(RuntimeError, match="crash"):
            fit(pictures, folder, callbacks=(Crash(number),), workers=0)
        fit(pictures, folder, resume=True, workers=0)
        assert same(held(folder), held(undisturbed)), number


def test_a_run_that_is_made_longer_goes_on_in_mid_epoch(pictures, tmp_path):
    plain = {"lr_scheduler": "constant", "workers": 0}
    fit(pictures, tmp_path / "long", steps=4, **plain)
    fit(pictures, tmp_path / "short", steps=3, **plain)
    fit(pictures, tmp_path / "short", steps=4, resume=True, **plain)
    assert same(held(tmp_path / "short"), held(tmp_path / "long"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"batch_size": 3}, "train_batch_size 4, now 3"),
        ({"batch_size": 16, "validate_every": 2}, "train_batch_size 4, now 16"),
        ({"buckets": Buckets(2.0, 8)}, "buckets None, now of max_ratio 2.0 and step 8"),
        ({"batch_size": 2, "buckets": Buckets(2.0, 8)}, "train_batch_size 4, now 2; buckets None, now of .*"),
    ],
)
def test_batches_of_another_kind_from_a_checkpoint_on_are_said(pictures, tmp_path, capfd, change, told):
    """Steps of two batches, nine an epoch: it goes on after eight, even where an epoch has fewer now."""
    plain = {"lr_scheduler": "constant", "workers": 0}
    fit(pictures, tmp_path, steps=4, **plain)
    capfd.readouterr()
    fit(pictures, tmp_path, steps=6, resume=True, **plain, **change)
    said = re.findall(
        "warning: the checkpoint was made with (.*): batches are others from here on\n", capfd.readouterr().out
    )
    assert re.fullmatch(told, "|".join(said)) if told else not said
    assert held(tmp_path)["global_step"] == 6


def test_a_checkpoint_that_does_not_know_its_batches_says_nothing(pictures, tmp_path, capfd):
    plain = {"lr_scheduler": "constant", "workers": 0}
    fit(pictures, tmp_path, steps=4, **plain)
    state = torch.load(path := tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    (loader,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert loader.pop("follows")["train_batch_size"] == 4 and loader == {"batches": 8}
    torch.save(state, path)
    capfd.readouterr()
    fit(pictures, tmp_path, steps=6, resume=True, batch_size=3, **plain)
    assert "warning" not in capfd.readouterr().out


def test_what_is_drawn_between_two_steps_changes_no_training(pictures, tmp_path):
    class Drawing(L.Callback):
        def on_train_batch_start(self, *_):
            torch.rand(number)

    for number in (0, 5):
        fit(pictures, tmp_path / str(number), steps=3, workers=0, callbacks=(Drawing(),))
    assert same(held(tmp_path / "0"), held(tmp_path / "5"))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--kills", "12"), ("--kills", "3", "--processes", "2")], ids=["one", "two"])
def test_runs_that_were_killed_end_as_the_undisturbed_one(arguments):
    script = Path(__file__).parent.parent / "benchmarks" / "kill.py"
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs, all_runs = re.search(r"(\d+) of (\d+) runs equal", done.stdout).groups()
    assert runs == all_runs == arguments[1]
