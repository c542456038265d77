"""Drop-out events, densities of the training times, min-SNR weights and the variational bound against closed forms."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from priorguide.sample.noise import DiscretePath, FlowPath, add_noise, convert, like
from priorguide.train.objective import Drop, check_table, draw_uniform, drop, min_snr_weight, variational_bound

PAIRS = [Drop(("text",), 0.05), Drop(("text", "image"), 0.05), Drop(("image",), 0.05)]
"""InstructPix2Pix's and Zero-1-to-3's scheme."""


def dropped(table: list[Drop], u: torch.Tensor) -> tuple[list[bool], list[bool]]:
    """Which samples lose their text, and which their image."""
    condition = {"text": torch.ones(len(u), 2, 3), "image": torch.ones(len(u), 1, 4, 4)}
    null = {"text": torch.full((1, 2, 3), 7.0), "image": torch.zeros(1, 1, 4, 4)}
    out = drop(condition, null, table, u)
    assert {name: part.shape for name, part in out.items()} == {name: part.shape for name, part in condition.items()}
    for name in out:  # a part is its null or itself, as a whole
        kept, gone = out[name] == 1, out[name] == null[name]
        assert bool((kept.flatten(1).all(1) | gone.flatten(1).all(1)).all())
    text, image = ((out[name] != 1).flatten(1).any(1).tolist() for name in ("text", "image"))
    return text, image


def test_events_follow_one_another_along_one_uniform():
    text, image = dropped(PAIRS, torch.tensor([0.0, 0.025, 0.049, 0.051, 0.075, 0.099, 0.101, 0.149, 0.151, 0.9999]))
    assert text == [True] * 6 + [False] * 4
    assert image == [False] * 3 + [True] * 5 + [False] * 2


def test_the_order_of_events_is_part_of_the_contract():
    text, image = dropped(PAIRS[::-1], torch.tensor([0.01, 0.06, 0.11]))
    assert text == [False, True, True] and image == [True, True, False]


def test_an_event_begins_at_its_boundary_and_ends_before_the_next():
    table = [Drop(("text",), 0.25), Drop(("image",), 0.5)]  # sums that binary fractions hold exactly
    below = torch.nextafter(torch.tensor([0.25, 0.75]), torch.tensor(0.0))
    text, image = dropped(table, torch.tensor([0.0, below[0].item(), 0.25, below[1].item(), 0.75]))
    assert text == [True, True, False, False, False]
    assert image == [False, False, True, True, False]


def test_certain_drops_leave_nothing_and_an_empty_table_everything():
    u = torch.tensor([0.0, 0.5, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()])
    assert dropped([Drop(("text", "image"), 1.0)], u) == ([True] * 3, [True] * 3)
    assert dropped([], u) == ([False] * 3, [False] * 3)
    assert dropped([Drop(("text",), 0.0)], u) == ([False] * 3, [False] * 3)


def test_shares_over_many_draws():
    n = 200_000
    u = draw_uniform("uniform", n, torch.device("cpu"))
    text, image = (torch.tensor(lost) for lost in dropped(PAIRS, u))
    for share, expected in (
        ((text & ~image).double().mean(), 0.05),
        ((text & image).double().mean(), 0.05),
        ((~text & image).double().mean(), 0.05),
        ((~text & ~image).double().mean(), 0.85),
    ):
        assert abs(share.item() - expected) < 5 * (expected * (1 - expected) / n) ** 0.5


def test_the_condition_itself_is_left_alone():
    condition, u = {"label": torch.tensor([1, 2])}, torch.zeros(2)
    out = drop(condition, {"label": torch.tensor([9])}, [Drop(("label",), 1.0)], u)
    assert out["label"].tolist() == [9, 9] and condition["label"].tolist() == [1, 2]
    assert out["label"].dtype == torch.int64


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ([Drop(("text",), 0.6), Drop(("image",), 0.5)], "sum to at most 1, got a sum of 1.1"),
        ([Drop(("text",), -0.1)], "at least 0"),
        ([Drop(("text", "frame"), 0.1)], r"drop-out names \['frame'\], but the model's parts are \['image', 'text'\]"),
    ],
)
def test_a_bad_table_is_refused(table, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_table(table, frozenset({"text", "image"}))


def test_a_table_of_tenths_is_not_refused_for_its_rounding():
    check_table([Drop(("text",), 0.1)] * 10, frozenset({"text"}))


def test_min_snr_weights_are_the_papers():
    """Hang et al. 2023, section 3.4: min(SNR, gamma) for x_0, / SNR for eps, / (SNR + 1) for v."""
    alpha, sigma = DiscretePath.cosine().coefficients(torch.arange(1, 1000))
    snr, gamma = (alpha / sigma) ** 2, 5.0
    least = torch.minimum(snr, torch.tensor(gamma, dtype=snr.dtype))
    assert (snr < gamma).any() and (snr > gamma).any()
    for prediction, expected in (("sample", least), ("epsilon", least / snr), ("v_prediction", least / (snr + 1))):
        torch.testing.assert_close(min_snr_weight(prediction, alpha, sigma, gamma), expected, rtol=1e-9, atol=0)


def test_min_snr_weight_of_a_flow():
    """x_0 - x_0' = -sigma (v - v') along the straight path."""
    alpha, sigma = FlowPath().coefficients(torch.tensor([1.0, 250.0, 750.0, 1000.0]))
    expected = torch.minimum((alpha / sigma) ** 2, torch.tensor(5.0, dtype=alpha.dtype)) * sigma**2
    torch.testing.assert_close(min_snr_weight("flow_prediction", alpha, sigma, 5.0), expected)


def test_densities_are_those_of_the_sd3_paper():
    """arXiv 2403.03206, section 3.1: logit-normal; and mode, f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), s = 1.29."""
    with torch.random.fork_rng():
        draws = {}
        for name in ("uniform", "logit_normal", "mode"):
            torch.manual_seed(0)
            draws[name] = draw_uniform(name, 50_000, torch.device("cpu"))
    assert all(u.shape == (50_000,) and u.min() >= 0 and u.max() <= 1 for u in draws.values())
    assert abs(draws["uniform"].mean().item() - 0.5) < 0.01 and abs(draws["uniform"].std().item() - 12**-0.5) < 0.01
    logit = draws["logit_normal"].double().logit()
    assert abs(logit.mean().item()) < 0.03 and abs(logit.std().item() - 1) < 0.03
    u = draws["uniform"]
    torch.testing.assert_close(draws["mode"], 1 - u - 1.29 * ((torch.pi * u / 2).cos() ** 2 - 1 + u))


def test_a_density_that_returns_1_stays_on_the_path():
    for path in (DiscretePath.linear(), FlowPath()):
        t = path.draw(torch.tensor([0.0, 0.5, 1.0]))
        assert t.min() >= 0 and t.max() <= 1000
    assert DiscretePath.linear().draw(torch.tensor([1.0])).item() == 999


def draws(t, shape=(3, 4)):
    """x_0, noise and a guess of the noise, and the linear path's alpha-bar before and at t."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps, off = (torch.randn(len(t), *shape, generator=generator, dtype=torch.float64) for _ in range(3))
    bar = DiscretePath.linear().alphas_cumprod
    return x_0, eps, eps + 0.3 * off, *(like(bar[k], x_0) for k in (t - 1, t))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_bound_is_the_divergence_of_two_normals(prediction):
    """Ho et al. 2020, eqs. 6 and 7, and Nichol & Dhariwal 2021, eq. 15, term by term in float64."""
    path, t = DiscretePath.linear(), torch.tensor([1, 2, 300, 999])
    x_0, eps, guessed, before, bar = draws(t)
    alpha, sigma = path.coefficients(t)
    x_t = add_noise(x_0, eps, alpha, sigma)
    v = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = convert(guessed, x_t, "epsilon", prediction, like(alpha, x_0), like(sigma, x_0))

    beta = 1 - bar / before
    posterior = (1 - before) / (1 - bar) * beta

    def mean(x_0):
        return before.sqrt() * beta / (1 - bar) * x_0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x_t

    u = (v + 1) / 2
    own = Normal(
        mean((x_t - sigma.reshape(-1, 1, 1) * guessed) / alpha.reshape(-1, 1, 1)),
        beta ** (u / 2) * posterior ** ((1 - u) / 2),
    )
    expected = kl_divergence(Normal(mean(x_0), posterior.sqrt().expand_as(x_0)), own).mean((1, 2)) / math.log(2)
    found = variational_bound(path, prediction, out, v, x_0, x_t, t)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    least = variational_bound(path, "sample", x_0, -torch.ones_like(v), x_0, x_t, t)
    assert least.abs().max() < 1e-6  # the posterior itself


