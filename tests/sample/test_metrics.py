import json
import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from priorguide.sample.distances import (
    Reference,
    density_coverage,
    frechet_distance,
    frechet_error,
    kernel_distance,
    kernel_distance_difference,
)
from priorguide.sample.metrics import as_json, features_of, psnr, score, summarise


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated, lopsided features, as a network's are."""
    return (normal(count, width, seed=seed) @ normal(width, width, seed=99) / 3 + 0.5 + shift).relu()


class Pass(nn.Module):
    """Hands torchmetrics features in place of pictures."""

    num_features = 16

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Network(nn.Module):
    """Features are row means; class 1 is a bright upper row."""

    def features(self, pixels: Tensor) -> Tensor:
        return pixels.mean((1, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        bright = self.features(pixels)[:, 0]
        return torch.stack([0.5 - bright, bright - 0.5], 1)


def test_frechet_distance_is_torchmetrics():
    a, b = skewed(300, 16, 1), skewed(400, 16, 2, shift=0.1)
    peer = FrechetInceptionDistance(feature=Pass(), input_img_size=(16, 1, 1), normalize=True).set_dtype(torch.float64)
    peer.update(b[..., None, None], real=True)
    peer.update(a[..., None, None], real=False)
    assert frechet_distance(a, b) == pytest.approx(peer.compute().item(), rel=1e-4)


def test_kernel_distance_is_torchmetrics():
    a, b = skewed(200, 16, 1), skewed(200, 16, 2, shift=0.1)
    peer = KernelInceptionDistance(feature=Pass(), subsets=1, subset_size=200, normalize=True).set_dtype(torch.float64)
    peer.update(b[..., None, None], real=True)
    peer.update(a[..., None, None], real=False)
    assert kernel_distance(a, b, standardise=False).value == pytest.approx(peer.compute()[0].item(), rel=1e-4)


def with_moments(mean: Tensor, factor: Tensor, count: int) -> Tensor:
    """Samples whose mean and covariance are exactly `mean` and factor factor^T."""
    x = normal(count, len(mean))
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return white @ factor.T + mean


def test_frechet_distance_of_gaussians_in_closed_form():
    ones, diagonal = torch.ones(4, dtype=torch.float64), torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64))
    a, b = with_moments(0 * ones, diagonal, 50), with_moments(ones, torch.eye(4, dtype=torch.float64), 70)
    # Commuting covariances: |m|^2 + sum of squared differences of the standard deviations.
    assert frechet_distance(a, b) == pytest.approx(4 + 0 + 1 + 4 + 9)
    turn = torch.linalg.qr(normal(4, 4)).Q
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(18)


def test_frechet_distance_of_singular_covariances():
    a = skewed(10, 32, 1)  # fewer samples than features
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 0.5) == pytest.approx(8)


def test_frechet_error_is_the_spread_over_samples():
    reference = Reference(skewed(3000, 6, 500))
    drawn = [skewed(400, 6, seed, shift=0.3) for seed in range(100)]
    spread = torch.tensor([frechet_distance(x, reference) for x in drawn]).std().item()
    errors = torch.tensor([frechet_error(x, reference) for x in drawn[:30]])
    assert errors.mean().item() == pytest.approx(spread, rel=0.25)


def test_kernel_distance_is_unbiased_where_distributions_are_equal():
    estimates = [kernel_distance(skewed(60, 8, 2 * i), skewed(90, 8, 2 * i + 1)) for i in range(400)]
    values = torch.tensor([estimate.value for estimate in estimates])
    assert values.mean().abs() < 3 * values.std() / 20  # the naive mean over all pairs would be off by 40 of these
    assert values.min() < 0


