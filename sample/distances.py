"""What distances between sets of features share, and the Fréchet distance, each with its standard error.

Sets are compared on the CPU in float64: differences between good models are small. `kernels` holds the kernel
distances, `neighbours` precision, recall, density and coverage.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, in the metric's own units."""

    value: float
    error: float


def mean(values: Tensor) -> Estimate:
    """The mean of values (N,) and its standard error. ValueError unless N > 1."""
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values must have shape (N,) with N > 1, got {tuple(values.shape)}")
    values = values.detach().cpu().double()
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def check_features(features: Tensor, name: str) -> Tensor:
    """Features (N, D) in float64 on the CPU. ValueError, naming them, unless N > 1 and all are finite."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name} must have shape (N, D) with N > 1, got {tuple(features.shape)}")
    if bad := int((~features.isfinite()).any(1).sum()):
        raise ValueError(f"{name} must be finite, but {bad} of {len(features)} rows hold NaN or infinity")
    return features.detach().cpu().double()


class Reference:
    """The features (M, D) of real pictures, and what is computed of them once for all candidates."""

    def __init__(self, features: Tensor):
        self.features = check_features(features, "the reference features")
        self._known: dict[Any, Any] = {}

    @classmethod
    def of(cls, features: "Tensor | Reference") -> "Reference":
        return features if isinstance(features, Reference) else cls(features)

    def match(self, features: Tensor, name: str = "the features") -> Tensor:
        """`features` checked, float64. ValueError where they have another width than the reference."""
        features = check_features(features, name)
        if features.shape[1] != self.features.shape[1]:
            raise ValueError(f"{name} have {features.shape[1]} columns, the reference {self.features.shape[1]}")
        return features

    def once(self, key: Any, compute: Callable[[Tensor], Any]) -> Any:
        """What `compute` makes of the features, computed the first time that `key` is asked for."""
        if key not in self._known:
            self._known[key] = compute(self.features)
        return self._known[key]

    @cached_property
    def standard(self) -> tuple[Tensor, Tensor]:
        """The mean (D,), and one scale: the root of the mean variance. ValueError where all samples are equal."""
        scale = self.features.var(0).mean().sqrt()
        if scale == 0:
            raise ValueError("the reference features are all equal; check the metric network and its pictures")
        return self.features.mean(0), scale

    @cached_property
    def standardised(self) -> "Reference":
        return Reference(self.standardise(self.features))

    def standardise(self, features: Tensor) -> Tensor:
        mean, scale = self.standard
        return (features - mean) / scale


def groups_of(count: int, groups: int) -> Tensor:
    """The group of each of `count` samples, interleaved."""
    return torch.arange(count) % min(groups, count)


def jackknife(values: Tensor) -> float:
    """The standard error of a statistic from its `values` (G,), float64, each without one of G groups of samples.

    Delete-a-group jackknife (Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 11.5).
    """
    return math.sqrt((len(values) - 1) * values.var(correction=0).item())


# Fréchet distance


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and a factor L (D, D) of the covariance L L^T; the factor spares the root of a singular matrix."""
    eigenvalues, vectors = torch.linalg.eigh(features.T.cov().reshape(features.shape[1], -1))
    return features.mean(0), vectors * eigenvalues.clamp(min=0).sqrt()


def frechet_distance(a: Tensor, b: Tensor | Reference) -> float:
    """Squared Fréchet distance of the Gaussians fitted to a (N, D) and b (M, D) (FID, arXiv 1706.08500, eq. 6).

    In squared units of the features. Biased upwards, the more the smaller N: compare only at one N and M.
    """
    b = Reference.of(b)
    (mean_a, factor_a), (mean_b, factor_b) = _moments(b.match(a)), b.once("moments", _moments)
    # tr (C_a C_b)^(1/2) is the sum of the singular values of L_a^T L_b.
    cross = torch.linalg.svdvals(factor_a.T @ factor_b).sum()
    value = (mean_a - mean_b).square().sum() + factor_a.square().sum() + factor_b.square().sum() - 2 * cross
    return max(value.item(), 0.0)


def frechet(a: Tensor, b: Tensor | Reference, groups: int = 20) -> dict[str, Estimate]:
    """ "fd", the `frechet_distance`, and "fd_inf", what it would be at infinitely many samples a, each with its error.

    Errors, from sampling a alone, by a delete-a-group jackknife. "fd_inf" takes off the jackknife's own estimate of the
    bias, G - 1 times what the distance grows by on average when one of G groups is left out. It is exact where the
    bias falls as 1 / N, and so the extrapolation over 1 / N of FD-infinity (Chong & Forsyth 2020, arXiv 1911.07023)
    from N (1 - 1 / G) and N samples. The bias that comes of a small reference stays, and where N is not well above D
    some of the other does too. May be below 0.
    """
    b = Reference.of(b)
    value, left = frechet_distance(a, b), _left_out(b.match(a), b, groups)
    count = len(left)
    without_bias = count * value - (count - 1) * left.mean().item()
    error = jackknife(left)
    return {"fd": Estimate(value, error), "fd_inf": Estimate(without_bias, error)}


def _left_out(a: Tensor, b: Reference, groups: int) -> Tensor:
    """The Fréchet distances (G,) of a without each of its groups.

    With Z = (A - mean) L_b / (n - 1)^(1/2), tr (C_a C_b)^(1/2) is the sum of Z's singular values: the roots of the
    eigenvalues of Z^T Z (D, D) or Z Z^T (n, n), of which the smaller one is taken, as it changes with a group.
    """
    (n, d), member = a.shape, groups_of(len(a), groups)
    mean_b, factor_b = b.once("moments", _moments)
    x = a - a.mean(0)
    z = x @ factor_b
    whole = z @ z.T if n <= d else z.T @ z
    found = []
    for group in range(int(member.max()) + 1):
        out = member == group
        count = n - int(out.sum())
        shift = -x[out].sum(0) / count  # of the mean of the rest
        if n <= d:
            rest = whole[~out][:, ~out]
            rest = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
        else:
            moved = shift @ factor_b
            rest = whole - z[out].T @ z[out] - count * torch.outer(moved, moved)
        cross = torch.linalg.eigvalsh(rest / (count - 1)).clamp(min=0).sqrt().sum()
        spread = (x[~out].square().sum() - count * shift.square().sum()) / (count - 1)
        distance = (a.mean(0) + shift - mean_b).square().sum() + spread + factor_b.square().sum() - 2 * cross
        found.append(distance)
    return torch.stack(found)
