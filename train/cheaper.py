"""`priorguide compare RUN --cheaper`: the decided prior and scales at fewer evaluations, and the cheapest no worse."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import torch

from ..callbacks.records import write_whole
from ..callbacks.report import with_decision
from ..callbacks.votes import decided
from ..sample.candidates import Candidate
from ..sample.cheaper import FULL, cheapest, default_margin, variants
from ..sample.checkpoints import parted
from ..sample.guidance import Arm
from .compare import compare_run
from .fine_tune import FineTune
from .fit import FitCLI, load_run
from .record import comparison_of, find_checkpoint, progress


def cheaper_run(
    run: str | File,
    checkpoints: Sequence[str] = (),
    scales: Any = None,
    conditions: int | None = None,
    margin: float | None = None,
    out: str | None = None,
) -> None:
    """Adds the search for a cheaper setting to a comparison's record and page; without one, compares first.

    margin: how much worse in what decides counts as no worse, in its units; by default see `default_margin`.
    """
    folder = File(out) if out else File(run) / "comparison"
    if not folder.exists():
        compare_run(run, checkpoints, scales, conditions, out)
    if not (folder / "record.json").is_file():
        raise ValueError(f"there is no {folder / 'record.json'}: remove {folder}, or give the comparison's own --out")
    record = json.loads((folder / "record.json").read_text())
    if not record.get("verdict"):
        raise ValueError(f"{folder / 'record.json'} holds no verdict: there is no pair to make cheaper")
    own = find_checkpoint(record, run, decided(record)["prior"])
    cli, _ = load_run(run, own or next(iter(checkpoints), None))
    record["cheaper"] = search(cli, record, conditions or record["conditions"], margin)
    page = with_decision((folder / "index.html").read_text(encoding="utf-8"), record)
    write_whole(folder / "record.json", json.dumps(record, indent=1))
    write_whole(folder / "index.html", page)
    print(record["cheaper"]["sentence"])


def search(cli: FitCLI, record: dict[str, Any], conditions: int, margin: float | None = None) -> dict[str, Any]:
    """Samples the record's pair with every setting from the same noise and conditions; `Cheaper` as JSON, with the
    "rows" that its metrics are in, a setting's name in place of the prior's."""
    callback, fine_tune, data = comparison_of(cli), cli.model, cli.datamodule
    assert isinstance(fine_tune, FineTune)
    data.setup("fit")
    fine_tune.to(cli.trainer.strategy.root_device)
    deployed = decided(record)
    arm: Arm = deployed["prior"], tuple(deployed["scales"])
    name = parted(arm[0])[0]
    if name not in callback.priors:
        raise ValueError(f"the record decides for {arm[0]!r}, which is not among the run's {sorted(callback.priors)}")
    with torch.no_grad(), fine_tune.averaged() as model:
        guidance = callback.candidates(model, [arm[1]])[name, arm[1]]
        scheduler = callback.sampler.make(model)
        scheduler.set_timesteps(callback.sampler.steps)
        options = variants(guidance, scheduler.timesteps.tolist())
    candidate = callback.priors[name]
    if candidate.checkpoint is not None and guidance.prior is not None:  # read once, not per setting
        candidate = replace(candidate, checkpoint=None, prior=guidance.prior.model)
    settings = {
        name: replace(candidate, scales=None, interval=own.interval, refresh=own.refresh)
        for name, own in options.items()
    }
    evaluation = _evaluate(callback, settings, fine_tune, data, arm, conditions)
    verdict = evaluation.verdict
    if margin is None:
        margin = default_margin(verdict.decide_by, evaluation.metrics[FULL, arm[1]][verdict.decide_by].value)
    costs = {name: spent for (name, _), spent in evaluation.costs.items()}
    return {**cheapest(verdict, costs, options, margin, arm).to_json(), "rows": evaluation.rows()}


def _evaluate(callback: Any, settings: dict[str, Candidate], *what: Any) -> Any:
    """The comparison's own evaluation, of these settings in place of its candidates, against FULL."""
    fine_tune, data, arm, conditions = what
    twin = copy.copy(callback)
    twin.priors, twin._bound = settings, None
    twin.rule = replace(callback.rule, baseline=FULL, margin=0.0)
    with progress() as bar:
        task = bar.add_task("looking for a cheaper setting", total=None)
        return twin.evaluate(
            fine_tune,
            data,
            scales=[arm[1]],
            num_conditions=conditions,
            full=True,
            on_step=lambda step, total: bar.update(task, completed=step, total=total),
        )
