"""Any network as the unconditional prior: equal to itself, bound across paths and predictions, refused."""

import copy
import warnings

import pytest
import torch
from oracle import (
    Mixture,
    TwoRungs,
    pixel_condition,
    pixel_model,
    zero_terminal,
)

from priorguide.sample.guidance import Guidance, Prior, unconditional
from priorguide.sample.loop import make_scheduler, sample, trajectories
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.noise import DiscretePath, FlowPath, like, weights
from priorguide.sample.planning import evaluations


def draw(model, *, scheduler="ddim", steps=4, **guidance):
    return sample(
        model, pixel_condition(), [1, 2, 3], scheduler=make_scheduler(model, scheduler), steps=steps, **guidance
    )


def by_hand(model, t, x_t, condition, scale):
    uncond = model.denoise(x_t, t, model.null(condition))
    return uncond + scale * (model.denoise(x_t, t, condition) - uncond)


def test_the_self_prior_is_plain_classifier_free_guidance():
    model = pixel_model()
    unbound, bound = draw(model, scales=[3.0]), draw(model, scales=[3.0], prior=unconditional(model, onto=model))
    assert torch.equal(unbound, bound)
    scheduler = make_scheduler(model, "ddim")
    scheduler.set_timesteps(4)
    x = torch.stack([torch.randn(model.shape, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = by_hand(model, torch.full((3,), float(t)), x, pixel_condition(), 3.0)
            x = scheduler.step(out, t, x).prev_sample
    torch.testing.assert_close(bound, x, rtol=0, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "unipc", "ddpm"])
def test_a_base_equal_to_the_fine_tune_changes_nothing(scheduler):
    model = pixel_model()
    base = unconditional(copy.deepcopy(model), onto=model)
    own, other = (draw(model, scheduler=scheduler, scales=[3.0], prior=p) for p in (None, base))
    torch.testing.assert_close(other, own, rtol=0, atol=1e-4 * max(1, float(own.abs().max())))


def test_before_training_base_and_self_give_one_picture():
    base = pixel_model(num_classes=0, image_channels=0)
    model = PixelUNet.from_base(base, num_classes=3, image_channels=1).eval()
    own, other = (draw(model, scales=[3.0], prior=p) for p in (None, unconditional(base, onto=model)))
    torch.testing.assert_close(other, own, rtol=0, atol=1e-4)


def test_a_mixed_prior_is_a_share_of_each():
    """One step, so that guided predictions are linear in p_0; both are evaluated, in one plan with other candidates."""
    model, base = pixel_model(), unconditional(pixel_model(7), onto=pixel_model())
    base = unconditional(base.model, onto=model)
    shares = {share: Guidance((3.0,), base, mix=share) for share in (0.0, 0.25, 1.0)}
    arguments = {"scheduler": make_scheduler(model), "steps": 1}
    own, *mixed = trajectories(model, pixel_condition(), [1, 2, 3], [Guidance((3.0,)), *shares.values()], **arguments)
    found = dict(zip(shares, mixed, strict=True))
    torch.testing.assert_close(found[0.0], own, rtol=0, atol=1e-5 * float(own.abs().max()))
    expected = torch.lerp(own, found[1.0], 0.25)
    torch.testing.assert_close(found[0.25], expected, rtol=0, atol=1e-4 * float(own.abs().max()))
    assert not torch.allclose(found[1.0], own, atol=1e-2)
    assert [evaluations(guidance, [900, 500]) for guidance in shares.values()] == [6, 6, 4]
    assert evaluations(Guidance((1.0,), base, mix=0.5), [900]) == 1
    with pytest.raises(ValueError, match=r"mix must lie in \[0, 1\]"):
        Guidance((3.0,), base, mix=1.5).check(model)


def test_another_base_gives_another_picture():
    model = pixel_model()
    other = draw(model, scales=[3.0], prior=unconditional(pixel_model(seed=1), onto=model))
    assert (other - draw(model, scales=[3.0])).abs().max() > 0.01


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PATHS = {
    "linear": DiscretePath.linear(),
    "scaled_linear": DiscretePath.scaled_linear(),
    "cosine": DiscretePath.cosine(),
    "flow": FlowPath(),
}


ORACLES = [
    (path, prediction) for path in PATHS for prediction in ("epsilon", "v_prediction", "sample", "flow_prediction")
]


@pytest.mark.parametrize(("path", "prediction"), ORACLES)
@pytest.mark.parametrize(
    ("onto_path", "onto_prediction"), [("linear", "epsilon"), ("cosine", "v_prediction"), ("flow", "flow_prediction")]
)
def test_binding_gives_the_same_prediction_in_the_other_models_terms(path, prediction, onto_path, onto_prediction):
    """Exact denoisers of one distribution on two paths: bound, one says what the other says."""
    prior = Mixture(path=PATHS[path], prediction=prediction)
    model = Mixture(path=PATHS[onto_path], prediction=onto_prediction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bound = unconditional(prior, onto=model)
    # Times at which the prior has the noise level too.
    low, high = (
        max(pair) if i == 0 else min(pair)
        for i, pair in enumerate(zip(prior.path.log_snr_range(), model.path.log_snr_range(), strict=True))
    )
    t = model.path.time(torch.linspace(max(low, -9) + 1e-3, min(high, 9) - 1e-3, 200, dtype=torch.float64))
    x_0, eps = normals(2, len(t), 2, 1, 1)
    alpha, sigma = model.path.coefficients(t)
    x_t = like(alpha, x_0) * x_0 + like(sigma, x_0) * eps
    null = model.null({"label": torch.zeros(len(t), dtype=torch.long)})
    expected = model.denoise(x_t, t, null)
    own_x_t, own_t = bound.locate(x_t, t)
    found = bound.express(prior.denoise(own_x_t, own_t, null), x_t, t)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    # In single precision, as the loop runs it; an epsilon says little of x_0 in much noise, a sample of eps in little.
    own_x_t, own_t = bound.locate(x_t.float(), t)
    single = bound.express(prior.denoise(own_x_t, own_t, null), x_t.float(), t)
    assert single.dtype == torch.float32
    assert ((single - expected).abs().flatten(1).amax(1) <= 3e-6 / torch.minimum(alpha, sigma) + 1e-5).all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_binding_on_one_path_only_converts(kind):
    prior, model = Mixture(prediction=kind), Mixture(prediction="flow_prediction")
    bound, x_t, t = Prior(prior, model), normals(4, 2, 1, 1), torch.tensor([1.0, 300.0, 700.0, 990.0])
    own_x_t, own_t = bound.locate(x_t, t)
    assert own_x_t is x_t and own_t is t
    null = model.null({"label": torch.zeros(4, dtype=torch.long)})
    torch.testing.assert_close(
        bound.express(prior.denoise(x_t, t, null), x_t, t), model.denoise(x_t, t, null), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("onto", [zero_terminal(), FlowPath()], ids=["zero_terminal", "flow"])
@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_beyond_its_range_a_prior_is_clamped_with_one_warning(onto, prediction, target):
    model = Mixture(path=onto, prediction=target)
    prior = Mixture(path=DiscretePath.scaled_linear(), prediction=prediction)
    with pytest.warns(UserWarning, match=r"prior \w+ knows log-SNR -5\.\d+ to 7\.\d+, the fine-tuned model .* nearest"):
        bound = unconditional(prior, onto=model)
    last = 1000.0 if isinstance(onto, FlowPath) else 999.0
    t = torch.tensor([last, last - 1, last - 5])  # alpha is 0, then below the prior's least
    x_t = normals(3, 2, 1, 1).float()
    null = model.null({"label": torch.zeros(3, dtype=torch.long)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_x_t, own_t = bound.locate(x_t, t)
        found = bound.express(prior.denoise(own_x_t, own_t, null), x_t, t)
    assert own_t.tolist() == [999.0] * 3
    assert found.isfinite().all()
    # Its x_0 stands, and eps is what then remains of x_t.
    x_0, _ = prior.posterior(own_x_t, own_t, null["label"])
    alpha, sigma = (like(c, x_0) for c in onto.coefficients(t))
    a, b = weights(target, alpha, sigma)
    torch.testing.assert_close(found.double(), a * x_0 + b * (x_t - alpha * x_0) / sigma, rtol=1e-4, atol=1e-4)


def test_a_prior_that_covers_the_range_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unconditional(Mixture(path=FlowPath()), onto=Mixture(path=DiscretePath.linear()))
        unconditional(Mixture(path=zero_terminal()), onto=Mixture(path=DiscretePath.scaled_linear()))


def test_a_prior_keeps_the_parts_it_is_told_to():
    model, base = TwoRungs(), TwoRungs(seed=1)
    condition = {"text": torch.ones(4, 3), "image": torch.ones(4, 2, 4, 4)}
    plain = unconditional(base, onto=model).condition(condition, 4)
    kept = unconditional(base, onto=model, keep=frozenset({"image"})).condition(condition, 4)
    assert plain["text"].shape == (4, 3) and not plain["text"].any() and not plain["image"].any()
    assert kept["image"].all() and not kept["text"].any()


def test_networks_that_are_not_comparable_are_refused():
    model = pixel_model()
    with pytest.raises(ValueError, match=r"shape \(16, 4, 4\).*\(4, 8, 8\).*same channels"):
        unconditional(pixel_model(fold=4), onto=model)
    elsewhere = pixel_model()
    elsewhere.space = "latents of another autoencoder"
    with pytest.raises(ValueError, match="means 'latents of another autoencoder'.*one latent space"):
        unconditional(elsewhere, onto=model)
    with pytest.raises(ValueError, match=r"keep names \['pose'\], but PixelUNet has \['image', 'label'\]"):
        unconditional(pixel_model(), onto=model, keep=frozenset({"pose"}))
    with pytest.raises(ValueError, match=r"keep names \['image'\], but PixelUNet has \[\]"):
        unconditional(pixel_model(num_classes=0, image_channels=0), onto=model, keep=frozenset({"image"}))


def test_a_prior_bound_onto_another_model_is_refused():
    model, other = pixel_model(), pixel_model()
    with pytest.raises(ValueError, match="bound onto another model"):
        Guidance((3.0,), prior=unconditional(other, onto=other)).check(model)
