"""Distances between sets of features by a kernel: unbiased, and paired between candidates, each with its error.

By name: "kid" with KID's cubic kernel, "mmd" with a Gaussian one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .distances import Estimate, Reference

Kernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


def _cubic(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    d = x.shape[1]
    root = (x @ y.T).div_(d).add_(1)
    slope = root * root  # k = root^3, so dk = 3 slope d(x.y) / D
    k = slope * root
    return k, 6 * (k - slope), 3 / d * slope


def _gaussian(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    gap = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    gap = gap.clamp_(min=0).div_(x.shape[1])
    k = (-gap / 2).exp()
    return k, -gap * k, None


KERNELS: dict[str, Kernel] = {"kid": _cubic, "mmd": _gaussian}
"""Kernels by the name of their metric, of x (n, D) and y (m, D): the matrix (n, m); its derivative where all features
are multiplied by 1 + s; and u with dk = u (x + y) . v where all are moved by v, or None where that changes nothing.

kid: (x.y / D + 1)^3 (arXiv 1801.01401, section 4). mmd: exp(-|x - y|^2 / 2 D), whose width, in standardised features,
is half the mean squared distance of real pictures."""


@dataclass
class _Pairs:
    """Sums of a kernel matrix K, or of a difference of such, without the diagonal where a set meets itself."""

    rows: Tensor  # mean of each row
    columns: Tensor  # mean of each column
    mean: float
    interaction: float  # variance of what is left of K without its row and column means
    shift: Tensor  # (D,) the mean's derivative where all features are moved
    stretch: float  # and where all are multiplied by 1 + d


def _pairs(kernel: Kernel, sets: Sequence[tuple[Tensor, int]], other: Tensor | None) -> _Pairs:
    """Pairs of sum_s sign_s k(x_s, other), or of sum_s sign_s k(x_s, x_s) without the diagonal where other is None.

    Matrices are met block by block.
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
            k, stretched, slope = kernel(x[rows], y)
            for part in (k, stretched) if slope is None else (k, stretched, slope):
                if other is None:
                    part.diagonal(start).zero_()
            block += sign * k
            stretch += sign * stretched.sum().item()
            if slope is not None:
                shift += sign * (slope.sum(1) @ x[rows] + slope.sum(0) @ y)
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
    kernel: Kernel, sets: Sequence[tuple[Tensor, int]], reference: Reference, own: _Pairs | None, standardised: bool
) -> Estimate:
    """sum_s sign_s MMD^2(x_s, reference), unbiased, and its standard error; `own` is the reference's own term, if any.

    With W the kernel among the sets, C to the reference and V within it, the value is mean W - 2 mean C + mean V, a
    U-statistic. Its first-order influences are 2 (W_i. - C_i.) over the rows of the sets, which go together, and
    2 (V_j. - C_.j) over the reference (Hoeffding 1948); the sample variances of these, over N and M, count the
    second-order part, 2 var W / N^2 + 4 var C / NM + 2 var V / M^2 of the residuals, twice, so it is taken off once.
    Where the reference also gave the features' origin and scale (`standardised`), its samples act through these too.
    """
    among, across = _pairs(kernel, sets, None), _pairs(kernel, sets, reference.features)
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


def kernel_distance(
    a: Tensor, reference: Tensor | Reference, standardise: bool = True, metric: str = "kid"
) -> Estimate:
    """The unbiased squared MMD between a (N, D) and the reference (M, D), by the kernel of `metric` (`KERNELS`).

    "kid": Bińkowski et al. 2018 (arXiv 1801.01401, eq. 4), over all samples at once. Not multiplied by 1,000, as some
    papers print it. "mmd": as CMMD (Jayasumana et al. 2024, arXiv 2401.09603, eq. 3), but of any network's features, at
    a width that follows them, and not multiplied by 1,000. Both are expected to be 0 for equal distributions, so that
    they may be below.
    standardise: in features less the reference's mean, over its one scale. KID's kernel takes features of about unit
    size, as Inception's are: in larger ones its cube is ruled by a few samples, and differences drown. False gives
    the published number. Since the reference gives its own origin, a bias of order 1 / M remains: in simulations with
    M = 1,000 and N = 500 a tenth of a standard error at most.
    """
    reference, (a,) = _placed(Reference.of(reference), standardise, a)
    kernel = KERNELS[metric]
    own = reference.once(("within", metric), lambda y: _pairs(kernel, [(y, 1)], None))
    return _kernel_distance(kernel, [(a, 1)], reference, own, standardise)


def kernel_distance_difference(
    a: Tensor, b: Tensor, reference: Tensor | Reference, standardise: bool = True, metric: str = "kid"
) -> Estimate:
    """`kernel_distance` of a less that of b, both (N, D), whose i-th rows share a condition: below 0, a is nearer.

    The reference's own term cancels, and the error counts what a_i and b_i have in common. Exactly 0 where a is b.
    standardise, metric: as in `kernel_distance`.
    """
    if len(a) != len(b):
        raise ValueError(f"the two sets must share their conditions, got {len(a)} and {len(b)} samples")
    reference, (a, b) = _placed(Reference.of(reference), standardise, a, b)
    return _kernel_distance(KERNELS[metric], [(a, 1), (b, -1)], reference, None, standardise)


def _placed(reference: Reference, standardise: bool, *sets: Tensor) -> tuple[Reference, list[Tensor]]:
    matched = [reference.match(features) for features in sets]
    if not standardise:
        return reference, matched
    return reference.standardised, [reference.standardise(features) for features in matched]
