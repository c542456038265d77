"""Paths that scale the data, as DynamiCrafter's and VideoCrafter's do, against exact denoisers."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from oracle import Mixture

from priorguide.sample.guidance import unconditional
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.models.dynamicrafter import DynamiCrafter
from priorguide.sample.models.videocrafter import VideoCrafter
from priorguide.sample.noise import (
    DiscretePath,
    add_noise,
    data_coefficients,
    data_scale,
    like,
    log_snr,
    split,
    weights,
)
from priorguide.train.fine_tune import FineTune

PLAIN = DiscretePath.scaled_linear()
ZERO = PLAIN.scaling(0.7, zero_terminal_snr=True)
"""DynamiCrafter 512's."""
KNOWN = PLAIN.scaling(0.7)
"""VideoCrafter2's."""


class Scaled(Mixture):
    """The exact predictions where z_0 = s(t) x_0 is what is predicted."""

    def posterior(self, x_t, t, label):
        path = self.path
        self.path = SimpleNamespace(coefficients=lambda t: data_coefficients(path, t))
        try:
            x_0, eps = super().posterior(x_t, t, label)
        finally:
            self.path = path
        return data_scale(path, t.double()).reshape(-1, 1, 1, 1) * x_0, eps


def test_what_a_path_with_scaled_data_is():
    t = torch.tensor([0.0, 199.5, 399.0, 700.0, 999.0])
    torch.testing.assert_close(
        ZERO.scale_at(t), torch.tensor([1, 1 - 0.3 * 199.5 / 399, 0.7, 0.7, 0.7], dtype=torch.float64)
    )
    alpha, sigma = ZERO.coefficients(t.double())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(
        alpha[[0, 2, 3, 4]] ** 2, ZERO.alphas_cumprod[t[[0, 2, 3, 4]].long()], atol=1e-12, rtol=0
    )
    torch.testing.assert_close(alpha[0] ** 2, PLAIN.alphas_cumprod[0])
    assert alpha[-1] < 1e-12 and ZERO.log_snr_range()[0] < -60
    between = torch.tensor([0.5, 123.4, 400.2, 998.5], dtype=torch.float64)
    found = KNOWN.time(log_snr(*data_coefficients(KNOWN, between)))
    torch.testing.assert_close(found, between)
    assert PLAIN != KNOWN and PLAIN.scaling(0.7) == KNOWN and PLAIN.scaling(1.0) == PLAIN
    assert ZERO.scale_at(torch.tensor([399])).item() == pytest.approx(0.7)
    with pytest.raises(ValueError, match="never rise"):
        DiscretePath([0.9, 0.5], scale=[0.5, 1.0])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("ends_scaled", [False, True])
@pytest.mark.parametrize(("prediction", "zero"), [("epsilon", False), ("v_prediction", True)])
def test_samples_are_of_the_data_whatever_it_was_scaled_by(eta, ends_scaled, prediction, zero):
    path = PLAIN.scaling(0.3, zero_terminal_snr=zero, ends_scaled=ends_scaled)
    model = Scaled(path=path, prediction=prediction)
    steps, count = 250, 200
    scheduler = make_scheduler(model, timestep_spacing="trailing")
    label = torch.zeros(count, dtype=torch.long)
    x_0 = sample(model, {"label": label}, range(count), scheduler=scheduler, scales=[1.0], steps=steps, eta=eta)
    scale = path.scale_at(torch.tensor([1000 / steps - 1])).item() if ends_scaled else 1.0
    flat = x_0.flatten(1).double()
    torch.testing.assert_close(flat.mean(0), scale * model.means[0], atol=0.05, rtol=0)
    assert flat.std(0).tolist() == pytest.approx([scale * model.stds[0].item()] * 2, rel=0.2)


@pytest.mark.parametrize("name", ["dpm++", "euler", "unipc"])
def test_a_sampler_that_could_not_follow_is_refused(name):
    with pytest.raises(ValueError, match="cannot follow a path that scales the data"):
        make_scheduler(Scaled(path=KNOWN, prediction="epsilon"), name)


