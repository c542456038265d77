"""Every system the whole way on a GPU: trained in bf16, compared, exported with its prior, sampled again."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from runs import SYSTEMS, configs
from safetensors.torch import load_file

from priorguide.sample.bundle import Bundle
from priorguide.train.cli import main

pytestmark = pytest.mark.gpu
STEPS = 4


def fit(run: Path, *names: str, **options: str) -> None:
    """A few steps and one comparison under these configs, on the GPU."""
    options = {
        "trainer.accelerator": "gpu",
        "trainer.precision": "bf16-mixed",
        "trainer.max_steps": str(STEPS),
        "trainer.callbacks.init_args.every_n_steps": str(STEPS),
        "checkpoint.every_n_train_steps": str(STEPS),
        "trainer.default_root_dir": str(run),
    } | options
    assert (
        main(["fit", *configs(*names), *(word for key, value in options.items() for word in (f"--{key}", value))]) == 0
    )
    (line,) = (run / "compare" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == STEPS


@pytest.mark.parametrize("system", SYSTEMS)
def test_it_goes_the_whole_way(system, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("priorguide.train.export.verify_apart", lambda folder: "not verified apart")
    run, bundle = tmp_path / "run", tmp_path / "run" / "bundle"
    fit(run, system, f"{system}_offline")
    assert main(["compare", str(run)]) == 0
    record = json.loads((run / "comparison" / "record.json").read_text())
    assert record["environment"]["device"] == torch.cuda.get_device_name()
    prior, scales = next(
        (row["prior"], row["scales"]) for row in record["rows"] if row["prior"] not in ("none", "self")
    )
    assert main(["export", str(run), "--prior", prior, "--scale", ":".join(f"{scale:g}" for scale in scales)]) == 0
    assert main(["verify", str(bundle), "--device", "cuda"]) == 0
    assert "recorded pictures: bit for bit the same" in capsys.readouterr().out
    assert main(["sample", str(bundle), "--recorded", "--device", "cuda", "--out", str(tmp_path / "pictures")]) == 0
    loaded = Bundle.load(bundle)  # on the CPU, whose pictures are the GPU's but for rounding
    recorded = loaded.recorded()
    found = loaded.sample(recorded.condition, recorded.seeds)
    assert (found - recorded.pictures).square().mean().sqrt() < 0.02
    assert recorded.pictures.std() > 0


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_adapter_compares_with_its_own_base(system, tmp_path):
    priors = {"trainer.callbacks.init_args.priors": "{self: null, base: base}"}
    fit(tmp_path / "run", system, f"{system}_offline", "lora", **priors)
    assert main(["export", str(tmp_path / "run"), "--model-only"]) == 0


@pytest.mark.parametrize("system", ["dit", "instruct_pix2pix"])
def test_training_on_encoded_samples(system, tmp_path):
    fit(tmp_path / "run", system, f"{system}_offline", **{"data.init_args.cache.folder": str(tmp_path / "cache")})
    shard = load_file(next((tmp_path / "cache").glob("*.safetensors")))
    assert all(part.isfinite().all() for part in shard.values() if part.is_floating_point())
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["init_args"]["cache"]
