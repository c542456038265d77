"""`priorguide export`: the run's network and the prior that won, as one bundle that is checked before it is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path as File
from typing import Any

from ..callbacks.redact import redact
from ..callbacks.wandb_log import log_bundle
from ..callbacks.wandb_run import follow_up
from ..sample.bundle import Bundle, Recorded
from ..sample.guidance import Guidance
from ..sample.manifest import verify
from ..sample.models import find
from .compare import comparison_of, refuse_existing
from .fine_tune import FineTune
from .fit import FitCLI, last_checkpoint, load_run

RECORDED_PICTURES = 16


def export_run(
    run: str | File,
    checkpoint: str | None = None,
    comparison: str | None = None,
    prior: str | None = None,
    scales: tuple[float, ...] | None = None,
    out: str | None = None,
    restricted: bool = False,
) -> File:
    """Writes the bundle that the comparison's verdict names, or the given prior and scales; verifies it apart."""
    run = File(run)
    folder = File(out) if out else run / "bundle"
    refuse_existing(folder)
    path = (File(comparison) if comparison else run / "comparison") / "record.json"
    record = json.loads(path.read_text()) if path.is_file() else None
    if record is None and (prior is None or scales is None):
        raise ValueError(f"there is no {path}: run `priorguide compare {run}` first, or give --prior and --scale")
    cli, state = load_run(run, checkpoint)
    cli.datamodule.setup("fit")
    export(cli, state, folder, record, prior, scales, restricted)
    print(verify_apart(folder))
    with follow_up(run, "export") as logged:
        log_bundle(logged, File(checkpoint) if checkpoint else last_checkpoint(run), folder, record)
    return folder


def export_model(run: str | File, checkpoint: str | None = None, out: str | None = None) -> File:
    """Writes the run's (averaged) model alone: a base for other runs, or a prior. No comparison is needed."""
    folder = File(out) if out else File(run) / "model"
    refuse_existing(folder)
    cli, state = load_run(run, checkpoint)
    with cli.model.deployed() as model:
        Bundle.save(folder, model, provenance=provenance(cli, state))
    print(f"a model in {folder}")
    return folder


def provenance(cli: FitCLI, state: dict[str, Any]) -> dict[str, Any]:
    """Where the weights come from: the step, the seed, and what started and fed the training."""
    config = cli.config
    return {
        "step": state.get("global_step"),
        "seed": config.seed_everything,
        "model": redact(config.model.model.as_dict()),  # a bundle is made to be passed on
        "data": redact(config.data.as_dict()),
    }


def export(
    cli: FitCLI,
    state: dict[str, Any],
    folder: File,
    record: dict[str, Any] | None,
    prior: str | None = None,
    scales: tuple[float, ...] | None = None,
    restricted: bool = False,
) -> Recorded:
    """Writes the bundle, its recorded batch from the first held-out conditions, and returns that batch."""
    callback, fine_tune = comparison_of(cli), cli.model
    assert isinstance(fine_tune, FineTune)
    verdict = (record or {}).get("verdict") or {}
    name = prior or verdict["prior"]
    wanted = scales or tuple(verdict["chosen"].get(name, verdict["scales"]))
    if name not in callback.priors:
        raise ValueError(f"prior must be among the run's candidates {sorted(callback.priors)}, got {name!r}")
    with fine_tune.deployed() as model:
        guidance: Guidance = callback.candidates(model, [wanted])[name, wanted]
        count = min(RECORDED_PICTURES, callback.num_conditions)
        condition = model.encode_condition(cli.datamodule.held_out(count))  # type: ignore[attr-defined]
        seeds = [callback.seed + i for i in range(count)]
        recorded = Recorded.draw(model, condition, seeds, guidance, callback.sampler)
        Bundle.save(
            folder,
            model,
            guidance=guidance,
            sampler=callback.sampler,
            recorded=recorded,
            evidence=record,
            provenance=provenance(cli, state),
            restricted=restricted,
        )
    return recorded


def verify_apart(folder: File) -> str:
    """What `priorguide verify` says of the bundle in a process of its own. RuntimeError where it fails."""
    command = [sys.executable, "-m", "priorguide.train.cli", "verify", str(folder)]
    manifest = verify(folder)
    for name in {stored["class"] for stored in (manifest["model"], manifest["prior"]) if stored}:
        if not (module := find(name).__module__).startswith("priorguide."):
            command += ["--import", module]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the bundle does not reproduce its pictures: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()
