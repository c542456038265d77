import json
import os
import secrets
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import wandb
import yaml
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from wandb_reader import read_records
from wandb_stub import Stub

from priorguide.callbacks import comparison, wandb_run
from priorguide.callbacks.redact import HIDDEN, redact
from priorguide.callbacks.wandb_log import log_bundle, log_comparison, log_result
from priorguide.callbacks.wandb_run import finish, follow_up, mode, start
from priorguide.sample.manifest import sha256
from priorguide.sample.pictures import to_uint8
from priorguide.train.compare import full_comparison, save_comparison
from priorguide.train.export import export
from priorguide.train.fit import fit, last_checkpoint, load_run

KEY = secrets.token_hex(20)
PLANTED = {
    "api_key": KEY,
    "webhook": f"https://robot:hunter2{secrets.token_hex(4)}@example.org/hook?room=3&access_token=t{secrets.token_hex(8)}",
    "headers": {"Authorization": f"Bearer b{secrets.token_hex(12)}"},
    "note": f"uses hf_{secrets.token_hex(16)} to download",
}
SECRETS = [
    KEY,
    PLANTED["webhook"].split("@")[0].split(":")[-1],
    PLANTED["webhook"].split("=")[-1],
    PLANTED["headers"]["Authorization"].split()[-1],
    PLANTED["note"].split()[1],
]
STEPS, ARMS, PICTURES = [2, 4, 6], ["none/1", "self/2", "base/2"], 3


class Notifier(L.Callback):
    """Somebody's own callback, with secrets among its arguments."""

    def __init__(self, api_key: str, webhook: str, headers: dict[str, str], note: str):
        pass


def tiny_config(root: Path, logger: dict) -> dict:
    create = "priorguide.sample.models.pixel.PixelUNet.create"
    small = {"resolution": 16, "fold": 4, "block_out_channels": [16, 32]}
    compare = {
        "priors": {"self": None, "base": {"class_path": create, "init_args": small}},
        "scales": [1.0, 2.0],
        "every_n_steps": 2,
        "num_conditions": 4,
        "num_pictures": PICTURES,
        "num_reference": 4,
        "sampler": {"scheduler": "ddim", "steps": 2},
        "metric_network": None,
        "rule": {"decide_by": "psnr", "guards": {}},
    }
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS[-1],
            "default_root_dir": str(root),
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "log_every_n_steps": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": logger},
            "callbacks": [
                {"class_path": f"{__name__}.Notifier", "init_args": PLANTED},
                {"class_path": "priorguide.callbacks.comparison.PriorComparison", "init_args": compare},
            ],
        },
        "model": {
            "model": {"class_path": create, "init_args": {**small, "image_channels": 1}},
            "drop": [{"parts": ["image"], "probability": 0.1}],
            "ema_decay": 0.9,
        },
        "data": {
            "class_path": "priorguide.data.labelled.LabelledImages",
            "init_args": {
                "source": "fashion",
                "transform": "edges",
                "resolution": 16,
                "train_batch_size": 8,
                "max_train_samples": 48,
                "label_column": SECRETS[-1],  # unused by this source; it is in the bundle's provenance
            },
        },
    }


def dump(config: dict) -> str:
    return yaml.safe_dump(config, sort_keys=False)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """No W&B settings of the machine's, and none left behind."""
    with clean_environment(monkeypatch, tmp_path):
        yield monkeypatch


def clean_environment(monkeypatch, folder):
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["WANDB_MODE", "WANDB_DATA_DIR"]:
        monkeypatch.setenv(name, "")  # so that the name is restored, whatever is done to it
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(folder / "no-netrc"))
    return Session()


