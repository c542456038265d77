"""How good pictures are, each number with its uncertainty.

Metrics of whole sets are taken in the features of a metric network (`distances`, `kernels`, `neighbours`); scores per
condition compare each picture with what its condition asks for (`agreement`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .agreement import AGREEMENTS, Asked, Perceptual
from .distances import Estimate, Reference, frechet, mean
from .feature_networks import Clip, FeatureNetwork, as_frames, classifies, frame_features, in_batches
from .kernels import KERNELS, kernel_distance
from .neighbours import density_coverage, precision_recall
from .video_metrics import temporal

OF_SETS = ("fd", "fd_inf", "kid", "mmd", "precision", "recall", "density", "coverage")
"""The metrics of a whole set of pictures against a reference."""
PER_CLIP = ("consistency", "flicker", "dynamic_degree")
PER_CONDITION = (*AGREEMENTS, "accuracy", *PER_CLIP)
USUAL = ("fd", "kid", "coverage", *(name for name in PER_CONDITION if name != "ssim"))
"""What is measured unless names are given, as far as there is what it takes."""
BETTER = {name: 1 for name in (*OF_SETS, *PER_CONDITION)}
BETTER |= dict.fromkeys(("fd", "fd_inf", "kid", "mmd", "lpips", "flicker"), -1)
"""The metrics known by name: 1 where higher is better, -1 where lower is. More motion is no merit by itself; as a
guard, "dynamic_degree" keeps clips from standing still."""

HALVES = slice(0, None, 2), slice(1, None, 2)
"""The halves of the conditions: even rows and odd ones."""


@dataclass
class Scores:
    """One candidate's pictures in numbers, the i-th row of each for the i-th condition.

    features: (N, D), or None. per_condition: (N,) by name, "psnr" in dB, "accuracy" of 0 or 1, and so on.
    """

    features: Tensor | None = None
    per_condition: dict[str, Tensor] = field(default_factory=dict)

    def take(self, rows: slice) -> "Scores":
        """The scores of some of the conditions."""
        return Scores(
            None if self.features is None else self.features[rows],
            {name: values[rows] for name, values in self.per_condition.items()},
        )


def interleaved(halves: Sequence[Scores]) -> Scores:
    """The rows of each of the HALVES from its own scores, in the order of the conditions; of what both have."""
    first, second = halves
    if first is second:
        return first

    def rows(even: Tensor, odd: Tensor) -> Tensor:
        whole = even.clone()
        whole[HALVES[1]] = odd[HALVES[1]]
        return whole

    both = first.features is not None and second.features is not None
    names = first.per_condition.keys() & second.per_condition.keys()
    return Scores(
        rows(first.features, second.features) if both else None,  # type: ignore[arg-type]
        {name: rows(first.per_condition[name], second.per_condition[name]) for name in sorted(names)},
    )


def score(
    pictures: Tensor,
    *,
    network: FeatureNetwork | None = None,
    target: Tensor | None = None,
    label: Tensor | None = None,
    text: Sequence[str] | None = None,
    image: Tensor | None = None,
    image_text: Sequence[str] | None = None,
    clip: Clip | None = None,
    perceptual: Perceptual | None = None,
    metrics: Collection[str] = USUAL,
    batch_size: int = 256,
) -> Scores:
    """Scores, on the CPU, of pictures (N, C, H, W) or clips (N, C, F, H, W) in [0, 1].

    network: gives the features, and with label (N,) the accuracy where it has classes, on its own device. text to
    perceptual: what the conditions ask for, as in `Asked`. metrics: those per condition (PER_CONDITION) that are
    wanted; the ones whose inputs are missing are left out. ValueError where numbers differ, a network is in train mode,
    or a metric is not known.
    """
    check_metrics(metrics)
    asked = Asked(target, text, image, image_text, clip, perceptual, metrics, batch_size)
    return score_as_asked(pictures, asked, network, label)


@torch.no_grad()
def score_as_asked(
    pictures: Tensor, asked: Asked, network: FeatureNetwork | None = None, label: Tensor | None = None
) -> Scores:
    """`score` of one of many candidates, for all of which `asked` is prepared once."""
    if label is not None and network is None:
        raise ValueError("label needs a network that classifies; give network")
    if label is not None and label.shape != pictures.shape[:1]:
        raise ValueError(f"label must have shape ({len(pictures)},), got {tuple(label.shape)}")
    scores = Scores()
    frames = None if network is None else frame_features(network, pictures, asked.batch_size)
    scores.per_condition |= asked.scores(pictures, frames if network is asked.clip else None)
    if frames is not None:
        scores.features = frames.mean(1)
    if label is not None and "accuracy" in asked.metrics and classifies(network):
        guess = in_batches(network, network, asked.batch_size, as_frames(pictures)).argmax(1).view(len(pictures), -1)
        scores.per_condition["accuracy"] = (guess == label.cpu()[:, None]).float().mean(1)
    if pictures.ndim == 5 and (wanted := [name for name in PER_CLIP if name in asked.metrics]):
        found = temporal(pictures, frames)
        scores.per_condition |= {name: found[name] for name in wanted}
    return scores


def summarise(
    scores: Scores, reference: Tensor | Reference | None = None, metrics: Collection[str] = USUAL
) -> dict[str, Estimate]:
    """The named metrics of sets (OF_SETS) of the features against a reference (M, D), and the means per condition.

    Give one `Reference` for many candidates: what depends on it alone is then computed once. ValueError for a name that
    is not known.
    """
    check_metrics(metrics)
    found: dict[str, Estimate] = {}
    if scores.features is not None and reference is not None:
        a, reference, wanted = scores.features, Reference.of(reference), set(metrics)
        if wanted & {"fd", "fd_inf"}:
            found |= frechet(a, reference)
        found |= {name: kernel_distance(a, reference, metric=name) for name in KERNELS if name in wanted}
        if wanted & {"precision", "recall"}:
            found |= precision_recall(a, reference)
        if wanted & {"density", "coverage"}:
            found |= density_coverage(a, reference)
        found = {name: found[name] for name in OF_SETS if name in wanted}
    return found | {name: mean(values) for name, values in scores.per_condition.items()}


def check_metrics(names: Collection[str]) -> None:
    """ValueError for a name that is not known."""
    if unknown := sorted(set(names) - set(BETTER)):
        raise ValueError(f"metrics must be among {', '.join(BETTER)}, got {', '.join(unknown)}")


def as_json(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Estimates by name as plain numbers: {"kid": {"value": ..., "error": ...}, ...}."""
    return {name: {"value": estimate.value, "error": estimate.error} for name, estimate in estimates.items()}
