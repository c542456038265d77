import json
import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from priorguide.sample.distances import Reference, frechet, frechet_distance
from priorguide.sample.evaluate import judge
from priorguide.sample.feature_networks import features_of
from priorguide.sample.kernels import kernel_distance, kernel_distance_difference
from priorguide.sample.metrics import BETTER, OF_SETS, as_json, score, summarise
from priorguide.sample.neighbours import density_coverage, precision_recall
from priorguide.sample.verdict import Rule


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
    errors = torch.tensor([frechet(x, reference)["fd"].error for x in drawn[:30]])
    assert errors.mean().item() == pytest.approx(spread, rel=0.25)


def gaussians(count: int, width: int, seed: int) -> Tensor:
    """At squared Fréchet distance 0.05 `width` of standard normals."""
    return 1.1 * normal(count, width, seed=seed) + 0.2


@pytest.mark.parametrize("count, width", [(60, 8), (200, 64), (50, 64)])
def test_frechet_distance_at_infinite_samples_is_nearly_unbiased(count, width):
    reference, truth = Reference(normal(20000, width, seed=1)), 0.05 * width
    found = [frechet(gaussians(count, width, seed), reference) for seed in range(2, 22)]
    biases = {name: sum(each[name].value for each in found) / 20 - truth for name in ("fd", "fd_inf")}
    assert biases["fd"] > 0.5 * truth
    # Where samples are fewer than dimensions the bias no longer falls as 1 / N.
    assert abs(biases["fd_inf"]) < (0.15 if count > width else 0.5) * biases["fd"]


@pytest.mark.parametrize("count", [47, 20, 12])  # above, at and below the number of dimensions
def test_frechet_errors_by_leaving_groups_out(count):
    a, b = skewed(count, 16, 1), skewed(90, 16, 2, shift=0.1)
    left = [frechet_distance(a[torch.arange(count) % 10 != group], b) for group in range(10)]
    values = torch.tensor(left, dtype=torch.float64)
    found = frechet(a, b, groups=10)
    value = frechet_distance(a, b)
    assert found["fd"].value == value
    assert found["fd"].error == pytest.approx(math.sqrt(9 * values.var(correction=0).item()), rel=1e-4)
    assert found["fd_inf"].value == pytest.approx(10 * value - 9 * values.mean().item(), rel=1e-4)
    assert found["fd_inf"].error == found["fd"].error


@pytest.mark.parametrize("metric", ["kid", "mmd"])
def test_kernel_distance_is_unbiased_where_distributions_are_equal(metric):
    estimates = [kernel_distance(skewed(60, 8, 2 * i), skewed(90, 8, 2 * i + 1), metric=metric) for i in range(400)]
    values = torch.tensor([estimate.value for estimate in estimates])
    assert values.mean().abs() < 3 * values.std() / 20  # the naive mean over all pairs would be off by 40 of these
    assert values.min() < 0


