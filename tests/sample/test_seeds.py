"""Noise: seeded per sample, given, and never the global generator."""

import pytest
import torch
from oracle import DETERMINISTIC, STOCHASTIC, Mixture, labels

from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.noise import FlowPath
from priorguide.sample.seeds import SeededNoise


def test_noise_depends_on_the_seed_alone():
    together, alone = SeededNoise([5, 6, 7], (2, 3)), SeededNoise([6], (2, 3))
    for _ in range(3):
        assert torch.equal(together.draw()[1:2], alone.draw())
    first = SeededNoise(range(4000), (1,)).draw()
    assert abs(first.mean()) < 0.06 and abs(first.std() - 1) < 0.05
    pairs = torch.corrcoef(torch.stack([first[:-1, 0], first[1:, 0]]))
    assert abs(pairs[0, 1]) < 0.06


def test_noise_ignores_torchs_defaults():
    expected = SeededNoise([1, 2], (3,)).draw()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = SeededNoise([1, 2], (3,)).draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


class Nothing(Mixture):
    """Predicts zero, whatever the input: what is left is the noise."""

    def denoise(self, x_t, t, condition):
        return torch.zeros_like(x_t)


@pytest.mark.parametrize(("name", "options", "eta"), STOCHASTIC)
def test_step_noise_is_bit_identical_in_any_batch(name, options, eta):
    nothing = Nothing()
    settings = {"scheduler": make_scheduler(nothing, name, **options), "scales": [1.0], "steps": 5, "eta": eta}
    together = sample(nothing, labels(0, 4), [4, 5, 6, 7], **settings)
    alone = [sample(nothing, labels(0, 1), [seed], **settings) for seed in (4, 5, 6, 7)]
    assert torch.equal(together, torch.cat(alone))
    assert len(together.unique()) == together.numel()  # and every sample's is its own


@pytest.mark.parametrize(("name", "options", "eta"), STOCHASTIC)
def test_step_noise_can_be_given(name, options, eta):
    mixture, seeds = Mixture(), [3, 4]
    settings = {"scheduler": make_scheduler(mixture, name, **options), "scales": [1.0], "steps": 5, "eta": eta}
    source = SeededNoise(seeds, mixture.shape)
    noise, step_noise = source.draw(), torch.stack([source.draw() for _ in range(5)])
    own = sample(mixture, labels(0, 2), seeds, **settings)
    given = sample(mixture, labels(0, 2), [0, 0], noise=noise, step_noise=step_noise, **settings)
    assert torch.equal(own, given)
    assert not torch.equal(own, sample(mixture, labels(0, 2), [0, 0], noise=noise, step_noise=-step_noise, **settings))
    # A given initial noise leaves the steps' noise as it is: never the initial noise once more.
    assert torch.equal(own, sample(mixture, labels(0, 2), seeds, noise=noise, **settings))


@pytest.mark.parametrize(
    ("name", "options", "eta"), [*DETERMINISTIC, *STOCHASTIC, ("flow_euler", {"stochastic_sampling": True}, 0.0)]
)
def test_the_global_random_state_is_left_alone(name, options, eta):
    mixture = Mixture(path=FlowPath() if name == "flow_euler" else None)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    scheduler = make_scheduler(mixture, name, **options)
    first = sample(mixture, labels(0, 2), [0, 1], scheduler=scheduler, scales=[3.0], steps=8, eta=eta)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    again = sample(mixture, labels(0, 2), [0, 1], scheduler=scheduler, scales=[3.0], steps=8, eta=eta)
    assert first.isfinite().all() and torch.equal(first, again)
