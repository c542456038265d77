import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from wandb_fit import ARMS, PICTURES, SECRETS, STEPS, no_wandb_settings, write_config
from wandb_reader import read_log

from priorguide.callbacks import comparison
from priorguide.callbacks.redact import HIDDEN
from priorguide.callbacks.wandb_log import DECISION, log_bundle, log_comparison, log_result
from priorguide.callbacks.wandb_run import finish, follow_up, start
from priorguide.sample.manifest import sha256
from priorguide.sample.pictures import to_uint8
from priorguide.train.compare import save_comparison
from priorguide.train.export import export
from priorguide.train.fit import fit, last_checkpoint, load_run
from priorguide.train.record import full_comparison


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Fit, full comparison, export, all logged to one offline run, and a second, later comparison to another."""
    root = tmp_path_factory.mktemp("wandb") / "garments"
    seen = []

    def spy(loggers, step, evaluation, batch):
        seen.append((step, evaluation, batch))
        log_comparison(loggers, step, evaluation, batch)

    with pytest.MonkeyPatch.context() as patch, no_wandb_settings(patch, root.parent):
        patch.setattr(comparison, "log_comparison", spy)
        logger = {"project": "tests", "name": "tiny", "offline": True}
        fit(["--config", str(write_config(root.parent / "config.yaml", root, logger))])
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
    logs = {folder: read_log(folder) for folder in (root / "wandb").glob("offline-run-*")}
    [(folder, log), (_, later)] = sorted(logs.items(), key=lambda item: item[1].run.job_type)
    return SimpleNamespace(root=root, folder=folder, log=log, later=later, seen=seen, record=record, told=told)


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
        for cost in ("seconds_per_image", "evaluations", "extra_bytes", "peak_bytes"):
            assert summary[f"best/{prior}/{cost}"] == row[cost]


def test_the_summary_has_the_decision_record(run):
    found = {part: json.loads(run.log.summary[f"decision/{part}"]) for part in DECISION if part in run.record}
    assert found == json.loads(json.dumps({part: run.record[part] for part in found}))
    assert found.keys() >= {"verdict", "candidates", "checkpoints", "rows", "config", "data", "sampling"}
    for entry in run.record["verdict"]["comparisons"]:
        low, high = (run.log.summary[f"best/{entry['prior']}/{end}"] for end in ("low", "high"))
        assert [low, high] == list(entry["interval"])


def test_every_prior_and_scale_is_in_the_result_table(run):
    [artifact] = [a for a in run.log.artifacts["run_table"] if "resultscales" in a.name]
    table, _ = table_of(artifact)
    costs = ["seconds_per_image", "evaluations", "extra_bytes", "peak_bytes"]
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


def test_large_artifacts_are_references(run, monkeypatch, tmp_path):
    monkeypatch.setattr("priorguide.callbacks.wandb_log.UPLOAD_LIMIT", 1000)
    with no_wandb_settings(monkeypatch, tmp_path):
        logger = WandbLogger(save_dir=tmp_path, offline=True)
        start([logger], tmp_path, {})
        log_bundle(logger.experiment, last_checkpoint(run.root), run.root / "bundle")
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    [model] = read_log(folder).artifacts["model"]
    [entry] = model.manifest.contents
    assert entry.ref == (run.root / "checkpoints" / "last.ckpt").as_uri() and not entry.local_path


def test_a_later_comparison_joins_the_group(run):
    assert (run.log.run.run_group, run.log.run.project) == ("garments", "tests")
    assert (run.later.run.run_group, run.later.run.project) == ("garments", "tests")
    assert (run.later.run.job_type, run.later.run.display_name) == ("compare", "tiny-compare")
    assert run.later.summary["verdict/sentence"] == run.record["verdict"]["sentence"]


def test_the_end_says_where_the_run_is(run):
    assert str(run.folder) in run.told and "wandb sync" in run.told


def test_what_is_staged_stays_in_the_folder(run):
    staged = [Path(entry.local_path) for a in run.log.artifacts["run_table"] for entry in a.manifest.contents]
    assert staged and all((run.root / "wandb" / "staged") in path.parents for path in staged)
