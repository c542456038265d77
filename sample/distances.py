"""Distances between sets of features, each with its standard error.

Sets are compared on the CPU in float64: differences between good models are small.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
        self._radii: dict[int, Tensor] = {}

    @classmethod
    def of(cls, features: "Tensor | Reference") -> "Reference":
        return features if isinstance(features, Reference) else cls(features)

    def match(self, features: Tensor, name: str = "the features") -> Tensor:
        """`features` checked, float64. ValueError where they have another width than the reference."""
        features = check_features(features, name)
        if features.shape[1] != self.features.shape[1]:
            raise ValueError(f"{name} have {features.shape[1]} columns, the reference {self.features.shape[1]}")
        return features

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        return _moments(self.features)

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

    @cached_property
    def within(self) -> "_Pairs":
        return _pairs([(self.features, 1)], None)

    def radii(self, k: int) -> Tensor:
        """The distance (M,) of each reference sample to its k-th neighbour among the others."""
        if k not in self._radii:
            blocks = (torch.cdist(rows, self.features) for rows in self.features.split(512))
            self._radii[k] = torch.cat([block.topk(k + 1, largest=False).values[:, -1] for block in blocks])
        return self._radii[k]


# Fréchet distance


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and a factor L (D, D) of the covariance L L^T; the factor spares the root of a singular matrix."""
    eigenvalues, vectors = torch.linalg.eigh(features.T.cov().reshape(features.shape[1], -1))
    return features.mean(0), vectors * eigenvalues.clamp(min=0).sqrt()


def _frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    (mean_a, factor_a), (mean_b, factor_b) = a, b
    # tr (C_a C_b)^(1/2) is the sum of the singular values of L_a^T L_b.
    cross = torch.linalg.svdvals(factor_a.T @ factor_b).sum()
    value = (mean_a - mean_b).square().sum() + factor_a.square().sum() + factor_b.square().sum() - 2 * cross
    return max(value.item(), 0.0)


def frechet_distance(a: Tensor, b: Tensor | Reference) -> float:
    """Squared Fréchet distance of the Gaussians fitted to a (N, D) and b (M, D) (FID, arXiv 1706.08500, eq. 6).

    In squared units of the features. Biased upwards, the more the smaller N: compare only at one N and M.
    """
    b = Reference.of(b)
    return _frechet(_moments(b.match(a)), b.moments)


def frechet_error(a: Tensor, b: Tensor | Reference, groups: int = 20) -> float:
    """The standard error of `frechet_distance` from sampling a: a delete-a-group jackknife."""
    b = Reference.of(b)
    a = b.match(a)
    member = _groups(len(a), groups)
    left = [_frechet(_moments(a[member != group]), b.moments) for group in range(int(member.max()) + 1)]
    return _jackknife(torch.tensor(left, dtype=torch.float64))


def _groups(count: int, groups: int) -> Tensor:
    """The group of each of `count` samples, interleaved."""
    return torch.arange(count) % min(groups, count)


def _jackknife(values: Tensor) -> float:
    """The standard error of a statistic from its `values` (G,), float64, each without one of G groups of samples.

    Delete-a-group jackknife (Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 11.5).
    """
    return math.sqrt((len(values) - 1) * values.var(correction=0).item())


# Kernel distance


@dataclass
class _Pairs:
    """Sums of a kernel matrix K, or of a difference of such, without the diagonal where a set meets itself."""

    rows: Tensor  # mean of each row
    columns: Tensor  # mean of each column
    mean: float
    interaction: float  # variance of what is left of K without its row and column means
    shift: Tensor  # (D,) the mean's derivative where all features are moved
    stretch: float  # and where all are multiplied by 1 + d


def _pairs(sets: Sequence[tuple[Tensor, int]], other: Tensor | None) -> _Pairs:
    """Pairs of sum_s sign_s k(x_s, other), or of sum_s sign_s k(x_s, x_s) without the diagonal where other is None.

    k(x, y) = (x.y / D + 1)^3, the kernel of KID (arXiv 1801.01401, section 4). Matrices are met block by block.
    """
    n, d = sets[0][0].shape
    m = n if other is None else len(other)
    row_sums, column_sums, squares = [], torch.zeros(m, dtype=torch.float64), 0.0
    shift, stretch = torch.zeros(d, dtype=torch.float64), 0.0
    for start in range(0, n, 128):
        rows = slice(start, min(start + 128, n))
        block = torch.zeros(rows.stop - start, m, dtype=torch.float64)
        for x, sign in sets:
            y = x if other is None else other
            root = (x[rows] @ y.T).div_(d).add_(1)
            if other is None:
                root.diagonal(start).zero_()
            slope = root * root  # k = root^3, so dk = 3 slope d(x.y) / D
            block += sign * (k := slope * root)
            shift += sign * 3 / d * (slope.sum(1) @ x[rows] + slope.sum(0) @ y)
            stretch += sign * 6 * (k.sum() - slope.sum()).item()
        row_sums.append(block.sum(1))
        column_sums += block.sum(0)
        squares += block.square().sum().item()
    sums = torch.cat(row_sums)
    count, per_row, per_column = (n * (n - 1), n - 1, n - 1) if other is None else (n * m, m, n)
    row_means, column_means, mean = sums / per_row, column_sums / per_column, sums.sum().item() / count
    between = row_means.var(correction=0).item() + column_means.var(correction=0).item()
    interaction = max(squares / count - mean**2 - between, 0.0)
    return _Pairs(row_means, column_means, mean, interaction, shift / count, stretch / count)


