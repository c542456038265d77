"""The ladder of predictions, guidance settings, and the guiders of diffusers."""

import itertools
import math

import pytest
import torch
from oracle import TwoRungs, pixel_condition, pixel_model

from priorguide.sample.guidance import Guidance, combine, guide, rescale, rungs, unconditional
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.noise import DiscretePath, convert


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_one_rung_is_classifier_free_guidance():
    uncond, cond = normals(2, 4, 3)
    torch.testing.assert_close(guide([uncond, cond], [2.5]), uncond + 2.5 * (cond - uncond))
    torch.testing.assert_close(guide([uncond, cond], [1.0]), cond)
    torch.testing.assert_close(guide([uncond, cond], [0.0]), uncond)


def test_two_rungs_are_instruct_pix2pix():
    uncond, image, full = normals(3, 4, 3)
    expected = uncond + 1.5 * (image - uncond) + 7.5 * (full - image)
    torch.testing.assert_close(guide([uncond, image, full], [1.5, 7.5]), expected)


def test_a_prior_amplifies_what_fine_tuning_moved():
    """prior guidance = self guidance + (s - 1) (own null - prior's null), with s the lowest scale."""
    null, base, image, full = normals(4, 4, 3)
    moved = guide([null, image, full], [3, 2]) + (3 - 1) * (null - base)
    torch.testing.assert_close(guide([base, image, full], [3, 2]), moved)


def test_the_number_of_scales_must_fit_the_ladder():
    with pytest.raises(ValueError, match="a ladder of 2 predictions takes 1 scales, got 2"):
        guide([torch.zeros(1), torch.zeros(1)], [1, 2])


VALUES = [0.0, 1.0, 1.5, 7.5, -0.5]


@pytest.mark.parametrize("scales", [s for k in (1, 2, 3) for s in itertools.product(VALUES, repeat=k)])
def test_rungs_left_out_have_no_weight(scales):
    predictions = normals(len(scales) + 1, 5)
    used, between = rungs(scales)
    torch.testing.assert_close(guide([predictions[k] for k in used], between), guide([*predictions], scales))
    padded = [1, *scales, 0]
    assert used == [k for k in range(len(predictions)) if padded[k] - padded[k + 1]]


def test_which_rungs_are_left_out():
    assert rungs([1.0]) == ([1], [])
    assert rungs([0.0]) == ([0], [])
    assert rungs([3.0]) == ([0, 1], [3.0])
    assert rungs([1.0, 7.5]) == ([1, 2], [7.5])
    assert rungs([2.0, 2.0]) == ([0, 2], [2.0])
    assert rungs([1.0, 1.0]) == ([2], [])
    assert rungs([1.5, 0.0]) == ([0, 1], [1.5])


@pytest.mark.parametrize("t", [1, 400, 998])
@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_guidance_commutes_with_a_change_of_prediction(target, t):
    alpha, sigma = (c[0] for c in DiscretePath.scaled_linear().coefficients(torch.tensor([t])))
    x_t, scales = normals(5), [3.0, 7.5]
    ladder = [*normals(3, 5, seed=1)]
    guided = convert(guide(ladder, scales), x_t, "v_prediction", target, alpha, sigma)
    moved = guide([convert(p, x_t, "v_prediction", target, alpha, sigma) for p in ladder], scales)
    torch.testing.assert_close(moved, guided, rtol=1e-11, atol=1e-11)


def test_rescale_gives_the_conditional_deviation_of_each_sample():
    guided, cond = 5 * normals(3, 2, 4, 4) + 1, normals(3, 2, 4, 4, seed=1) + 2
    stds = {phi: rescale(guided, cond, phi).std((1, 2, 3)) for phi in (0.0, 0.7, 1.0)}
    torch.testing.assert_close(stds[1.0], cond.std((1, 2, 3)))
    torch.testing.assert_close(stds[0.0], guided.std((1, 2, 3)))
    torch.testing.assert_close(stds[0.7], 0.7 * stds[1.0] + 0.3 * stds[0.0])
    alone = rescale(guided[1:2], cond[1:2], 0.7)
    torch.testing.assert_close(rescale(guided, cond, 0.7)[1:2], alone)


@pytest.mark.parametrize(
    ("guidance", "sentence"),
    [
        (
            Guidance((1.0, 2.0)),
            r"PixelUNet has a ladder of 1 rung\(s\) \(image\+label\) and takes as many scales, got 2",
        ),
        (Guidance((3.0,), rescale=1.5), r"rescale must lie in \[0, 1\], got 1.5"),
        (Guidance((3.0,), interval=(900, 100)), r"interval must be \(low, high\) in the model's t, got \(900, 100\)"),
        (Guidance((3.0,), guider="pag"), r"guider must be one of \['apg', 'cfg_zero_star'\], got 'pag'"),
    ],
)
def test_guidance_that_does_not_fit_is_refused(guidance, sentence):
    with pytest.raises(ValueError, match=sentence):
        guidance.check(pixel_model())


def test_scales_of_another_number_show_what_is_typed():
    for model, scales, such, typed in (
        (pixel_model(), (1.0, 2.0), "[1.5]", "1.5"),
        (TwoRungs(), (1.5,), "[1.5, 7.5]", "1.5:7.5"),
    ):
        with pytest.raises(ValueError, match="takes as many scales") as caught:
            Guidance(scales).check(model)
        assert str(caught.value).endswith(f"got {len(scales)}: {scales}; such as {such}, on the command line {typed}")


