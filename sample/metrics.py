"""How good pictures are, each number with its uncertainty.

Distances between sets are taken in the features of a metric network (`distances`); scores per condition compare each
picture with its target or its label.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from .distances import (
    Estimate,
    Reference,
    density_coverage,
    frechet_distance,
    frechet_error,
    kernel_distance,
    mean,
)

BETTER = {"kid": -1, "fd": -1, "coverage": 1, "psnr": 1, "accuracy": 1}
"""The metrics known by name: 1 where higher is better, -1 where lower is."""


class FeatureNetwork(Protocol):
    """The network that a metric sees through; an nn.Module must be in eval mode."""

    def features(self, pixels: Tensor) -> Tensor:
        """Features (B, D) of pixels (B, C, H, W) in [0, 1]."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Class logits (B, K) of the same pixels."""


@dataclass
class Scores:
    """One candidate's pictures in numbers, the i-th row of each for the i-th condition.

    features: (N, D), or None. per_condition: (N,) by name, "psnr" in dB and "accuracy" of 0 or 1.
    """

    features: Tensor | None = None
    per_condition: dict[str, Tensor] = field(default_factory=dict)

    def take(self, rows: slice) -> "Scores":
        """The scores of some of the conditions."""
        return Scores(
            None if self.features is None else self.features[rows],
            {name: values[rows] for name, values in self.per_condition.items()},
        )


@torch.no_grad()
def features_of(network: FeatureNetwork, pixels: Tensor, batch_size: int = 256) -> Tensor:
    """Features (N, D), float32 on the CPU, of pixels (N, C, H, W) in [0, 1], taken to the network's device.

    ValueError where the network is in train mode.
    """
    if isinstance(network, nn.Module) and network.training:
        raise ValueError("the metric network must be in eval mode; call its eval()")
    return torch.cat([network.features(batch) for batch in _batches(network, pixels, batch_size)]).float().cpu()


def _batches(network: FeatureNetwork, pixels: Tensor, size: int) -> Iterator[Tensor]:
    parameter = next(network.parameters(), pixels) if isinstance(network, nn.Module) else pixels
    return (batch.to(parameter.device) for batch in pixels.split(size))


@torch.no_grad()
def score(
    pictures: Tensor,
    *,
    network: FeatureNetwork | None = None,
    target: Tensor | None = None,
    label: Tensor | None = None,
    batch_size: int = 256,
) -> Scores:
    """Scores, on the CPU, of pictures (N, C, H, W) in [0, 1].

    network: gives the features, and with label (N,) the accuracy, on its own device. target: (N, C, H, W), for
    the PSNR. ValueError where the numbers of pictures, targets and labels differ, or the network is in train mode.
    """
    if label is not None and network is None:
        raise ValueError("label needs a network that classifies; give network")
    if label is not None and label.shape != pictures.shape[:1]:
        raise ValueError(f"label must have shape ({len(pictures)},), got {tuple(label.shape)}")
    scores = Scores()
    if target is not None:
        scores.per_condition["psnr"] = psnr(pictures, target).cpu()
    if network is not None:
        scores.features = features_of(network, pictures, batch_size)
    if network is not None and label is not None:
        guess = torch.cat([network(batch).argmax(1) for batch in _batches(network, pictures, batch_size)])
        scores.per_condition["accuracy"] = (guess.cpu() == label.cpu()).float()
    return scores


def psnr(pixels: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (N,) in dB of pixels (N, ...) in [0, 1]; at most 100, so that equals stay finite."""
    if pixels.shape != target.shape:
        raise ValueError(f"target must have the pictures' shape {tuple(pixels.shape)}, got {tuple(target.shape)}")
    error = (pixels.float() - target.to(pixels.device).float()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def summarise(scores: Scores, reference: Tensor | Reference | None = None) -> dict[str, Estimate]:
    """Every metric that the scores allow: "fd", "kid", "coverage" against a reference (M, D), and the means per name.

    Give one `Reference` for many candidates: what depends on it alone is then computed once.
    """
    found = {}
    if scores.features is not None and reference is not None:
        reference = Reference.of(reference)
        found["fd"] = Estimate(frechet_distance(scores.features, reference), frechet_error(scores.features, reference))
        found["kid"] = kernel_distance(scores.features, reference)
        found["coverage"] = density_coverage(scores.features, reference)["coverage"]
    return found | {name: mean(values) for name, values in scores.per_condition.items()}


def as_json(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Estimates by name as plain numbers: {"kid": {"value": ..., "error": ...}, ...}."""
    return {name: {"value": estimate.value, "error": estimate.error} for name, estimate in estimates.items()}