def brute_difference(a: Tensor, b: Tensor, y: Tensor, metric: str = "kid") -> float:
    """The kernel distance of a less that of b, by the definition and in loops over pairs."""

    def k(u: Tensor, v: Tensor) -> float:
        if metric == "mmd":
            return math.exp(-float((u - v).square().sum()) / (2 * len(u)))
        return (float(u @ v) / len(u) + 1) ** 3

    n, m = len(a), len(y)
    among = sum(k(a[i], a[j]) - k(b[i], b[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return among - 2 * sum(k(a[i], y[j]) - k(b[i], y[j]) for i in range(n) for j in range(m)) / (n * m)


@pytest.mark.parametrize("metric", ["kid", "mmd"])
def test_kernel_difference_by_definition(metric):
    a, b, y = skewed(9, 4, 1), skewed(9, 4, 2, 0.2), skewed(7, 4, 3)
    raw = kernel_distance_difference(a, b, y, standardise=False, metric=metric)
    assert raw.value == pytest.approx(brute_difference(a, b, y, metric))
    difference = kernel_distance_difference(a, b, y, metric=metric)
    placed = [(x - y.mean(0)) / y.var(0).mean().sqrt() for x in (a, b, y)]
    assert difference.value == pytest.approx(brute_difference(*placed, metric))
    alone = [kernel_distance(x, y, metric=metric).value for x in (a, b)]
    assert difference.value == pytest.approx(alone[0] - alone[1])
    same = kernel_distance_difference(a, a, y, metric=metric)
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


@pytest.mark.parametrize("metric, wide", [("kid", 1.0), ("mmd", 1.0), ("mmd", 2.0)])  # 2: the scale's share is large
@pytest.mark.parametrize("standardise", [False, True])
def test_kernel_error_against_a_jackknife(standardise, metric, wide):
    a, b, y = wide * skewed(120, 6, 1, 0.6), skewed(120, 6, 2, 0.2), skewed(150, 6, 3)
    everyone = torch.arange(150)

    def spread(values: list[float]) -> float:
        return (len(values) - 1) * torch.tensor(values, dtype=torch.float64).var(correction=0).item()

    for value in (
        lambda a, b, y: kernel_distance_difference(a, b, y, standardise, metric),
        lambda a, b, y: kernel_distance(a, y, standardise, metric),
    ):
        over_pairs = [value(a[everyone[:120] != i], b[everyone[:120] != i], y).value for i in range(120)]
        over_reference = [value(a, b, y[everyone != j]).value for j in range(150)]
        jackknife = math.sqrt(spread(over_pairs) + spread(over_reference))
        # The jackknife counts the second-order part twice, which is small where the sets differ.
        error = value(a, b, y).error
        assert 0.9 * jackknife < error < jackknife


@pytest.mark.parametrize("metric", ["kid", "mmd"])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_kernel_error_is_the_spread_over_samples(shift, metric):
    """Also at shift 0, where the first-order part vanishes: there it may err on the safe side."""
    found = []
    for i in range(400):
        a, b, y = skewed(80, 6, 3 * i, shift), skewed(80, 6, 3 * i + 1), skewed(100, 6, 3 * i + 2)
        found.append(kernel_distance_difference(a, b, y, metric=metric))
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


def test_precision_and_recall_by_definition():
    a, y = skewed(40, 4, 1), skewed(60, 4, 2, 0.2)

    def share_inside(points: Tensor, of: Tensor) -> float:
        radii = torch.stack([(of - row).norm(dim=1).sort().values[3] for row in of])
        return (torch.cdist(points, of) < radii).any(1).double().mean().item()

    found = precision_recall(a, y, groups=8)
    assert found["precision"].value == pytest.approx(share_inside(a, y))
    assert found["recall"].value == pytest.approx(share_inside(y, a))
    rest = [a[torch.arange(40) % 8 != group] for group in range(8)]
    for name, left in (
        ("precision", [share_inside(x, y) for x in rest]),
        ("recall", [share_inside(y, x) for x in rest]),
    ):
        spread = torch.tensor(left, dtype=torch.float64).var(correction=0).item()
        assert found[name].error == pytest.approx(math.sqrt(7 * spread))


def test_precision_and_recall_of_known_sets():
    wide, narrow = normal(400, 3, seed=1), 0.3 * normal(400, 3, seed=2)
    found = precision_recall(narrow, wide)
    assert found["precision"].value > 0.98 and found["recall"].value < 0.35
    found = precision_recall(wide, narrow)
    assert found["precision"].value < 0.35 and found["recall"].value > 0.9
    assert {name: e.value for name, e in precision_recall(wide + 100, wide).items()} == {"precision": 0, "recall": 0}


def test_precision_and_recall_errors_are_the_spread_over_samples():
    reference = Reference(normal(300, 4, seed=500))
    found = [precision_recall(0.8 * normal(200, 4, seed=seed), reference) for seed in range(60)]
    for name in ("precision", "recall"):
        spread = torch.tensor([each[name].value for each in found]).std().item()
        error = sum(each[name].error for each in found) / len(found)
        assert 0.75 * spread < error < 1.5 * spread, name


def test_score_and_summary():
    pictures, target = torch.rand(50, 1, 8, 8), torch.rand(50, 1, 8, 8)
    network = Network().eval()
    guess = (pictures.mean((1, 3))[:, 0] > 0.5).long()
    label = guess.clone()
    label[:10] = 1 - label[:10]
    scores = score(pictures, network=network, target=target, label=label, batch_size=7)
    torch.testing.assert_close(scores.features, pictures.mean((1, 3)))
    torch.testing.assert_close(scores.per_condition["psnr"], -10 * (pictures - target).square().mean((1, 2, 3)).log10())
    found = summarise(scores, features_of(network, target))
    assert set(found) == {"fd", "kid", "coverage", "psnr", "accuracy"}
    every = summarise(scores, features_of(network, target), BETTER)
    assert [*every] == [*OF_SETS, "psnr", "accuracy"]
    assert all(every[name] == found[name] for name in found)
    assert found["accuracy"].value == pytest.approx(0.8)
    assert found["accuracy"].error == pytest.approx(math.sqrt(0.8 * 0.2 / 49))
    assert json.loads(json.dumps(as_json(found)))["fd"]["value"] == found["fd"].value
    assert set(summarise(score(pictures, target=target))) == {"psnr"}


class Blind(nn.Module):
    """Features alone."""

    calls = 0

    def features(self, pixels: Tensor) -> Tensor:
        self.calls += len(pixels)
        return pixels.mean((2, 3))


class Headless(Network):
    """A head that is there by name only."""

    num_classes = 0

    def forward(self, pixels: Tensor) -> Tensor:
        raise AssertionError


@pytest.mark.parametrize("network", [Blind(), Headless()])
def test_a_network_without_classes_gives_no_accuracy(network):
    scores = score(torch.rand(6, 1, 8, 8), network=network.eval(), label=torch.zeros(6))
    assert scores.features is not None and scores.per_condition == {}


def test_clips_are_met_frame_by_frame():
    clips, target, label = torch.rand(6, 1, 4, 12, 12), torch.rand(6, 1, 4, 12, 12), torch.arange(6) % 2
    network = Network().eval()
    scores = score(clips, network=network, target=target, label=label, metrics=BETTER, batch_size=5)
    frames = [
        score(clips[:, :, f], network=network, target=target[:, :, f], label=label, metrics=BETTER) for f in range(4)
    ]
    torch.testing.assert_close(scores.features, torch.stack([each.features for each in frames]).mean(0))
    for name in ("psnr", "ssim", "accuracy"):
        wanted = torch.stack([each.per_condition[name] for each in frames]).mean(0)
        torch.testing.assert_close(scores.per_condition[name], wanted)
    assert {"consistency", "flicker", "dynamic_degree"} <= scores.per_condition.keys()
    assert all(values.shape == (6,) for values in scores.per_condition.values())
    assert scores.per_condition.keys() & score(clips, metrics=["psnr"], target=target).per_condition.keys() == {"psnr"}


def arms(count: int, *shape: int) -> dict[tuple[str, tuple[float]], Tensor]:
    return {("self", (2.0,)): torch.rand(count, *shape), ("base", (2.0,)): torch.rand(count, *shape)}


def test_judge_sees_each_picture_once_and_measures_what_the_rule_names():
    pictures, network = arms(12, 1, 8, 8), Blind().eval()
    pictures["base", (1.0,)] = pictures["self", (1.0,)] = torch.rand(12, 1, 8, 8)
    rule = Rule("mmd", {}, level=0.9)
    found = judge(pictures, network=network, reference=torch.rand(20, 1, 8, 8), metrics=["fd", "recall"], rule=rule)
    assert network.calls == 20 + 3 * 12
    assert all(metrics.keys() == {"fd", "mmd", "recall"} for metrics in found.metrics.values())
    assert found.verdict.decide_by == "mmd"


def test_judge_refuses():
    with pytest.raises(ValueError, match=r"both be pictures \(4-D\), or both clips \(5-D\)"):
        judge(arms(6, 1, 3, 8, 8), network=Blind().eval(), reference=torch.rand(9, 1, 8, 8))
    with pytest.raises(ValueError, match="metrics must be among fd, fd_inf, kid, .*, got sharpness"):
        judge(arms(6, 1, 8, 8), metrics=["sharpness", "psnr"])
    with pytest.raises(ValueError, match="the conditions are 5, the pictures 6"):
        judge(arms(6, 1, 8, 8), target=torch.rand(5, 1, 8, 8))


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
    with pytest.raises(ValueError, match="more than k = 3 reference samples, got 3"):
        precision_recall(a, a[:3])
    with pytest.raises(ValueError, match="recall needs more than k = 3 samples beside each of 20 groups, got 4"):
        precision_recall(a[:4], a)
