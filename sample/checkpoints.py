"""Candidates of several checkpoints in one comparison: base@400 is base as prior of the checkpoint of step 400."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from .distances import Reference
from .guidance import Arm, Scales
from .metrics import Scores
from .verdict import Rule, Verdict, decide

SIGN = "@"
OWN = math.nextafter(1.0, 2.0)
"""Scale 1 of a checkpoint that is not the baseline's, for the time that `decide` takes: it gives whatever has scale 1,
and so evaluates no prior, to the baseline, whose network another checkpoint's is not. It is written as 1."""


def at(prior: str, step: int) -> str:
    """ "base@400"."""
    return f"{prior}{SIGN}{step}"


def parted(name: str) -> tuple[str, int | None]:
    """The prior's own name, and the step of its checkpoint; None where only one checkpoint is compared."""
    prior, sign, step = name.rpartition(SIGN)
    return (prior, int(step)) if sign and step.isdigit() else (name, None)


def unguided(name: str) -> str:
    """What a candidate is called at a lowest scale of 1, where no prior has a part: "none", or "none@400"."""
    step = parted(name)[1]
    return "none" if step is None else at("none", step)


def row_name(name: str, scales: Scales) -> str:
    """What a candidate's row is called."""
    return unguided(name) if scales[0] == 1 else name


def decide_over(arms: Mapping[Arm, Scores], reference: Tensor | Reference | None, rule: Rule) -> Verdict:
    """`decide`, for arms of one checkpoint or of several: scale 1 counts for the checkpoint's own baseline."""
    own, step = parted(rule.baseline)
    if step is None:
        return decide(arms, reference, rule)
    moved: dict[Arm, Scores] = {}
    for (prior, scales), scores in arms.items():
        theirs = parted(prior)[1]
        if scales[0] == 1 and theirs is not None and theirs != step:
            prior, scales = at(own, theirs), (OWN, *scales[1:])
        moved.setdefault((prior, scales), scores)
    return _plain(decide(moved, reference, rule))


def _plain(value: Any) -> Any:
    """The verdict with 1 in place of OWN, wherever scales are in it."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _plain(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return 1.0 if value == OWN and isinstance(value, float) else value
