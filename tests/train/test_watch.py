"""`priorguide compare RUN --watch`: every checkpoint once, whole, until the run is complete."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from runs import CONFIGS, small

from priorguide.callbacks.comparison import PriorComparison
from priorguide.train.cli import main
from priorguide.train.watch import watch_run


def lines(folder):
    return [json.loads(line) for line in (folder / "watched" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def longer(edges, base, idx, tmp_path_factory):
    """A run of 6 steps that keeps every second one's checkpoint and never compares by itself."""
    folder = tmp_path_factory.mktemp("longer")
    config = small(CONFIGS / "fashion_edges.yaml", folder / "run", base, idx)
    config["trainer"] |= {"max_steps": 6}
    config["trainer"]["callbacks"][0]["init_args"]["every_n_steps"] = None
    config["checkpoint"] |= {"save_top_k": -1}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0
    assert not (folder / "run" / "compare").exists()
    return folder / "run"


@pytest.fixture
def watched(longer, tmp_path):
    """The run as it is before its first checkpoint, and what comes: (name, content) by step."""
    run = shutil.copytree(longer, tmp_path / "run")
    coming = [(file.name, file.read_bytes()) for file in sorted((run / "checkpoints").glob("epoch*.ckpt"))]
    assert len(coming) == 3
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    return run, coming


def test_each_checkpoint_is_compared_once_as_it_appears_and_never_half_written(watched, capsys, monkeypatch):
    run, coming = watched
    asked, evaluate = [], PriorComparison.evaluate

    def count(self, *args, **options):
        asked.append(options)
        return evaluate(self, *args, **options)

    monkeypatch.setattr(PriorComparison, "evaluate", count)
    seconds = iter(range(100))

    def sleep(_):
        """In place of the time that passes: first half of the first checkpoint is there, then all of it, and so on."""
        number, whole = divmod(next(seconds), 2)
        name, content = coming[number]
        assert len(asked) == number, "what is half there is left alone, and what was there is compared"
        (run / "checkpoints" / name).write_bytes(content if whole else content[: len(content) // 2])
        if whole:
            shutil.copy(run / "checkpoints" / name, run / "checkpoints" / "last.ckpt")

    assert watch_run(run, sleep=sleep) == [2, 4, 6]
    assert len(asked) == 3 and next(seconds) == 6
    assert [entry["step"] for entry in lines(run)] == [2, 4, 6]
    assert {row["prior"] for row in lines(run)[0]["rows"]} == {"self", "base"}
    assert len({json.dumps(entry["rows"]) for entry in lines(run)}) == 3
    names = ["index.html", "metrics.jsonl", *(f"panel-{step:08d}.png" for step in (2, 4, 6))]
    assert sorted(file.name for file in (run / "watched").iterdir()) == names
    assert "Over training" in (run / "watched" / "index.html").read_text()
    out = capsys.readouterr().out
    assert "step 4: MMD base, scale 2 " in out and "the run is complete: 3 steps" in out
    # once more: nothing is compared twice
    assert watch_run(run, sleep=sleep) == [] and len(asked) == 3
    # the full comparison draws its curves over training from it
    assert main(["compare", str(run), "--scales", "1,2"]) == 0
    record = json.loads((run / "comparison" / "record.json").read_text())
    assert [entry["step"] for entry in record["history"]] == [2, 4, 6]


def test_it_measures_what_the_runs_own_comparison_would(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "copied", ignore=shutil.ignore_patterns("comparison", "bundle"))
    assert watch_run(copied) == [2]
    (own,) = [json.loads(line) for line in (copied / "compare" / "metrics.jsonl").read_text().splitlines()]
    assert lines(copied) == [own]


def test_it_ends_when_nothing_comes(watched, capsys):
    run, coming = watched
    (run / "checkpoints" / "torn.ckpt").write_bytes(coming[0][1][:1000])
    assert main(["compare", str(run), "--watch", "--idle", "0"]) == 0
    assert "no new checkpoint for 0 seconds: 0 steps compared; not whole: torn.ckpt" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--watch", "--out", "x"], ["--idle", "3"], ["--watch", "--idle", "-1"]])
def test_options_that_do_not_go_together(longer, options, capsys):
    assert main(["compare", str(longer), *options]) == 2
    assert "--watch" in capsys.readouterr().err


@pytest.mark.slow
def test_it_watches_a_run_that_trains_meanwhile(longer, tmp_path):
    run = tmp_path / "run"
    config = yaml.safe_load((longer.parent / "config.yaml").read_text())
    config["trainer"] |= {"default_root_dir": str(run), "max_steps": 60}
    config["checkpoint"] |= {"every_n_train_steps": 20}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "priorguide.train.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, "compare", str(run), "--watch", "--idle", "300"], env=environment) as watcher:
        time.sleep(1)  # it waits for a run that is not there yet
        subprocess.run([*command, "fit", "--config", str(tmp_path / "config.yaml")], env=environment, check=True)
        assert watcher.wait(300) == 0
    assert [entry["step"] for entry in lines(run)] == [20, 40, 60]
