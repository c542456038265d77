"""From pictures of every arm to metrics, costs and a verdict: what the callback and the command line both run."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .agreement import Asked, Perceptual
from .checkpoints import at, decide_over, row_name
from .compare import Cost, cost
from .distances import Estimate, Reference
from .feature_networks import Clip, FeatureNetwork, features_of
from .guidance import Arm, Guidance, Scales
from .loop import Sampler
from .metrics import USUAL, Scores, check_metrics, score_as_asked, summarise
from .model import Condition, DiffusionModel
from .parts import fingerprint
from .recipe import guidance_to_json
from .saturation import Saturation
from .verdict import Rule, Verdict


@dataclass(frozen=True)
class Drawn:
    """What was sampled, before it is measured: per arm its pictures (N, C, H, W) in [0, 1], the mean energy ratio of
    its guidance (see `saturation`) and its cost; the latter two may be missing."""

    pictures: dict[Arm, Tensor]
    energies: dict[Arm, float] = field(default_factory=dict)
    costs: dict[Arm, Cost] = field(default_factory=dict)

    def at(self, step: int) -> "Drawn":
        """The same, its candidates named by their checkpoint's step, so that several may be joined."""
        return Drawn(
            *({(at(prior, step), s): value for (prior, s), value in part.items()} for part in self._parts())  # type: ignore[arg-type]
        )

    def __or__(self, other: "Drawn") -> "Drawn":
        return Drawn(*(own | more for own, more in zip(self._parts(), other._parts(), strict=True)))  # type: ignore[arg-type, operator]

    def _parts(self) -> tuple[dict[Arm, Any], ...]:
        return self.pictures, self.energies, self.costs


@dataclass(frozen=True)
class Evaluation:
    """A comparison's outcome: per arm its pictures (N, C, H, W) in [0, 1], metrics and costs, and the verdict."""

    pictures: dict[Arm, Tensor]
    metrics: dict[Arm, dict[str, Estimate]]
    costs: dict[Arm, Cost] = field(default_factory=dict)
    verdict: Verdict | None = None
    floor: dict[str, Estimate] = field(default_factory=dict)
    saturation: dict[Arm, Saturation] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able row per arm; arms of lowest scale 1 evaluate no prior and share one row per checkpoint, named
        "none", or "none@<step>" where there are several."""
        rows: dict[tuple[str, Scales], dict[str, Any]] = {}
        for (prior, scales), metrics in self.metrics.items():
            name = row_name(prior, scales)
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
                    "peak_bytes": spent.peak_bytes,
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
    text: Sequence[str] | None = None,
    image: Tensor | None = None,
    image_text: Sequence[str] | None = None,
    clip: Clip | None = None,
    perceptual: Perceptual | None = None,
    metrics: Collection[str] = USUAL,
    rule: Rule | None = None,
    costs: Mapping[Arm, Cost] | None = None,
    floor: Tensor | None = None,
) -> Evaluation:
    """Metrics of every arm's pictures, and the verdict by `rule` (none without one).

    network: the metric's features and class logits. reference: real pixels (M, C, H, W) that distances are taken to,
    clips (M, C, F, H, W) where the pictures are. target: pixels (N, C, H, W) that each condition asks for. label:
    classes (N,). text, image, image_text, clip, perceptual: as in `agreement.Asked`. metrics: what to measure, as
    far as there is what it takes (`metrics.BETTER` has the names); what the rule names always is. floor: real pixels
    whose own distance to the reference says how low a distance can be. ValueError for parts that do not fit together.
    """
    check_metrics(metrics)
    metrics = {*metrics, *(rule.metrics if rule else ())}
    shapes = {part.ndim for part in (*pictures.values(), reference, floor) if part is not None}
    if network is not None and len(shapes) > 1:
        raise ValueError(
            "the pictures and the reference must both be pictures (4-D), or both clips (5-D), got a mixture"
        )
    asked = Asked(target, text, image, image_text, clip, perceptual, metrics)
    label = None if network is None else label
    real = Reference(features_of(network, reference)) if network is not None and reference is not None else None
    scored: dict[int, tuple[Scores, dict[str, Estimate]]] = {}
    for images in pictures.values():
        if id(images) not in scored:
            scores = score_as_asked(images, asked, network, label)
            scored[id(images)] = scores, summarise(scores, real, metrics)
    verdict = (
        decide_over({arm: scored[id(images)][0] for arm, images in pictures.items()}, real, rule) if rule else None
    )
    bottom = (
        summarise(Scores(features_of(network, floor)), real, metrics)
        if floor is not None and network is not None
        else {}
    )
    found = {arm: scored[id(images)][1] for arm, images in pictures.items()}
    return Evaluation(dict(pictures), found, dict(costs or {}), verdict, bottom)


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


def drawn_from(
    model: DiffusionModel,
    candidates: Mapping[Arm, Guidance],
    batch: Mapping[str, Any],
    seeds: Sequence[int],
    sampler: Sampler,
    device: torch.device,
) -> str:
    """A fingerprint of all that pictures depend on: weights, guidance, conditions, noise, sampler, torch and device."""
    known: dict[int, str] = {}

    def weights(network: DiffusionModel) -> str:
        if id(network) not in known:
            known[id(network)] = fingerprint(network.config(), network)
        return known[id(network)]

    arms = [
        (arm, guidance_to_json(guidance), (prior := guidance.prior) and (weights(prior.model), prior.keep))
        for arm, guidance in candidates.items()
    ]
    return fingerprint(weights(model), arms, batch, seeds, sampler, device.type, torch.__version__)


def to_device(value: Any, device: torch.device) -> Any:
    """A batch or a condition with its tensors on the device."""
    return {key: item.to(device) if isinstance(item, Tensor) else item for key, item in value.items()}
