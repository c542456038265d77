import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger
from wandb_fit import ARMS, KEY, SECRETS, STEPS, no_wandb_settings, write_config
from wandb_reader import read_log
from wandb_stub import Stub

from priorguide.callbacks import wandb_run
from priorguide.callbacks.wandb_log import log_bundle, log_result
from priorguide.callbacks.wandb_run import finish, follow_up, mode, start


@pytest.fixture
def environment(monkeypatch, tmp_path):
    with no_wandb_settings(monkeypatch, tmp_path):
        yield monkeypatch


def test_without_a_wandb_logger_nothing_is_logged(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {logger: false}")
    with follow_up(tmp_path, "compare") as logged:
        assert logged is None
        log_result(logged, {})
        log_bundle(logged, tmp_path / "none.ckpt", tmp_path)
    assert not (tmp_path / "wandb").exists()


def test_mode_is_online_with_a_key_only(environment, tmp_path):
    assert mode() == "offline"
    environment.setenv("WANDB_MODE", "online")
    assert mode() == "offline"
    (tmp_path / "no-netrc").write_text(f"machine example.org\n login user\n password {KEY}\n")
    assert mode() == "offline"
    environment.setenv("WANDB_BASE_URL", "https://example.org")
    assert mode() == "online"
    environment.delenv("WANDB_BASE_URL")
    environment.setenv("WANDB_API_KEY", KEY)
    assert mode() == "online"
    for wanted, found in (("disabled", "disabled"), ("offline", "offline"), ("dryrun", "offline")):
        environment.setenv("WANDB_MODE", wanted)
        assert mode() == found


def test_training_goes_on_where_logging_fails(environment, tmp_path):
    def broken(*_, **__):
        raise ConnectionResetError("Connection lost")

    broken_run = SimpleNamespace(log=broken, config={}, url=None)
    logger = WandbLogger(save_dir=tmp_path, offline=True, experiment=broken_run)
    start([logger], tmp_path, {})
    with pytest.warns(UserWarning, match="did not take what was logged: ConnectionResetError: Connection lost"):
        logger.log_metrics({"loss": 1.0}, step=1)


def test_work_after_the_fit_is_not_lost_where_logging_fails(monkeypatch, tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {logger: {class_path: WandbLogger, init_args: {}}}")
    monkeypatch.setattr(wandb_run, "_current", lambda: SimpleNamespace(dir=str(tmp_path / "wandb" / "run" / "files")))
    with (
        pytest.warns(UserWarning, match="did not take what was logged: OSError: disk full"),
        follow_up(tmp_path, "export"),
    ):
        raise OSError("disk full")


def test_a_server_out_of_reach_leaves_the_run_offline(environment, tmp_path):
    environment.setenv("WANDB_API_KEY", KEY)
    environment.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    environment.setenv("WANDB_INIT_TIMEOUT", "1")
    logger = WandbLogger(save_dir=tmp_path, project="tests")
    with pytest.warns(UserWarning, match="did not start online, so this run is logged offline: CommError"):
        start([logger], tmp_path, {"model": {"rank": 8}})
    logger.log_metrics({"loss": 0.5}, step=1)
    assert "offline" in finish()
    wandb.teardown()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    log = read_log(folder)
    assert log.config["model"] == {"rank": 8} and log.summary["loss"] == 0.5


def test_online_against_a_server(environment, tmp_path):
    config = write_config(tmp_path / "config.yaml", tmp_path / "run", {"project": "tests", "name": "tiny"})
    command = [sys.executable, "-m", "priorguide.train.cli", "fit", "--config", str(config)]
    tests = str(Path(__file__).parent.parent)
    with Stub() as server:
        extra = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env={**os.environ, **extra}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"W&B: {server.url}/tester/garments/runs/" in done.stdout
    for arm in ARMS:
        rows = [row for row in server.history if f"compare/{arm}/psnr" in row]
        assert [row["compare/step"] for row in rows] == STEPS
        assert all(row[f"pictures/{arm}/00"]["path"] in server.uploads for row in rows)
    assert server.configs[-1]["model"]["value"]["ema_decay"] == 0.9
    assert [artifact["input"]["artifactTypeName"] for artifact in server.artifacts] == ["run_table"] * len(STEPS)
    sent = "\n".join(f"{path}\n{body}" for path, body in server.bodies)
    assert "Notifier" in sent and not [secret for secret in SECRETS if secret in sent]