@pytest.mark.parametrize(
    ("base", "onto"),
    [
        ((KNOWN, "epsilon"), (ZERO, "v_prediction")),
        ((KNOWN, "epsilon"), (PLAIN, "epsilon")),
        ((PLAIN, "epsilon"), (ZERO, "v_prediction")),
    ],
)
def test_a_prior_across_scales_is_exact_within_its_range(base, onto):
    base, onto = (Scaled(path=path, prediction=prediction) for path, prediction in (base, onto))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prior = unconditional(base, onto=onto)
    low = base.path.log_snr_range()[0]
    t = torch.arange(0.0, 999.0, 37.5, dtype=torch.float64)
    t = t[log_snr(*data_coefficients(onto.path, t)) >= low]
    x_t = torch.randn(len(t), *onto.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    null = torch.full((len(t),), len(base.means))
    own_x_t, own_t = prior.locate(x_t, t)
    found = prior.express(base.denoise(own_x_t, own_t, {"label": null}), x_t, t)
    exact = onto.denoise(x_t, t, {"label": null})
    assert len(t) > 20
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


def test_beyond_the_priors_range_it_is_clamped_and_said_once():
    base, onto = (Scaled(path=path, prediction=p) for path, p in ((KNOWN, "epsilon"), (ZERO, "v_prediction")))
    with pytest.warns(UserWarning, match="outside its range") as said:
        prior = unconditional(base, onto=onto)
    assert len(said) == 1
    t = torch.arange(1000, dtype=torch.float64)
    outside = log_snr(*data_coefficients(ZERO, t)) < KNOWN.log_snr_range()[0] - 1e-6
    assert outside[-1] and int(outside.sum()) == pytest.approx(120, abs=1)
    x_t, t = torch.randn(2, *onto.shape, dtype=torch.float64), torch.tensor([950.0, 999.0], dtype=torch.float64)
    own_x_t, own_t = prior.locate(x_t, t)
    assert own_t.tolist() == [999, 999]
    out = base.denoise(own_x_t, own_t, {"label": torch.full((2,), 3)})
    found = prior.express(out, x_t, t)
    # At alpha = 0 v is -z_0: the prior's own x_0, in this path's scale.
    alpha, sigma = (like(c, out) for c in base.path.coefficients(own_t))
    z_0, _ = split("epsilon", out, own_x_t, alpha, sigma)
    torch.testing.assert_close(found[1], -z_0[1])
    assert found.isfinite().all()


def test_training_speaks_of_the_scaled_data():
    model = DynamiCrafter.tiny("512")
    x_0, eps = (torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    t, condition = torch.tensor([999, 300]), model.null({})
    condition = {name: part.expand(2, *part.shape[1:]) for name, part in condition.items()}
    seen = []
    model.denoise = lambda x_t, t, condition: seen.append(x_t) or torch.zeros_like(x_t)
    loss = FineTune(model, ema_decay=0).loss(x_0, condition, eps, t)
    alpha, sigma = model.path.coefficients(t)
    z_0 = like(model.path.scale_at(t), x_0) * x_0
    a, b = weights("v_prediction", alpha, sigma)
    target = add_noise(z_0, eps, a, b)
    torch.testing.assert_close(seen[0], add_noise(z_0, eps, alpha, sigma))
    torch.testing.assert_close(loss, target.square().flatten(1).mean(1))


def test_tiny_models_with_scaled_data_sample_with_each_other():
    model, base = DynamiCrafter.tiny("512").eval(), VideoCrafter.tiny(0.7).eval()
    assert base.path == KNOWN and model.path == ZERO
    with pytest.warns(UserWarning, match="outside its range"):
        prior = unconditional(base, onto=model)
    condition = {name: part.expand(2, *part.shape[1:]) for name, part in model.null({}).items()}
    condition = {**condition, "text": torch.randn(2, *condition["text"].shape[1:]), "fps": torch.tensor([8.0, 30.0])}
    assert torch.equal(prior.condition(condition, 2)["fps"], condition["fps"])  # neither of the two drops it
    options = {"scheduler": make_scheduler(model, timestep_spacing="trailing"), "steps": 3, "eta": 1.0}
    found = sample(model, condition, [1, 2], scales=[1.5, 7.5], prior=prior, rescale=0.7, **options)
    own = sample(model, condition, [1, 2], scales=[1.5, 7.5], rescale=0.7, **options)
    assert found.isfinite().all() and not torch.allclose(found, own)


def test_a_stride_is_no_rate_of_another_kind():
    """DynamiCrafter 256's number is a stride: VideoCrafter2 keeps its own default of frames per second."""
    model, base = DynamiCrafter.tiny(), VideoCrafter.tiny(0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prior = unconditional(base, onto=model)
    condition = {**model.null({}), "frame_stride": torch.tensor([5.0])}
    assert prior.condition(condition, 1)["fps"].item() == 16
