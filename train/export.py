"""`priorguide export`: the run's network and the prior that won, as one bundle that is checked before it is kept."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path as File
from typing import Any

from torch import Tensor, nn

from ..callbacks.quantities import candidate_text
from ..callbacks.records import LOGGED, read_logged
from ..callbacks.votes import decided
from ..callbacks.wandb_log import log_bundle
from ..callbacks.wandb_run import follow_up
from ..sample.adapter import Adapter
from ..sample.adapter_rows import Unadapted
from ..sample.bundle import Bundle, Recorded
from ..sample.cheaper import with_setting
from ..sample.checkpoints import parted
from ..sample.evaluate import to_device
from ..sample.guidance import Arm, Guidance
from ..sample.machine import row_major
from ..sample.manifest import new_folder, verify
from ..sample.model import DiffusionModel, with_network
from ..sample.models import find
from ..sample.precision import PRECISIONS, at_precision, guided_change
from ..sample.reference import Reference
from .adapters import adapter_of, base_of
from .compare import refuse_existing
from .fine_tune import FineTune
from .fit import FitCLI, last_checkpoint, load_run
from .provenance import finite, provenance
from .record import comparison_of, find_checkpoint

RECORDED_PICTURES = 16
LEVEL, ROUNDING = 1 / 255, 1e-3
"""What logged pictures are rounded to, and how far beyond that a recorded one may be from its logged one on average:
they were made in batches of another composition."""


def export_run(
    run: str | File,
    checkpoint: str | None = None,
    comparison: str | None = None,
    prior: str | None = None,
    scales: tuple[float, ...] | None = None,
    out: str | None = None,
    restricted: bool = False,
    prior_as: str | None = None,
) -> File:
    """Writes the bundle that the comparison's verdict names, or the given prior and scales. prior_as: see `export`."""
    run = File(run)
    folder = File(out) if out else run / "bundle"
    refuse_existing(folder)
    beside = File(comparison) if comparison else run / "comparison"
    path = beside / "record.json"
    record = json.loads(path.read_text()) if path.is_file() else None
    if record is None and (prior is None or scales is None):
        raise ValueError(f"there is no {path}: run `priorguide compare {run}` first, or give --prior and --scale")
    own = find_checkpoint(record or {}, run, prior or decided(record or {})["prior"]) if checkpoint is None else None
    file = File(checkpoint) if checkpoint else own or last_checkpoint(run)
    cli, state = load_run(run, file)
    if own is None and record and record.get("step") != state.get("global_step"):
        print(f"{path} was made of step {record.get('step')}, {file.name} is of step {state.get('global_step')}")
    step = state.get("global_step")
    logged = read_logged(beside / LOGGED, step)
    if not comparison_of(cli).placement.few_bits:  # with which priors are others while training
        logged = read_logged(run / "compare" / LOGGED, step) | logged
    cli.datamodule.setup("fit")
    print(export_checked(cli, state, folder, record, logged, prior, scales, restricted, prior_as))
    with follow_up(run, "export") as followed:
        log_bundle(followed, file, folder, record)
    return folder


def export_checked(cli: FitCLI, state: dict[str, Any], folder: File, *what: Any) -> str:
    """`export` aside; a process of its own verifies the bundle and replays its pictures; only then it takes its place.

    what: `export`'s further arguments. Returns what the process said.
    """
    with new_folder(folder) as aside:
        aside.rmdir()
        export(cli, state, aside, *what)
        said = verify_apart(aside)
    return said.replace(str(aside), str(folder))


def export_model(run: str | File, checkpoint: str | None = None, out: str | None = None) -> File:
    """Writes the run's (averaged) model alone: a base for other runs, or a prior. No comparison is needed."""
    folder = File(out) if out else File(run) / "model"
    refuse_existing(folder)
    cli, state = load_run(run, checkpoint)
    assert isinstance(cli.model, FineTune)
    with deployed(cli.model) as (model, adapter):
        Bundle.save(folder, model, provenance=provenance(cli, state), adapter=adapter)
    print(f"a model in {folder}")
    return folder


@contextmanager
def deployed(fine_tune: FineTune) -> Iterator[tuple[DiffusionModel, Adapter | None]]:
    """The averaged model with a plain network, as bundles load it, and the adapter that was merged into it, if any."""
    with fine_tune.averaged() as model:
        adapted = model.network
        adapter = adapter_of(adapted) if fine_tune.lora else None
        if adapter is not None:
            model.network = adapter.merged().eval().to(next(adapted.parameters()).device)
        to_row_major(model.network)
        try:
            yield model, adapter
        finally:
            model.network = adapted


