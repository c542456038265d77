"""Two processes over gloo, by the command itself: fit, stop, go on, die; the same for both strategies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fits import same
from oracle import assert_near
from runs import CONFIGS

from priorguide.train.cli import main
from priorguide.train.fit import load_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FOREVER = 100_000


@contextmanager
def running(edges: Path, kind: str, root: Path, steps: int) -> Iterator[subprocess.Popen]:
    """`priorguide fit` on two CPU processes in `root`, to go on there if it is a run already."""
    command = [sys.executable, "-m", "priorguide.train.cli", "fit", "--config", str(edges), "--ckpt_path", "last"]
    command += ["--config", str(CONFIGS / f"{kind}.yaml"), "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    command += ["--trainer.default_root_dir", str(root), "--trainer.max_steps", str(steps)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as run:
        try:
            yield run
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)


def until_saved(run: subprocess.Popen, root: Path) -> None:
    while run.poll() is None and not (root / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.1)
    assert run.poll() is None, run.communicate()[1]


def other(run: subprocess.Popen) -> int:
    """The process that the first one started."""
    found = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    (child,) = [int(pid) for pid in found if b"priorguide" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return child


def last(root: Path) -> dict:
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fit_compare_export(edges, tmp_path, kind):
    with running(edges, kind, tmp_path / kind, 4) as run:
        out, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert out.count("effective batch: 16 = 8 (train_batch_size) x 1 (accumulate_grad_batches) x 2 (processes)") == 1
    states = last(tmp_path / kind)["random"]["cpu"]
    assert len(states) == 2 and not torch.equal(*states)
    _, held = load_run(tmp_path / kind)
    assert held["global_step"] == 4
    assert main(["compare", str(tmp_path / kind), "--scales", "1,2"]) == 0
    assert main(["export", str(tmp_path / kind)]) == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("to", ["first", "other"])
def test_sigterm_to_one_stops_both_and_they_go_on(edges, tmp_path, kind, to):
    with running(edges, kind, tmp_path, FOREVER) as run:
        until_saved(run, tmp_path)
        os.kill(run.pid if to == "first" else other(run), signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 75, said
    assert said.count("priorguide: stopped by SIGTERM") == 1
    step = last(tmp_path)["global_step"]
    with running(edges, kind, tmp_path, step + 3) as run:
        _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert last(tmp_path)["global_step"] == step + 3


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("dies", ["first", "other"])
def test_a_process_that_dies_ends_the_run(edges, tmp_path, dies, kind):
    with running(edges, kind, tmp_path, FOREVER) as run:
        until_saved(run, tmp_path)
        began = time.monotonic()
        os.kill(run.pid if dies == "first" else other(run), signal.SIGKILL)
        _, said = run.communicate(timeout=60)  # until both have closed their end of it
    assert time.monotonic() - began < 60 and run.returncode != 0
    assert "another process of this run has died" in said or "terminated with code -9" in said


def test_both_strategies_train_and_compare_alike(edges, tmp_path):
    for kind in ("ddp", "fsdp"):
        with running(edges, kind, tmp_path / kind, 4) as run:
            _, said = run.communicate(timeout=300)
        assert run.returncode == 0, said
    one, two = last(tmp_path / "ddp"), last(tmp_path / "fsdp")
    assert same(one["random"], two["random"])
    for name, tensor in one["state_dict"].items():
        assert_near(two["state_dict"][name], tensor)
