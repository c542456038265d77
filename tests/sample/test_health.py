"""The null loss of priors on held-out data, where the truth is known."""

import pytest
import torch
from oracle import Mixture

from priorguide.sample.distances import Estimate
from priorguide.sample.guidance import unconditional
from priorguide.sample.health import Health, in_words, null_health
from priorguide.sample.noise import DiscretePath


def draws(mixture, n=600):
    """x_0 (n, D, 1, 1) from the mixture."""
    generator = torch.Generator().manual_seed(4)
    which = torch.multinomial(mixture.shares, n, replacement=True, generator=generator)
    noise = torch.randn(n, mixture.means.shape[1], generator=generator, dtype=torch.float64)
    return (mixture.means[which] + mixture.stds[which, None] * noise).float()[..., None, None]


def other(**options):
    return Mixture(means=((3.0, 1.0), (0.0, 2.5), (-2.0, -1.0)), **options)


def health(model, bases, x_0, **options):
    priors = {name: unconditional(base, onto=model) for name, base in bases.items()}
    return null_health(model, {"self": None, **priors}, x_0, {}, **options)


def test_the_loss_of_an_exact_gaussian():
    """E (eps - E[eps | x_t])^2 = alpha^2 s^2 / (alpha^2 s^2 + sigma^2) for x_0 of deviation s."""
    model = Mixture(means=((0.5, -0.2),), stds=(0.7,), shares=(1.0,), path=DiscretePath.linear())
    found = health(model, {}, draws(model, 4000), levels=4)["self"]
    ratio = torch.tensor(found.log_snr).exp() * 0.7**2
    expected = ratio / (ratio + 1)
    torch.testing.assert_close(torch.tensor(found.loss), expected.float(), rtol=0.05, atol=0.002)
    assert list(found.log_snr) == sorted(found.log_snr, reverse=True)
    assert found.gap == (0.0,) * 4 and (found.excess.value, found.excess.error) == (0.0, 0.0)


@pytest.mark.filterwarnings("ignore:the prior .* knows log-SNR")
@pytest.mark.parametrize("path", [DiscretePath.cosine(), DiscretePath.scaled_linear()])
def test_an_equal_prior_in_other_terms_loses_nothing(path):
    model = Mixture(prediction="epsilon")
    found = health(model, {"base": Mixture(path=path)}, draws(model), levels=5)["base"]
    assert abs(found.excess.value) < 0.01 and max(found.gap) < 0.05


def test_a_prior_of_another_domain_is_worse_and_the_true_one_better():
    true, wrong = Mixture(), other()
    x_0 = draws(true)
    left = health(true, {"base": wrong}, x_0)["base"]
    assert left.excess.value - 3 * left.excess.error > 0.05 and min(left.gap) > 0
    assert "fine-tuning left its domain" in in_words("base", left)
    better = health(wrong, {"base": true}, x_0)["base"]
    assert better.excess.value + 3 * better.excess.error < -0.05
    assert "better than the model's own null" in in_words("base", better)


def test_it_is_paired_and_repeats():
    true = Mixture()
    near = Mixture(stds=(0.31, 0.5, 0.4))
    first, second = (health(true, {"base": near}, draws(true), batch_size=size)["base"] for size in (64, 600))
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    # far less than the spread of the loss itself: the noise is common
    assert first.excess.error < 0.005


def test_a_mix_lies_between_the_two():
    true, wrong = Mixture(), other()
    prior, x_0 = unconditional(wrong, onto=true), draws(true)
    priors = {"own": prior, "half": prior, "all": prior}
    found = null_health(true, priors, x_0, {}, mix={"own": 0.0, "half": 0.5}, levels=4)
    assert found["own"].gap == (0.0,) * 4 and found["own"].excess.value == 0
    assert found["half"].gap == pytest.approx([0.5 * gap for gap in found["all"].gap], rel=1e-4)
    assert 0 < found["half"].excess.value < 0.5 * found["all"].excess.value  # a squared error is convex


def test_words_for_a_tie():
    tie = Health((0.0,), (1.0,), (0.1,), Estimate(0.001, 0.002))
    assert in_words("base", tie) == (
        "base predicts held-out data without a condition as well as the model's own: -0.3 to +0.5 %."
    )
