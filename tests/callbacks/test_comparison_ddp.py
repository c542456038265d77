"""Two processes over gloo share a comparison's conditions, and find what one process finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import assert_near

TESTS = Path(__file__).parent.parent


def run(folder: Path, devices: int, kind: str = "ddp") -> list[dict]:
    folder.mkdir()
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(folder), str(devices), kind]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(devices)]


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_compare_as_one_does(tmp_path, kind):
    (alone,), ranks = run(tmp_path / "one", 1), run(tmp_path / "two", 2, kind)
    seeds = [set(rank["noise"]) for rank in ranks]
    assert seeds[0] | seeds[1] == set(range(7)) == set(alone["noise"])
    assert len(seeds[0] & seeds[1]) == 1  # the conditions are shared out; one fills the last place
    for rank in ranks:
        assert all(torch.equal(noise, alone["noise"][number]) for number, noise in rank["noise"].items())
        assert len(rank["pictures"]) == len(alone["pictures"]) == 2
        for found, expected in zip(rank["pictures"], alone["pictures"], strict=True):
            assert found.keys() == expected.keys()
            for name in expected:
                assert found[name].shape == (7, 1, 16, 16)
                assert_near(found[name], expected[name])
    assert ranks[0]["rows"] == ranks[1]["rows"]
    assert not torch.equal(ranks[0]["rng"], ranks[1]["rng"])
    lines = (tmp_path / "two" / "compare" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert len(list((tmp_path / "two" / "compare").iterdir())) == 4  # and two panels, and the last pictures