def _kernel_distance(
    sets: Sequence[tuple[Tensor, int]], reference: Reference, own: _Pairs | None, standardised: bool
) -> Estimate:
    """sum_s sign_s MMD^2(x_s, reference), unbiased, and its standard error; `own` is the reference's own term, if any.

    With W the kernel among the sets, C to the reference and V within it, the value is mean W - 2 mean C + mean V, a
    U-statistic. Its first-order influences are 2 (W_i. - C_i.) over the rows of the sets, which go together, and
    2 (V_j. - C_.j) over the reference (Hoeffding 1948); the sample variances of these, over N and M, count the
    second-order part, 2 var W / N^2 + 4 var C / NM + 2 var V / M^2 of the residuals, twice, so it is taken off once.
    Where the reference also gave the features' origin and scale (`standardised`), its samples act through these too.
    """
    among, across = _pairs(sets, None), _pairs(sets, reference.features)
    n, m = len(across.rows), len(across.columns)
    over_sets = 2 * (among.rows - across.rows)
    over_reference = -2 * across.columns
    value = among.mean - 2 * across.mean
    second = 2 * among.interaction / n**2 + 4 * across.interaction / (n * m)
    shift, stretch = among.shift - 2 * across.shift, among.stretch - 2 * across.stretch
    if own is not None:
        value += own.mean
        over_reference = over_reference + 2 * own.rows
        second += 2 * own.interaction / m**2
        shift, stretch = shift + own.shift, stretch + own.stretch
    if standardised:
        y = reference.features
        over_reference = over_reference - y @ shift - stretch * (y.square().mean(1) - 1) / 2
    variance = over_sets.var().item() / n + over_reference.var().item() / m
    return Estimate(value, math.sqrt(max(variance - second, second)))


def kernel_distance(a: Tensor, reference: Tensor | Reference, standardise: bool = True) -> Estimate:
    """KID: the unbiased squared MMD between a (N, D) and the reference (M, D), kernel (x.y / D + 1)^3.

    Bińkowski et al. 2018 (arXiv 1801.01401, eq. 4), over all samples at once. Not multiplied by 1,000, as some papers
    print it. Expected to be 0 for equal distributions, so that it may be below.
    standardise: in features less the reference's mean, over its one scale. The kernel takes features of about unit
    size, as Inception's are: in larger ones its cube is ruled by a few samples, and differences drown. False gives
    the published number. Since the reference gives its own origin, a bias of order 1 / M remains: in simulations with
    M = 1,000 and N = 500 a tenth of a standard error at most.
    """
    reference, (a,) = _placed(Reference.of(reference), standardise, a)
    return _kernel_distance([(a, 1)], reference, reference.within, standardise)


def kernel_distance_difference(
    a: Tensor, b: Tensor, reference: Tensor | Reference, standardise: bool = True
) -> Estimate:
    """KID of a less KID of b, both (N, D), the i-th rows of which share a condition: below 0, a is nearer.

    The reference's own term cancels, and the error counts what a_i and b_i have in common. Exactly 0 where a is b.
    standardise: as in `kernel_distance`.
    """
    if len(a) != len(b):
        raise ValueError(f"the two sets must share their conditions, got {len(a)} and {len(b)} samples")
    reference, (a, b) = _placed(Reference.of(reference), standardise, a, b)
    return _kernel_distance([(a, 1), (b, -1)], reference, None, standardise)


def _placed(reference: Reference, standardise: bool, *sets: Tensor) -> tuple[Reference, list[Tensor]]:
    matched = [reference.match(features) for features in sets]
    if not standardise:
        return reference, matched
    return reference.standardised, [reference.standardise(features) for features in matched]


# Density and coverage


def density_coverage(a: Tensor, reference: Tensor | Reference, k: int = 5, groups: int = 20) -> dict[str, Estimate]:
    """Density and coverage, by name, of a (N, D) against the reference (M, D) (Naeem et al. 2020, arXiv 2002.09797).

    Around each reference sample lies a ball that reaches to its k-th neighbour. Density is the mean number of balls
    that a sample lies in, over k; coverage the share of balls that hold a sample. Equal distributions give 1, and
    about 1 - (M / (M + N))^k: compare coverage only at one N and M. Errors, from sampling a, by a delete-a-group
    jackknife. ValueError unless M > k.
    """
    reference = Reference.of(reference)
    a = reference.match(a)
    n, m = len(a), len(reference.features)
    if m <= k:
        raise ValueError(f"coverage needs more than k = {k} reference samples, got {m}")
    inside = (torch.cdist(a, reference.features) < reference.radii(k)).float()  # (N, M)
    member = _groups(n, groups)
    held = torch.zeros(int(member.max()) + 1, m).index_add_(0, member, inside)  # samples in each ball, by group
    everyone = held.sum(0)
    left, kept = everyone - held, n - member.bincount()
    density, coverage = everyone.double().mean().item() * m / (k * n), (everyone > 0).double().mean().item()
    return {
        "density": Estimate(density, _jackknife(left.double().sum(1) / (k * kept))),
        "coverage": Estimate(coverage, _jackknife((left > 0).double().mean(1))),
    }