def test_a_guider_takes_one_rung():
    with pytest.raises(ValueError, match="'apg' takes a ladder of one rung, this one has 2"):
        Guidance((3.0, 2.0), guider="apg").check(TwoRungs())


def test_the_interval_is_closed_and_outside_it_the_condition_stands_alone():
    guidance = Guidance((3.0, 2.0), interval=(200, 800))
    inside = [guidance.scales_at(t) == (3.0, 2.0) for t in (199.9, 200, 500, 800, 801)]
    assert inside == [False, True, True, True, False]
    assert guidance.scales_at(900) == (1.0, 1.0)


def draw(model, *, scheduler="ddim", steps=4, **guidance):
    return sample(
        model, pixel_condition(), [1, 2, 3], scheduler=make_scheduler(model, scheduler), steps=steps, **guidance
    )


PLAIN_APG = {"adaptive_projected_guidance_rescale": 0.0, "eta": 1.0}


@pytest.mark.parametrize("base", [False, True], ids=["self", "base"])
def test_apg_without_its_devices_is_classifier_free_guidance(base):
    model = pixel_model()
    prior = unconditional(pixel_model(seed=1), onto=model) if base else None
    plain = draw(model, scales=[3.0], prior=prior)
    apg = draw(model, scales=[3.0], prior=prior, guider="apg", guider_options=PLAIN_APG)
    torch.testing.assert_close(apg, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("base", [False, True], ids=["self", "base"])
@pytest.mark.parametrize(
    "options",
    [
        {"guider": "apg", "guider_options": {"eta": 0.0}},
        {"guider": "apg", "guider_options": {**PLAIN_APG, "adaptive_projected_guidance_momentum": -0.5}},
        {"guider": "cfg_zero_star"},
    ],
    ids=["apg", "momentum", "cfg_zero_star"],
)
def test_guiders_take_any_prior_and_do_something(options, base):
    model = pixel_model()
    prior = unconditional(pixel_model(seed=1), onto=model) if base else None
    guided, again, plain = (
        draw(model, scales=[3.0], prior=prior, **options),
        draw(model, scales=[3.0], prior=prior, **options),
        draw(model, scales=[3.0], prior=prior),
    )
    assert torch.equal(guided, again)  # no momentum is left over
    assert guided.isfinite().all() and (guided - plain).abs().max() > 1e-3


def test_apg_parts_the_difference_along_the_condition():
    """eta = 0 keeps what is orthogonal to the conditional prediction (arXiv 2410.02416, eq. 7)."""
    uncond, cond = normals(2, 3, 8)
    guidance = Guidance((4.0,), guider="apg", guider_options={"adaptive_projected_guidance_rescale": 0.0, "eta": 0.0})
    along = ((cond - uncond) * cond).sum(1, keepdim=True) / (cond**2).sum(1, keepdim=True) * cond
    expected = uncond + 4 * (cond - uncond - along)
    torch.testing.assert_close(combine(guidance, [uncond, cond], [4.0], guidance.make_guider()), expected)


def test_apg_momentum_runs_along_the_steps():
    momentum = {**PLAIN_APG, "adaptive_projected_guidance_momentum": -0.5}
    guidance, (uncond, cond, later) = Guidance((4.0,), guider="apg", guider_options=momentum), normals(3, 3, 8)
    guider = guidance.make_guider()
    combine(guidance, [uncond, cond], [4.0], guider)
    expected = uncond + 4 * ((later - uncond) - 0.5 * (cond - uncond))
    torch.testing.assert_close(combine(guidance, [uncond, later], [4.0], guider), expected)


def test_cfg_zero_star_scales_the_lower_prediction_and_begins_with_zero():
    uncond, cond = normals(2, 3, 8)
    guidance = Guidance((4.0,), guider="cfg_zero_star")
    guider = guidance.make_guider()
    guider.set_state(step=0, num_inference_steps=10, timestep=None)
    assert not combine(guidance, [uncond, cond], [4.0], guider).any()
    guider.set_state(step=1, num_inference_steps=10, timestep=None)
    lower = (cond * uncond).sum(1, keepdim=True) / (uncond**2).sum(1, keepdim=True) * uncond
    found = combine(guidance, [uncond, cond], [4.0], guider)
    torch.testing.assert_close(found, lower + 4 * (cond - lower), rtol=1e-5, atol=1e-5)


def test_a_zero_epsilon_is_refused_and_the_rest_of_cfg_zero_star_is_not():
    model = pixel_model(prediction="epsilon")
    with pytest.raises(ValueError, match="predictions of zero, which blow up as epsilon"):
        draw(model, scales=[3.0], guider="cfg_zero_star")
    assert draw(model, scales=[3.0], guider="cfg_zero_star", guider_options={"zero_init_steps": 0}).isfinite().all()


def test_rescaled_guidance_leaves_the_conditional_prediction_alone():
    guidance = Guidance((1.0,), rescale=0.7)
    cond = normals(3, 8)
    assert combine(guidance, [cond], []) is cond
    uncond = normals(3, 8, seed=1)
    guided = combine(Guidance((3.0,), rescale=1.0), [uncond, cond], [3.0])
    torch.testing.assert_close(guided.std(1), cond.std(1))
    assert not math.isclose(guided[0, 0], cond[0, 0])