class Session:
    def __enter__(self):
        wandb.teardown()

    def __exit__(self, *_):
        finish()
        wandb.teardown()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Fit, full comparison, export, all logged to one offline run, and a second, later comparison to another."""
    root = tmp_path_factory.mktemp("wandb") / "garments"
    seen = []

    def spy(loggers, step, evaluation, batch):
        seen.append((step, evaluation, batch))
        log_comparison(loggers, step, evaluation, batch)

    with pytest.MonkeyPatch.context() as patch, clean_environment(patch, root.parent):
        patch.setattr(comparison, "log_comparison", spy)
        config = root.parent / "config.yaml"
        config.write_text(dump(tiny_config(root, {"project": "tests", "name": "tiny", "offline": True})))
        fit(["--config", str(config)])
        cli, state = load_run(root)
        record, pictures, evaluation = full_comparison(cli, state)
        save_comparison(root / "report", cli, record, pictures, evaluation)
        export(cli, state, root / "bundle", record)
        with follow_up(root, "quickstart") as logged:
            log_result(logged, record, root / "report" / "index.html")
            log_bundle(logged, last_checkpoint(root), root / "bundle", record)
        told = finish()
        with follow_up(root, "compare") as logged:
            log_result(logged, record)
    first, second = sorted((root / "wandb").glob("offline-run-*"), key=lambda f: "compare/none" not in records_text(f))
    return SimpleNamespace(
        root=root, folder=first, later=second, log=read_log(first), seen=seen, record=record, told=told
    )


def records_text(folder: Path) -> str:
    return "".join(map(str, read_records(folder)))


def read_log(folder: Path) -> SimpleNamespace:
    """What an offline run logged: history rows, summary, config, each key's axis, artifacts, the run's own record."""
    log = SimpleNamespace(history=[], summary={}, config={}, axes={}, artifacts=defaultdict(list), run=None)

    def put(into, items):
        for item in items:
            *path, last = list(item.nested_key) or [item.key]
            inner = into
            for part in path:
                inner = inner.setdefault(part, {})
            inner[last] = json.loads(item.value_json)
        return into

    for record in read_records(folder):
        kind = record.WhichOneof("record_type")
        content = getattr(record, kind)
        if kind == "history":
            log.history.append(put({}, content.item))
        elif kind == "summary":
            put(log.summary, content.update)
        elif kind == "config":
            put(log.config, content.update)
        elif kind == "metric":
            log.axes[content.name or content.glob_name] = content.step_metric
        elif kind == "artifact":
            log.artifacts[content.type].append(content)
        elif kind == "run":
            log.run = content
    return log


def rows_with(log, key):
    return [row for row in log.history if key in row]


def table_of(artifact):
    """A logged table, and where its artifact keeps each file."""
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    [name] = [name for name in files if name.endswith(".table.json")]
    return json.loads(files[name].read_text()), files


def test_metrics_have_fixed_keys_on_their_own_axis(run):
    for arm in ARMS:
        key = f"compare/{arm}/psnr"
        assert [row["compare/step"] for row in rows_with(run.log, key)] == STEPS
        assert run.log.axes[key] == "compare/step"
    prior_2 = [
        next(r for r in evaluation.rows() if (r["prior"], r["scales"]) == ("base", [2.0]))
        for _, evaluation, _ in run.seen
    ]
    logged = [row["compare/base/2/psnr"] for row in rows_with(run.log, "compare/base/2/psnr")]
    assert logged == [row["metrics"]["psnr"]["value"] for row in prior_2]
    assert run.log.axes["*"] == "trainer/global_step", "Lightning's own axis stays the others'"


def test_pictures_have_fixed_keys_and_are_the_sampled_ones(run):
    pictures = {
        f"pictures/{arm}/{i:02d}": evaluation_key
        for arm, evaluation_key in zip(ARMS, [("self", (1.0,)), ("self", (2.0,)), ("base", (2.0,))], strict=True)
        for i in range(PICTURES)
    }
    assert {key for row in run.log.history for key in row if key.startswith("pictures/")} == set(pictures)
    for key, arm in pictures.items():
        rows = rows_with(run.log, key)
        assert [row["compare/step"] for row in rows] == STEPS and run.log.axes[key] == "compare/step"
        for row, (_, evaluation, _) in zip(rows, run.seen, strict=True):
            shown = np.asarray(Image.open(run.folder / "files" / row[key]["path"]))
            assert np.array_equal(shown, to_uint8(evaluation.pictures[arm][int(key[-2:])])[..., 0])
            assert shown.std() > 5, "neither black nor grey"


def test_the_table_has_a_row_per_condition_and_a_visible_picture_per_prior(run):
    tables = [a for a in run.log.artifacts["run_table"] if "comparetable" in a.name]
    assert len(tables) == len(STEPS) and run.log.axes["compare/table"] == "compare/step"
    for artifact, (_, evaluation, batch) in zip(tables, run.seen, strict=True):
        table, files = table_of(artifact)
        assert table["columns"] == ["index", "label", "condition", *ARMS, "target"]
        assert len(table["data"]) == PICTURES
        expected = [batch["image"], evaluation.pictures["base", (2.0,)], batch["pixels"]]
        for i, row in enumerate(table["data"]):
            cells = dict(zip(table["columns"], row, strict=True))
            assert cells["index"] == i and cells["label"] == batch["label"][i]
            for column, pictures in zip(["condition", "base/2", "target"], expected, strict=True):
                shown = np.asarray(Image.open(files[cells[column]["path"]]))
                assert np.array_equal(shown, to_uint8(pictures[i])[..., 0])


def test_the_folder_gets_the_same(run):
    lines = [json.loads(line) for line in (run.root / "compare" / "metrics.jsonl").read_text().splitlines()]
    for line, row in zip(lines, rows_with(run.log, "compare/self/2/psnr"), strict=True):
        assert line["step"] == row["compare/step"]
        values = {f"compare/{r['prior']}/{r['scales'][0]:g}/psnr": r["metrics"]["psnr"]["value"] for r in line["rows"]}
        assert values.items() <= row.items()
    panel = rows_with(run.log, "compare/panel")[-1]["compare/panel"]
    ours = np.asarray(Image.open(run.root / "compare" / "panel-00000006.png"))
    assert np.array_equal(np.asarray(Image.open(run.folder / "files" / panel["path"])), ours)


def test_the_config_is_whole_but_for_its_secrets(run):
    assert run.log.config["trainer"]["max_steps"] == STEPS[-1]
    assert run.log.config["model"]["learning_rate"] == 1e-4, "defaults are resolved"
    notifier, compare = run.log.config["trainer"]["callbacks"]
    assert compare["init_args"]["num_pictures"] == PICTURES
    assert notifier["init_args"] == {
        "api_key": HIDDEN,
        "webhook": f"https://{HIDDEN}@example.org/hook?room=3&access_token={HIDDEN}",
        "headers": {"Authorization": HIDDEN},
        "note": f"uses {HIDDEN} to download",
    }


def test_no_secret_is_in_anything_that_leaves_the_machine(run):
    local = (run.root / "config.yaml").read_text()
    assert all(secret in local for secret in SECRETS), "a run resumes with what it was given"
    files = [f for folder in ("wandb", "bundle", "report") for f in (run.root / folder).rglob("*") if f.is_file()]
    assert any(f.suffix == ".wandb" for f in files)
    for file in files:
        assert not [secret for secret in SECRETS if secret.encode() in file.read_bytes()], file


def test_the_summary_has_the_verdict(run):
    verdict, summary = run.record["verdict"], run.log.summary
    assert summary["verdict/prior"] == verdict["prior"]
    assert summary["verdict/scale"] == verdict["scales"][0]
    assert summary["verdict/sentence"] == verdict["sentence"]
    assert summary["verdict/confident"] is verdict["confident"]
    for prior, scales in verdict["chosen"].items():
        [row] = [r for r in run.record["rows"] if r["scales"] == list(scales) and r["prior"] in (prior, "none")]
        assert summary[f"best/{prior}/scale"] == scales[0]
        assert summary[f"best/{prior}/psnr"] == row["metrics"]["psnr"]["value"]
        for cost in ("seconds_per_image", "evaluations", "extra_bytes"):
            assert summary[f"best/{prior}/{cost}"] == row[cost]


def test_every_prior_and_scale_is_in_the_result_table(run):
    [artifact] = [a for a in run.log.artifacts["run_table"] if "resultscales" in a.name]
    table, _ = table_of(artifact)
    costs = ["seconds_per_image", "evaluations", "extra_bytes"]
    assert table["columns"] == ["prior", "scale", "psnr", "psnr_error", *costs]
    expected = [
        [
            r["prior"],
            r["scales"][0],
            r["metrics"]["psnr"]["value"],
            r["metrics"]["psnr"]["error"],
            *(r[c] for c in costs),
        ]
        for r in run.record["rows"]
    ]
    assert table["data"] == expected and len(expected) == 3


def test_the_page_is_logged(run):
    [row] = rows_with(run.log, "result/page")
    logged = (run.folder / "files" / row["result/page"]["path"]).read_text()
    assert logged == (run.root / "report" / "index.html").read_text()
    assert row["compare/step"] == STEPS[-1]


def test_the_bundle_says_which_checkpoint_it_came_from(run):
    [model], [bundle] = run.log.artifacts["model"], run.log.artifacts["bundle"]
    checkpoint = run.root / "checkpoints" / "last.ckpt"
    source, told = json.loads(model.metadata), json.loads(bundle.metadata)
    assert source == {"checkpoint": "last.ckpt", "checkpoint_sha256": sha256(checkpoint), "step": STEPS[-1]}
    assert source.items() <= told.items() and told["checkpoint_artifact"] == model.name
    assert told["manifest_sha256"] == sha256(run.root / "bundle" / "priorguide.json")
    assert told["verdict/sentence"] == run.record["verdict"]["sentence"]
    files = {entry.path: Path(entry.local_path) for entry in bundle.manifest.contents}
    assert files == {str(f.relative_to(run.root / "bundle")): f for f in files.values()}, "no second copy on disk"
    assert set(files) == {str(f.relative_to(run.root / "bundle")) for f in (run.root / "bundle").rglob("*.*")}
    [entry] = model.manifest.contents
    assert Path(entry.local_path) == checkpoint


def test_large_artifacts_are_references(run, environment, tmp_path, monkeypatch):
    monkeypatch.setattr("priorguide.callbacks.wandb_log.UPLOAD_LIMIT", 1000)
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    start([logger], tmp_path, {})
    folder = Path(logger.experiment.dir).parent
    log_bundle(logger.experiment, last_checkpoint(run.root), run.root / "bundle")
    finish()
    wandb.teardown()  # only now the log is sure to be whole
    [model] = read_log(folder).artifacts["model"]
    [entry] = model.manifest.contents
    assert entry.ref == (run.root / "checkpoints" / "last.ckpt").as_uri() and not entry.local_path


def test_a_later_comparison_joins_the_group(run):
    later = read_log(run.later)
    assert (run.log.run.run_group, run.log.run.project) == ("garments", "tests")
    assert (later.run.run_group, later.run.project) == ("garments", "tests")
    assert (later.run.job_type, later.run.display_name) == ("compare", "tiny-compare")
    assert later.summary["verdict/sentence"] == run.record["verdict"]["sentence"]


def test_the_end_says_where_the_run_is(run):
    assert str(run.folder) in run.told and "wandb sync" in run.told


def test_what_is_staged_stays_in_the_folder(run):
    staged = [Path(entry.local_path) for a in run.log.artifacts["run_table"] for entry in a.manifest.contents]
    assert staged and all((run.root / "wandb" / "staged") in path.parents for path in staged)


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
    config = tmp_path / "config.yaml"
    config.write_text(dump(tiny_config(tmp_path / "run", {"project": "tests", "name": "tiny"})))
    command = [sys.executable, "-m", "priorguide.train.cli", "fit", "--config", str(config)]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    with Stub() as server:
        extra = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env={**os.environ, **extra}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"W&B: {server.url}/tester/garments/runs/" in done.stdout
    for arm in ARMS:
        rows = [row for row in server.history if f"compare/{arm}/psnr" in row]
        assert [row["compare/step"] for row in rows] == STEPS
        assert all(row[f"pictures/{arm}/00"]["path"] in server.uploads for row in rows)
    assert server.configs[-1]["model"]["value"]["ema_decay"] == 0.9
    tables = (
        [artifact["input"] for artifact in server.artifacts] if "input" in server.artifacts[0] else server.artifacts
    )
    assert [table["artifactTypeName"] for table in tables] == ["run_table"] * len(STEPS)
    sent = "\n".join(f"{path}\n{body}" for path, body in server.bodies)
    assert not [secret for secret in SECRETS if secret in sent]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_key", "anything"),
        ("WANDB_API_KEY", "anything"),
        ("hfToken", "anything"),
        ("db-password", 1234),
        ("credentials", {"user": "me", "pin": "12"}),
        ("auth", ["me", "12"]),
    ],
)
def test_redact_knows_secrets_by_their_key(name, value):
    assert redact({"data": [{name: value}]}) == {"data": [{name: HIDDEN}]}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"hf_{'Ab1' * 11}", HIDDEN),
        (KEY, HIDDEN),
        (f"key {KEY}.", f"key {HIDDEN}."),
        ("s3://me:pass@host/bucket", f"s3://{HIDDEN}@host/bucket"),
        ("https://h/x.tar?X-Amz-Signature=ab12&part=2", f"https://h/x.tar?X-Amz-Signature={HIDDEN}&part=2"),
        ("--token=abc --rank=8", f"--token={HIDDEN} --rank=8"),
        ("Authorization: Bearer abcdefgh.ij", f"Authorization: Bearer {HIDDEN}"),
        ("AKIAABCDEFGHIJKLMNOP", HIDDEN),
        ("ghp_" + "a1" * 18, HIDDEN),
    ],
)
def test_redact_knows_secrets_by_their_form(text, left):
    assert redact({"note": text, "list": (text,)}) == {"note": left, "list": (left,)}


def test_redact_knows_the_secrets_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse")
    assert redact({"note": "say correct-horse"}) == {"note": f"say {HIDDEN}"}
    monkeypatch.delenv("MY_SERVICE_TOKEN")
    assert redact({"note": "say correct-horse"}) == {"note": "say correct-horse"}


def test_redact_keeps_everything_else():
    config = {
        "revision": KEY,
        "max_tokens": 77,
        "tokenizer": "openai/clip",
        "token_dropout": 0.1,
        "use_auth": True,
        "api_key": None,
        "path": "hf://datasets/someone/pictures",
        "url": "https://example.org/a@b?page=2",
        "lr_multipliers": {"class_embedding": 10},
        "betas": (0.9, 0.999),
        "keyframes": "key",
    }
    copy = json.loads(json.dumps(config))
    assert redact(config) == config
    assert json.loads(json.dumps(config)) == copy