def brute_difference(a: Tensor, b: Tensor, y: Tensor) -> float:
    """KID of a less KID of b, by the definition and in loops over pairs."""

    def k(u: Tensor, v: Tensor) -> float:
        return (float(u @ v) / len(u) + 1) ** 3

    n, m = len(a), len(y)
    among = sum(k(a[i], a[j]) - k(b[i], b[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return among - 2 * sum(k(a[i], y[j]) - k(b[i], y[j]) for i in range(n) for j in range(m)) / (n * m)


def test_kernel_difference_by_definition():
    a, b, y = skewed(9, 4, 1), skewed(9, 4, 2, 0.2), skewed(7, 4, 3)
    assert kernel_distance_difference(a, b, y, standardise=False).value == pytest.approx(brute_difference(a, b, y))
    difference = kernel_distance_difference(a, b, y)
    placed = [(x - y.mean(0)) / y.var(0).mean().sqrt() for x in (a, b, y)]
    assert difference.value == pytest.approx(brute_difference(*placed))
    assert difference.value == pytest.approx(kernel_distance(a, y).value - kernel_distance(b, y).value)
    same = kernel_distance_difference(a, a, y)
    assert (same.value, same.error) == (0, 0)


def test_kernel_difference_over_many_blocks_is_the_same_as_over_one():
    a, b, y = skewed(300, 5, 1), skewed(300, 5, 2, 0.1), skewed(200, 5, 3)
    k = [[(u @ v.T / 5 + 1) ** 3 for v in (u, y)] for u in (a, b)]
    off = [(own.sum() - own.trace()) / (300 * 299) - 2 * cross.mean() for own, cross in k]
    assert kernel_distance_difference(a, b, y, standardise=False).value == pytest.approx((off[0] - off[1]).item())


def test_kernel_distance_is_free_of_the_features_scale_and_origin():
    a, b, y = skewed(50, 4, 1), skewed(50, 4, 2, 0.2), skewed(60, 4, 3)
    found, moved = kernel_distance_difference(a, b, y), kernel_distance_difference(5 * a + 3, 5 * b + 3, 5 * y + 3)
    assert (moved.value, moved.error) == pytest.approx((found.value, found.error))
    with pytest.raises(ValueError, match="all equal"):
        kernel_distance(a, torch.ones(5, 4))


@pytest.mark.parametrize("standardise", [False, True])
def test_kernel_error_against_a_jackknife(standardise):
    a, b, y = skewed(120, 6, 1, 0.6), skewed(120, 6, 2, 0.2), skewed(150, 6, 3)
    everyone = torch.arange(150)

    def spread(values: list[float]) -> float:
        return (len(values) - 1) * torch.tensor(values, dtype=torch.float64).var(correction=0).item()

    for value in (
        lambda a, b, y: kernel_distance_difference(a, b, y, standardise),
        lambda a, b, y: kernel_distance(a, y, standardise),
    ):
        over_pairs = [value(a[everyone[:120] != i], b[everyone[:120] != i], y).value for i in range(120)]
        over_reference = [value(a, b, y[everyone != j]).value for j in range(150)]
        jackknife = math.sqrt(spread(over_pairs) + spread(over_reference))
        # The jackknife counts the second-order part twice, which is small where the sets differ.
        error = value(a, b, y).error
        assert 0.9 * jackknife < error < jackknife


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_kernel_error_is_the_spread_over_samples(shift):
    """Also at shift 0, where the first-order part vanishes: there it may err on the safe side."""
    found = [
        kernel_distance_difference(skewed(80, 6, 3 * i, shift), skewed(80, 6, 3 * i + 1), skewed(100, 6, 3 * i + 2))
        for i in range(400)
    ]
    spread = torch.tensor([estimate.value for estimate in found]).std().item()
    error = math.sqrt(sum(estimate.error**2 for estimate in found) / len(found))
    assert 0.9 * spread < error < (1.1 if shift else 1.4) * spread


def test_density_and_coverage_by_definition():
    a, y = skewed(40, 4, 1), skewed(60, 4, 2, 0.2)
    radii = torch.stack([(y - row).norm(dim=1).sort().values[5] for row in y])
    inside = torch.stack([(y - row).norm(dim=1) < radii for row in a])
    found = density_coverage(a, y)
    assert found["density"].value == pytest.approx(inside.sum().item() / (5 * 40))
    assert found["coverage"].value == pytest.approx(inside.any(0).double().mean().item())
    left = torch.tensor([inside[torch.arange(40) != i].any(0).double().mean() for i in range(40)])
    by_sample = density_coverage(a, y, groups=40)["coverage"].error
    assert by_sample == pytest.approx(math.sqrt(39 * left.var(correction=0).item()), rel=1e-5)


def test_coverage_of_equal_distributions():
    a, y = normal(500, 3, seed=1), normal(1000, 3, seed=2)
    found = density_coverage(a, y)
    assert found["coverage"].value == pytest.approx(1 - (1000 / 1500) ** 5, abs=0.05)
    assert found["density"].value == pytest.approx(1, abs=0.1)
    assert density_coverage(a + 100, y)["coverage"].value == 0


def test_psnr():
    target = torch.rand(3, 1, 4, 4)
    off = torch.tensor([0.1, 0.01, 0.0]).reshape(3, 1, 1, 1)
    assert psnr(target + off, target).tolist() == pytest.approx([20, 40, 100], abs=1e-3)
    with pytest.raises(ValueError, match=r"shape \(3, 1, 4, 4\), got \(2, 1, 4, 4\)"):
        psnr(target, target[:2])


def test_score_and_summary():
    pictures, target = torch.rand(50, 1, 8, 8), torch.rand(50, 1, 8, 8)
    network = Network().eval()
    guess = (pictures.mean((1, 3))[:, 0] > 0.5).long()
    label = guess.clone()
    label[:10] = 1 - label[:10]
    scores = score(pictures, network=network, target=target, label=label, batch_size=7)
    torch.testing.assert_close(scores.features, pictures.mean((1, 3)))
    torch.testing.assert_close(scores.per_condition["psnr"], psnr(pictures, target))
    found = summarise(scores, features_of(network, target))
    assert set(found) == {"fd", "kid", "coverage", "psnr", "accuracy"}
    assert found["accuracy"].value == pytest.approx(0.8)
    assert found["accuracy"].error == pytest.approx(math.sqrt(0.8 * 0.2 / 49))
    assert json.loads(json.dumps(as_json(found)))["fd"]["value"] == found["fd"].value
    assert set(summarise(score(pictures, target=target))) == {"psnr"}


def test_score_refuses():
    pictures = torch.rand(5, 1, 8, 8)
    with pytest.raises(ValueError, match="eval mode"):
        score(pictures, network=Network().train())
    with pytest.raises(ValueError, match="give network"):
        score(pictures, label=torch.zeros(5))
    with pytest.raises(ValueError, match=r"label must have shape \(5,\), got \(4,\)"):
        score(pictures, network=Network().eval(), label=torch.zeros(4))


def test_features_are_checked():
    a, y = normal(10, 4), normal(20, 4, seed=1)
    y[3, 2] = math.nan
    with pytest.raises(ValueError, match="reference features must be finite, but 1 of 20 rows"):
        kernel_distance(a, y)
    with pytest.raises(ValueError, match="have 3 columns, the reference 4"):
        frechet_distance(a[:, :3], a)
    with pytest.raises(ValueError, match=r"\(N, D\) with N > 1, got \(1, 4\)"):
        frechet_distance(a[:1], a)
    with pytest.raises(ValueError, match="got 10 and 9 samples"):
        kernel_distance_difference(a, a[:9], a)
    with pytest.raises(ValueError, match="more than k = 5 reference samples, got 5"):
        density_coverage(a, a[:5])
