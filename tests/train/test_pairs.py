"""Two processes over gloo, under both strategies: comparisons change no training, and what befalls one process."""

import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import lightning as L
import pytest
import torch
from fits import same
from interrupted import held, make_pictures
from pairs import log, run, started

from priorguide.callbacks.comparison import PriorComparison

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 6


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def undisturbed(pictures, kind, tmp_path_factory) -> Path:
    run(folder := tmp_path_factory.mktemp(kind) / "run", pictures=pictures, kind=kind, steps=STEPS)
    return folder


def without_history(folder: Path) -> dict:
    return {name: value for name, value in held(folder).items() if name != "history"}


def test_comparisons_change_no_training(pictures, kind, undisturbed, tmp_path):
    """Weights, average, optimiser, schedule and every process's generators are bit for bit those without them."""
    run(tmp_path / "run", pictures=pictures, kind=kind, steps=STEPS, every=1000)
    assert held(tmp_path / "run")["history"] == [[]] and len(held(undisturbed)["history"][0]) == 2
    assert same(without_history(tmp_path / "run"), without_history(undisturbed))


def test_two_machines_of_one_process_are_one_of_two(pictures, kind, undisturbed, tmp_path):
    run(tmp_path / "run", machines=2, pictures=pictures, kind=kind, steps=STEPS)
    assert same(held(tmp_path / "run"), held(undisturbed))


# --- out of memory, on one process alone


def out_of_memory_in_a_block(rank: int) -> dict:
    """In the midst of the network, of the second denoising step."""
    return {"callbacks": (Hungry(rank, within=True),)}


def out_of_memory_after_the_network(rank: int) -> dict:
    return {"callbacks": (Hungry(rank, within=False),)}


class Hungry(L.Callback):
    """On rank 1, sampling with more than one row of condition runs out of memory."""

    def __init__(self, rank: int, within: bool):
        self.rank, self.within = rank, within

    def setup(self, trainer, pl_module, stage):
        if self.rank != 1:
            return
        model, calls = pl_module.model, []

        def fails(module, arguments):
            calls.append(len(arguments[0]))
            if not trainer.validating and len(arguments[0]) > 4 and len(calls) > 1:  # 4 rows a condition
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        if self.within:
            pl_module.average.mid_block.register_forward_pre_hook(fails)
        else:
            decode = model.decode

            def decoding(x_0):
                if len(x_0) > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return decode(x_0)

            model.decode = decoding

    def on_train_end(self, trainer, *_):
        (comparison,) = (c for c in trainer.callbacks if isinstance(c, PriorComparison))
        print(*(f"a batch of {size}" for size in comparison.sizes.values()), file=sys.stderr)


@pytest.mark.parametrize("where", [out_of_memory_in_a_block, out_of_memory_after_the_network])
def test_one_process_without_memory_in_a_comparison(pictures, kind, undisturbed, tmp_path, where):
    """All go on, with the same training and, up to rounding, the same pictures."""
    run(tmp_path / "run", where, pictures=pictures, kind=kind, steps=STEPS)
    assert same(without_history(tmp_path / "run"), without_history(undisturbed))
    (found,), (expected,) = held(tmp_path / "run")["history"], held(undisturbed)["history"]
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for one, two in zip(found, expected, strict=True):
        for row, other in zip(one["rows"], two["rows"], strict=True):
            assert (row["prior"], row["scales"]) == (other["prior"], other["scales"])
            assert row["metrics"]["psnr"]["value"] == pytest.approx(other["metrics"]["psnr"]["value"], rel=1e-4)
    said = [log(tmp_path / "run", rank).read_text() for rank in (0, 1)]
    assert "a batch of 1" in said[1] and ("a batch of 1" in said[0]) == (kind == "fsdp")


# --- SIGTERM


@pytest.mark.parametrize("seed", range(3))
def test_sigterm_to_one_process_at_a_random_moment(pictures, kind, undisturbed, tmp_path, seed):
    """Both leave, and the run that goes on ends as the undisturbed one."""
    draw, folder = random.Random(seed), tmp_path / "run"
    with started(folder, pictures=pictures, kind=kind, steps=STEPS) as pair:
        while not (folder / "checkpoints" / "last.ckpt").exists():
            assert all(process.is_alive() for process in pair), log(folder, 0).read_text()
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.6))
        with suppress(ProcessLookupError):  # it was over before
            os.kill(pair[draw.randrange(2)].pid, signal.SIGTERM)
    codes = [process.exitcode for process in pair]
    assert codes in ([75, 0], [0, 0]), log(folder, 0).read_text()  # [0, 0]: it was over before
    if codes[0]:
        run(folder, pictures=pictures, kind=kind, steps=STEPS, resume=True)
    assert same(held(folder), held(undisturbed))


class Terminate(L.Callback):
    """A SIGTERM to this process in the first batch of validation that follows a whole step."""

    def on_validation_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_end(self, trainer, *_):
        assert trainer.global_step != 2


def in_validation(rank: int) -> dict:
    return {"callbacks": (Terminate(),) if rank == 1 else (), "validate_every": 4}


def rarely(rank: int) -> dict:
    return {"validate_every": 4}


def test_sigterm_to_one_process_in_validation(pictures, kind, undisturbed, tmp_path):
    run(tmp_path / "run", in_validation, codes=(75, 0), pictures=pictures, kind=kind, steps=STEPS)
    assert held(tmp_path / "run")["global_step"] == 2
    run(tmp_path / "run", rarely, pictures=pictures, kind=kind, steps=STEPS, resume=True)
    assert same(held(tmp_path / "run"), held(undisturbed))


# --- uneven work, and a process that dies


class Slow(L.Callback):
    def on_train_batch_start(self, *_):
        time.sleep(0.3)


def one_is_slow(rank: int) -> dict:
    return {"callbacks": (Slow(),) if rank == 1 else ()}


def test_a_slow_process_changes_nothing(pictures, kind, undisturbed, tmp_path):
    """Nor do 39 pictures and 5 conditions, which two cannot share evenly."""
    run(tmp_path / "run", one_is_slow, pictures=pictures, kind=kind, steps=STEPS)
    assert same(held(tmp_path / "run"), held(undisturbed))


def dies_in_training(rank: int) -> dict:
    return {"callbacks": (Dies(),) if rank == 1 else ()}


class Dies(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def dies_in_a_comparison(rank: int) -> dict:
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        PriorComparison.candidates = die
    return {}


@pytest.mark.parametrize("where", [dies_in_training, dies_in_a_comparison])
def test_a_process_that_dies(pictures, kind, undisturbed, tmp_path, where):
    """The other one ends within a minute, with an error that the command puts into a sentence; the run goes on."""
    with started(tmp_path / "run", where, pictures=pictures, kind=kind, steps=STEPS) as pair:
        pair[1].join(180)
        pair[0].join(60)
        assert [process.exitcode for process in pair] == [1, -signal.SIGKILL]
    assert "by peer" in log(tmp_path / "run", 0).read_text()
    run(tmp_path / "run", pictures=pictures, kind=kind, steps=STEPS, resume=True)
    assert same(held(tmp_path / "run"), held(undisturbed))