def test_at_the_first_step_the_bound_is_the_likelihood_of_a_level():
    path = DiscretePath.linear()
    levels = torch.linspace(-1, 1, 256).reshape(-1, 1)
    t, bar = torch.zeros(256, dtype=torch.long), path.alphas_cumprod
    for mean, u in ((0.3, 0.0), (-0.99, 0.5), (1.0, 1.0)):
        out, v = torch.full_like(levels, mean), torch.full_like(levels, 2 * u - 1)
        bits = variational_bound(path, "sample", out, v, levels, levels, t)
        assert (2**-bits).sum().item() == pytest.approx(1, abs=1e-4)
        # Between that step's beta, and the posterior's variance at the second, since at the first it is zero.
        low, high = (1 - bar[0]) / (1 - bar[1]) * (1 - bar[1] / bar[0]), 1 - bar[0]
        normal = Normal(mean, (low ** (1 - u) * high**u).sqrt().item())
        inner = levels[1:-1].double()
        exact = (normal.cdf(inner + 1 / 255) - normal.cdf(inner - 1 / 255)).flatten()
        torch.testing.assert_close(2 ** -bits[1:-1].double(), exact, rtol=0, atol=1e-3)


def test_the_bound_trains_the_variance_alone():
    path, t = DiscretePath.linear(), torch.tensor([0, 1, 500, 999])
    x_0, eps, guessed, *_ = (part.float() for part in draws(t))
    x_t = add_noise(x_0, eps, *path.coefficients(t))
    out, v = guessed.clone().requires_grad_(), torch.zeros_like(x_0, requires_grad=True)
    for scale in (1, 100):  # of outliers, too, the gradient is finite
        bound = variational_bound(path, "epsilon", scale * out, v, scale * x_0, x_t, t)
        gradients = torch.autograd.grad(bound.sum(), (out, v), allow_unused=True)
        assert gradients[0] is None
        assert gradients[1].isfinite().all() and (scale > 1 or gradients[1].flatten(1).abs().amax(1).min() > 0)