def export(
    cli: FitCLI,
    state: dict[str, Any],
    folder: File,
    record: dict[str, Any] | None,
    logged: Mapping[Arm, Tensor] | None = None,
    prior: str | None = None,
    scales: tuple[float, ...] | None = None,
    restricted: bool = False,
    prior_as: str | None = None,
) -> Recorded:
    """Writes the bundle, its recorded batch from the first held-out conditions, and returns that batch.

    logged: the pictures (N, C, H, W) of the first N conditions that a comparison of these weights made with each arm;
    ValueError where the bundle's are others. prior_as: how a prior that is another network is stored: float32, a
    precision of PRECISIONS, with the change of the guided prediction measured on the recorded pictures, or
    owner/name@revision, where it lies on the Hub.
    """
    callback, fine_tune = comparison_of(cli), cli.model
    assert isinstance(fine_tune, FineTune)
    verdict = decided(record or {})
    named = prior or verdict["prior"]
    wanted = scales or tuple(verdict["chosen"].get(named, verdict["scales"]))
    name = parted(named)[0]
    if name not in callback.priors:
        raise ValueError(f"prior must be among the run's candidates {sorted(callback.priors)}, got {name!r}")
    held = None if prior_as in (None, "float32") else prior_as if prior_as in PRECISIONS else Reference.parse(prior_as)
    device = cli.trainer.strategy.root_device
    fine_tune.to(device)
    with fine_tune.averaged() as model:
        whole: Guidance = callback.candidates(model, [wanted])[name, wanted]
    with callback.on_device(device), deployed(fine_tune) as (model, adapter):
        guidance = whole = compared = _with_plain_prior(whole, model)
        if prior is None and scales is None:
            guidance = whole = with_setting(whole, record, named)
        if isinstance(held, str):
            if guidance.prior is None:
                raise ValueError(f"{name} guides by the fine-tuned network itself: leave --prior-as out")
            guidance = replace(guidance, prior=at_precision(guidance.prior, held))
        count = min(RECORDED_PICTURES, callback.num_conditions)
        examples = cli.datamodule.held_out(count)  # type: ignore[attr-defined]
        condition = model.encode_condition(to_device(examples, device))
        seeds = [callback.seed + i for i in range(count)]

        def draw(how: Guidance) -> Recorded:
            return Recorded.draw(model, condition, seeds, how, callback.sampler)

        recorded = draw(guidance)
        made = recorded if guidance is compared else draw(compared)
        change = None
        if guidance is not whole:
            x_0 = model.encode_pixels(recorded.pictures.to(device))
            change = guided_change(model, whole, guidance, x_0, condition)
            print(f"the prior in {held} moves the guided prediction by {change['mean_relative_rms']:.2e} of its size")
        print(compared_with(made.pictures, (logged or {}).get((name, wanted)), candidate_text(name, wanted)))
        Bundle.save(
            folder,
            model,
            guidance=guidance,
            sampler=callback.sampler,
            recorded=recorded,
            evidence=finite(record),
            provenance=provenance(cli, state, name, examples),
            restricted=restricted,
            adapter=adapter,
            prior_held=held,
            prior_change=change,
        )
    return recorded


def to_row_major(network: nn.Module) -> None:
    """As the bundle's weights will lie when they are read: training may have had its kernels' channels last."""
    for parameter in network.parameters():
        parameter.data = row_major(parameter.data)


def compared_with(pictures: Tensor, logged: Tensor | None, arm: str) -> str:
    """What the pictures are beside those that the comparison logged of the same conditions and seeds, in a sentence.

    ValueError where one differs by more than rounding: other weights, data or code than were compared.
    """
    if logged is None:
        return f"no comparison of these weights logged pictures of {arm}: compared with none"
    count = min(len(pictures), len(logged))
    if pictures.shape[1:] != logged.shape[1:]:
        raise ValueError(f"the comparison logged pictures of {arm} of shape {[*logged.shape[1:]]}, the bundle makes "
                         f"{[*pictures.shape[1:]]}: compare again")  # fmt: skip
    difference = (pictures[:count] - logged[:count].to(pictures)).abs().flatten(1)
    mean, most = difference.mean(1).max().item(), difference.max().item()
    if not (difference - LEVEL / 2).clamp(min=0).mean(1).max() <= ROUNDING:
        raise ValueError(
            f"the bundle does not make the pictures that the comparison logged of {arm}: one differs by {mean:.2e} of "
            f"1 on average, {most:.2e} at most; data, weights or code have changed since: compare again"
        )
    return f"the {count} pictures that the comparison logged of {arm}: the same, within {most:.1e} of 1"


def _with_plain_prior(guidance: Guidance, model: DiffusionModel) -> Guidance:
    """A prior that is the run's own network, without its adapter or at an earlier checkpoint, as a plain network."""
    prior = guidance.prior
    if prior is None or prior.model is model or not any("lora_" in name for name, _ in prior.model.named_parameters()):
        return guidance
    own, device = prior.model.network, next(prior.model.network.parameters()).device
    network = base_of(own.network) if isinstance(own, Unadapted) else adapter_of(own).merged().eval()
    to_row_major(network)
    return replace(guidance, prior=replace(prior, model=with_network(prior.model, network.to(device))))


def verify_apart(folder: File) -> str:
    """What `priorguide verify` says of the bundle in a process of its own, on a device like the one recorded.
    RuntimeError where it fails."""
    manifest = verify(folder)
    made_on = (manifest["recorded"] or {}).get("device", "cpu")
    device = made_on if made_on in ("cpu", "mps") else "cuda"  # then it is the GPU's name
    command = [sys.executable, "-m", "priorguide.train.cli", "verify", str(folder), "--device", device]
    for name in {stored["class"] for stored in (manifest["model"], manifest["prior"]) if stored}:
        if not (module := find(name).__module__).startswith("priorguide."):
            command += ["--import", module]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the bundle does not reproduce its pictures: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()
