"""How far one set of features lies within another and covers it, by nearest neighbours, each with its error."""

import torch
from torch import Tensor

from .distances import Estimate, Reference, groups_of, jackknife


def _nearest(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distances (N, count) and rows (N, count) of each sample's nearest others, the nearest first."""
    distances, rows = [], []
    for start in range(0, len(features), 512):
        block = torch.cdist(features[start : start + 512], features)
        block.diagonal(start).fill_(torch.inf)
        near = block.topk(count, largest=False)
        distances.append(near.values)
        rows.append(near.indices)
    return torch.cat(distances), torch.cat(rows)


def _check(reference: Reference, k: int, what: str) -> None:
    if (m := len(reference.features)) <= k:
        raise ValueError(f"{what} needs more than k = {k} reference samples, got {m}")


def _radii(reference: Reference, k: int) -> Tensor:
    """The distance (M,) of each reference sample to its k-th neighbour among the others."""
    return reference.once(("radii", k), lambda y: _nearest(y, k)[0][:, -1])


def precision_recall(a: Tensor, reference: Tensor | Reference, k: int = 3, groups: int = 20) -> dict[str, Estimate]:
    """Precision and recall, by name, of a (N, D) against the reference (M, D) (arXiv 1904.06991, eq. 1 and 2).

    Around each sample of a set lies a ball that reaches to its k-th neighbour within the set. Precision is the share of
    a in the reference's balls, recall the share of the reference in a's. Both depend on N and M: compare only at one of
    each. Errors, from sampling a, by a delete-a-group jackknife. ValueError unless N > k and M > k.
    """
    reference = Reference.of(reference)
    a = reference.match(a)
    _check(reference, k, "precision")
    n, member = len(a), groups_of(len(a), groups)
    largest = int(member.bincount().max())
    if n - largest <= k:
        raise ValueError(f"recall needs more than k = {k} samples beside each of {groups} groups, got {n}")
    gaps = torch.cdist(a, reference.features)  # (N, M)
    real = (gaps < _radii(reference, k)).any(1).double()
    near, rows = _nearest(a, k + largest)  # enough, whichever group is left out
    recalled = (gaps < near[:, k - 1, None]).any(0).double().mean().item()
    precision, recall = [], []
    for group in range(int(member.max()) + 1):
        kept = member != group
        stays = kept[rows[kept]]
        radii = near[kept][stays & (stays.cumsum(1) == k)]  # the k-th that stays, one of each row
        precision.append(real[kept].mean())
        recall.append((gaps[kept] < radii[:, None]).any(0).double().mean())
    return {
        "precision": Estimate(real.mean().item(), jackknife(torch.stack(precision))),
        "recall": Estimate(recalled, jackknife(torch.stack(recall))),
    }


def density_coverage(a: Tensor, reference: Tensor | Reference, k: int = 5, groups: int = 20) -> dict[str, Estimate]:
    """Density and coverage, by name, of a (N, D) against the reference (M, D) (Naeem et al. 2020, arXiv 2002.09797).

    Around each reference sample lies a ball that reaches to its k-th neighbour. Density is the mean number of balls
    that a sample lies in, over k; coverage the share of balls that hold a sample. Equal distributions give 1, and
    about 1 - (M / (M + N))^k: compare coverage only at one N and M. Errors, from sampling a, by a delete-a-group
    jackknife. ValueError unless M > k.
    """
    reference = Reference.of(reference)
    a = reference.match(a)
    _check(reference, k, "coverage")
    n, m = len(a), len(reference.features)
    inside = (torch.cdist(a, reference.features) < _radii(reference, k)).float()  # (N, M)
    member = groups_of(n, groups)
    held = torch.zeros(int(member.max()) + 1, m).index_add_(0, member, inside)  # samples in each ball, by group
    everyone = held.sum(0)
    left, kept = everyone - held, n - member.bincount()
    density, coverage = everyone.double().mean().item() * m / (k * n), (everyone > 0).double().mean().item()
    return {
        "density": Estimate(density, jackknife(left.double().sum(1) / (k * kept))),
        "coverage": Estimate(coverage, jackknife((left > 0).double().mean(1))),
    }
