"""From pictures of every arm to metrics, costs and a verdict: what the callback and the command line both run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compare import Cost, cost
from .distances import Estimate, Reference
from .guidance import Arm, Guidance, Scales
from .loop import Sampler
from .metrics import FeatureNetwork, Scores, features_of, score, summarise
from .model import Condition, DiffusionModel
from .verdict import Rule, Verdict, decide


@dataclass(frozen=True)
class Evaluation:
    """A comparison's outcome: per arm its pictures (N, C, H, W) in [0, 1], metrics and costs, and the verdict."""

    pictures: dict[Arm, Tensor]
    metrics: dict[Arm, dict[str, Estimate]]
    costs: dict[Arm, Cost] = field(default_factory=dict)
    verdict: Verdict | None = None
    floor: dict[str, Estimate] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able row per arm; arms of lowest scale 1 evaluate no prior and share one row, named "none"."""
        rows: dict[tuple[str, Scales], dict[str, Any]] = {}
        for (prior, scales), metrics in self.metrics.items():
            name = "none" if scales[0] == 1 else prior
            row: dict[str, Any] = {
                "prior": name,
                "scales": list(scales),
                "metrics": {key: {"value": e.value, "error": e.error} for key, e in metrics.items()},
            }
            if (spent := self.costs.get((prior, scales))) is not None:
                row |= {
                    "seconds_per_image": spent.seconds_per_image,
                    "evaluations": spent.evaluations,
                    "extra_bytes": spent.extra_bytes,
                }
            rows.setdefault((name, scales), row)
        return list(rows.values())


def judge(
    pictures: Mapping[Arm, Tensor],
    *,
    network: FeatureNetwork | None = None,
    reference: Tensor | None = None,
    target: Tensor | None = None,
    label: Tensor | None = None,
    rule: Rule | None = None,
    costs: Mapping[Arm, Cost] | None = None,
    floor: Tensor | None = None,
) -> Evaluation:
    """Metrics of every arm's pictures, and the verdict by `rule` (none without one).

    network: the metric's features and class logits. reference: real pixels (M, C, H, W) that distances are taken to.
    target: pixels (N, C, H, W) that each condition asks for. label: classes (N,). floor: real pixels whose own
    distance to the reference says how low a distance can be.
    """
    real = Reference(features_of(network, reference)) if network is not None and reference is not None else None
    scored: dict[int, tuple[Scores, dict[str, Estimate]]] = {}
    for images in pictures.values():
        if id(images) not in scored:
            scores = score(images, network=network, target=target, label=label if network is not None else None)
            scored[id(images)] = scores, summarise(scores, real)
    verdict = decide({arm: scored[id(images)][0] for arm, images in pictures.items()}, real, rule) if rule else None
    bottom = summarise(score(floor, network=network), real) if floor is not None and network is not None else {}
    metrics = {arm: scored[id(images)][1] for arm, images in pictures.items()}
    return Evaluation(dict(pictures), metrics, dict(costs or {}), verdict, bottom)


def costs_of(
    model: DiffusionModel, condition: Condition, candidates: Mapping[Arm, Guidance], sampler: Sampler, batch: int
) -> dict[Arm, Cost]:
    """The cost of every arm; scales do not change it, so each prior is timed once with guidance and once without."""
    part = {name: value[:batch] for name, value in condition.items()}
    seeds = list(range(len(next(iter(part.values()))) if part else batch))
    timed: dict[tuple[str, bool], Cost] = {}
    for (prior, scales), guidance in candidates.items():
        key = ("none", True) if scales[0] == 1 else (prior, False)
        if key not in timed:
            timed[key] = cost(model, part, seeds, guidance, sampler)
    return {arm: timed[("none", True) if arm[1][0] == 1 else (arm[0], False)] for arm in candidates}


def to_device(value: Any, device: torch.device) -> Any:
    """A batch or a condition with its tensors on the device."""
    return {key: item.to(device) if isinstance(item, Tensor) else item for key, item in value.items()}
