"""A run that was interrupted and goes on is the run that was not, bit for bit; and its checkpoints are whole."""

import itertools

import lightning as L
import pytest
import torch
from fits import same
from interrupted import STEPS, fit, held, make_pictures


class Crash(L.Callback):
    """Ends the run in the middle of its n-th micro-batch, whatever was last saved."""

    def __init__(self, number: int):
        self.number, self.seen = number, itertools.count(1)

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        pass

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


def test_a_run_that_crashed_at_any_batch_ends_as_the_undisturbed_one(pictures, undisturbed, tmp_path):
    for number in (1, 4, 6, 8, 9, 10, 11, 12, 14, 16, 19):
        folder = tmp_path / str(number)
        with pytest.raises(RuntimeError, match="crash"):
            fit(pictures, folder, callbacks=(Crash(number),), workers=0)
        fit(pictures, folder, resume=True, workers=0)
        assert same(held(folder), held(undisturbed)), number
