"""What may come in the midst of a run: SIGTERM, no memory, a loss that is not finite, a damaged checkpoint."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from fits import Pictures, same, seed, trainer, tuning, weights
from interrupted import fit, held, make_pictures

from priorguide.callbacks.comparison import PriorComparison
from priorguide.callbacks.preemption import STATUS, Preempted
from priorguide.sample.compare import within_memory
from priorguide.train.checkpoint import newest_whole
from priorguide.train.cli import main


class Terminate(L.Callback):
    """A SIGTERM in the midst of the n-th micro-batch; `seen`: how many began."""

    def __init__(self, number: int):
        self.number, self.seen = number, 0

    def on_train_batch_start(self, *_):
        self.seen += 1
        if self.seen == self.number:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    fit(pictures, folder := tmp_path_factory.mktemp("undisturbed"), workers=0, steps=6)
    return folder


# --- SIGTERM


@pytest.mark.parametrize(("number", "last", "step"), [(5, 6, 3), (6, 6, 3), (9, 9, 5)])
def test_sigterm_saves_at_the_end_of_the_step(pictures, undisturbed, tmp_path, number, last, step):
    """Two micro-batches make a step, the ninth alone ends the epoch; a comparison that was due is made later."""
    before, terminate = signal.getsignal(signal.SIGTERM), Terminate(number)
    with pytest.raises(Preempted) as stop:
        fit(pictures, tmp_path, workers=0, steps=6, callbacks=(terminate,))
    assert stop.value.code == STATUS == 75 and signal.getsignal(signal.SIGTERM) == before
    assert terminate.seen == last and held(tmp_path)["global_step"] == step
    fit(pictures, tmp_path, workers=0, steps=6, resume=True)
    assert same(held(tmp_path), held(undisturbed))


def test_sigterm_in_the_last_step_costs_no_comparison(pictures, undisturbed, tmp_path):
    """A run whose steps are all done would not begin again: this one goes on from the checkpoint before."""
    with pytest.raises(Preempted):
        fit(pictures, tmp_path, workers=0, steps=6, callbacks=(Terminate(11),))
    assert held(tmp_path)["global_step"] == 4
    fit(pictures, tmp_path, workers=0, steps=6, resume=True)
    assert same(held(tmp_path), held(undisturbed))


def test_sigterm_in_the_last_step_saves_where_nothing_was_saved_before(pictures, tmp_path):
    with pytest.raises(Preempted):
        fit(pictures, tmp_path, workers=0, steps=2, callbacks=(Terminate(4),))
    assert held(tmp_path)["global_step"] == 2


def test_sigterm_inside_a_comparison_stops_at_the_next_denoising_step(pictures, undisturbed, tmp_path, monkeypatch):
    evaluate, steps = PriorComparison.evaluate, []

    def interrupted(self, *args, on_step, **options):
        def counting(step, total):
            steps.append(step)
            if len(steps) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            on_step(step, total)

        return evaluate(self, *args, on_step=counting, **options)

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(PriorComparison, "evaluate", interrupted)
        fit(pictures, tmp_path, workers=0, steps=6)
    assert steps == [1, 2] and held(tmp_path)["global_step"] == 3 and held(tmp_path)["history"] == [[]]
    fit(pictures, tmp_path, workers=0, steps=6, resume=True)
    assert same(held(tmp_path), held(undisturbed))
    lines = (tmp_path / "compare" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6]


class Validations(L.Callback):
    """What was validated, and a SIGTERM in the midst of the n-th batch of it; `seen`: how many began."""

    def __init__(self, number: int = 0):
        self.number, self.seen, self.found = number, 0, []

    def on_validation_batch_start(self, *_):
        self.seen += 1
        if self.seen == self.number:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_end(self, trainer, pl_module):
        self.found.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


def test_sigterm_inside_validation_stops_at_its_next_batch(pictures, undisturbed, tmp_path):
    """Three batches each: in mid-accumulation, where a step can be saved, at the end of an epoch."""
    fit(pictures, tmp_path / "whole", workers=0, steps=6, callbacks=(whole := Validations(),))
    assert [step for step, _ in whole.found] == [1, 3, 5] and same(held(tmp_path / "whole"), held(undisturbed))
    for number, last, step in ((1, 3, 2), (4, 4, 3), (5, 5, 3), (9, 9, 5)):
        folder, first, then = tmp_path / str(number), Validations(number), Validations()
        with pytest.raises(Preempted):
            fit(pictures, folder, workers=0, steps=6, callbacks=(first,))
        assert first.seen == last and held(folder)["global_step"] == step
        fit(pictures, folder, workers=0, steps=6, callbacks=(then,), resume=True)
        assert same(held(folder), held(undisturbed))
        assert first.found + then.found == whole.found  # a validation that was left is made again, whole


@pytest.mark.slow
def test_the_command_exits_with_75_and_goes_on(edges, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "priorguide.train.cli", "fit", "--config", str(edges), "--ckpt_path", "last"]
    command += ["--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps", "100000"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and not (tmp_path / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        out, said = run.communicate(timeout=60)
    assert run.returncode == 75
    assert said.splitlines()[-1] == "priorguide: stopped by SIGTERM; the same command with --ckpt_path last goes on"
    assert "effective batch: 8 = 8 (train_batch_size) x 1" in out
    step = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert main([*command[3:-1], str(step + 2)]) == 0


def test_help_tells_of_the_status(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "Exit status: 75 after a SIGTERM" in " ".join(capsys.readouterr().out.split())


# --- memory


def test_a_comparison_without_memory_halves_its_batch_and_remembers(pictures, undisturbed, tmp_path, monkeypatch):
    asked = []

    def hungry(*args, batch_size, **options):
        asked.append(batch_size)
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compare(*args, batch_size=batch_size, **options)

    from priorguide.callbacks.comparison import compare

    monkeypatch.setattr("priorguide.callbacks.comparison.compare", hungry)
    fit(pictures, tmp_path, workers=0, steps=6)
    assert asked == [2, 1, 1]  # and from then on one at a time
    assert same(held(tmp_path)["state_dict"], held(undisturbed)["state_dict"])


def test_a_comparison_of_one_without_memory_is_refused():
    def hungry(size):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with warnings.catch_warnings(), pytest.raises(MemoryError, match="one condition at a time ran out of memory"):
        warnings.simplefilter("ignore")
        within_memory(hungry, 4)


def test_training_without_memory_says_what_to_change(edges, tmp_path, monkeypatch, capsys):
    def hungry(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("priorguide.train.fine_tune.FineTune.loss", hungry)
    assert main(["fit", "--config", str(edges), "--trainer.default_root_dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    for name in ("train_batch_size", "accumulate_grad_batches", "gradient_checkpointing", "trainer.precision"):
        assert name in said


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    ends = []
    for on in (False, True):
        seed()
        tune = tuning(gradient_checkpointing=on)
        assert any(getattr(module, "gradient_checkpointing", False) for module in tune.model.network.modules()) == on
        trainer(tmp_path, 2).fit(tune, Pictures())
        ends.append(weights(tune))
    assert same(*ends)


# --- a gradient that is not finite


class Poison(L.Callback):
    """The pixels of these micro-batches are not numbers."""

    def __init__(self, *numbers: int):
        self.numbers, self.seen = numbers, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen += 1
        if self.seen in self.numbers:
            batch["pixels"].fill_(float("nan"))


def test_a_bad_step_is_left_out_and_written_down(pictures, tmp_path):
    tune = fit(pictures, tmp_path, workers=0, steps=4, callbacks=(Poison(4),), max_bad_steps=1)
    assert all(p.isfinite().all() for p in (*tune.model.network.parameters(), *tune.average.parameters()))
    (line,) = map(json.loads, (tmp_path / "bad_steps.jsonl").read_text().splitlines())
    assert (line["step"], line["epoch"], line["batches"]) == (1, 0, [2, 3])
    order = tune.trainer.train_dataloader.sampler
    order.set_epoch(0)
    assert line["samples"] == [[index for batch in list(order)[2:4] for _, index in batch]]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["bad_steps"] == 1


class Explode(L.Callback):
    """The gradient of these micro-batches is far too long, but finite."""

    def __init__(self, *numbers: int):
        self.numbers, self.seen = numbers, 0

    def on_after_backward(self, trainer, pl_module):
        self.seen += 1
        for parameter in pl_module.model.network.parameters() if self.seen in self.numbers else ():
            parameter.grad.mul_(1e4)


def test_a_step_that_explodes_is_left_out_as_well(pictures, tmp_path):
    """Once it is known what is usual: not the first one here."""
    options = {"workers": 0, "steps": 16, "every": 100, "validate_every": 9}
    tune = fit(pictures, tmp_path, callbacks=(Explode(1, 27),), max_bad_steps=1, **options)
    (line,) = map(json.loads, (tmp_path / "bad_steps.jsonl").read_text().splitlines())
    assert (line["step"], line["epoch"], line["batches"]) == (14, 2, [8])
    assert re.fullmatch(r"is \d+ times as long as usual \(max_gradient_growth: 100\)", line["fault"])
    stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["usual_gradient"]
    assert stored == {"log": tune.usual.log, "steps": 15}


def test_more_bad_steps_than_allowed_end_the_run(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"the gradient is no longer finite at step 1: lower .*bad_steps\.jsonl"):
        fit(pictures, tmp_path, workers=0, steps=4, callbacks=(Poison(2, 3),), max_bad_steps=1)
    assert len((tmp_path / "bad_steps.jsonl").read_text().splitlines()) == 2


def test_without_an_allowance_the_batch_is_written_down_as_well(pictures, tmp_path):
    with pytest.raises(ValueError, match="the loss is no longer finite at step 0"):
        fit(pictures, tmp_path, workers=0, steps=4, callbacks=(Poison(1),))
    assert json.loads((tmp_path / "bad_steps.jsonl").read_text())["batches"] == [0]


# --- checkpoints


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(pictures, undisturbed, tmp_path, damage):
    fit(pictures, tmp_path, workers=0, steps=5)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    content = bytearray((last := folder / "last.ckpt").read_bytes())
    for place in range(half := len(content) // 2, half + 500):  # more than the padding between two tensors
        content[place] ^= 1
    last.write_bytes(content if damage == "changed" else content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"last\.ckpt is not a whole checkpoint.*goes on from .*step=4\.ckpt"):
        assert newest_whole(tmp_path) == folder / "epoch=0-step=4.ckpt"
    (folder / "epoch=0-step=4.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint of .* can be read: .*last.ckpt"):
        newest_whole(tmp_path)


def test_the_newer_of_last_and_of_a_requeued_job(pictures, tmp_path):
    fit(pictures, tmp_path, workers=0, steps=2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert newest_whole(tmp_path / "none") is None and newest_whole(tmp_path) == last
    (requeued := tmp_path / "hpc_ckpt_1.ckpt").write_bytes(last.read_bytes())
    assert newest_whole(tmp_path) == requeued
    os.utime(requeued, (0, 0))
    assert newest_whole(tmp_path) == last


def test_a_folder_that_cannot_be_written_leaves_the_previous_one(pictures, tmp_path, monkeypatch):
    fit(pictures, tmp_path, workers=0, steps=2)
    folder = tmp_path / "checkpoints"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def read_only(self, mode="r", *args, **options):
        if "w" in mode:
            raise PermissionError(30, "Read-only file system")
        return opened(self, mode, *args, **options)

    opened = Path.open
    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(OSError, match=r"could not be written \(Read-only file system\)"):
        fit(pictures, tmp_path, workers=0, steps=4, resume=True, every=100)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_was_written_is_read_back_before_it_takes_a_place(pictures, tmp_path, monkeypatch):
    fit(pictures, tmp_path, workers=0, steps=2)
    before = (last := tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    write = torch.save
    monkeypatch.setattr(torch, "save", lambda held, file: (write(held, file), file.truncate(file.tell() // 2)))
    with pytest.raises(OSError, match="could not be written .*is not a whole checkpoint"):
        fit(pictures, tmp_path, workers=0, steps=4, resume=True)
    assert last.read_bytes() == before
