"""Sampling where the answer is known: exact denoisers, and the loops of diffusers itself."""

import inspect

import pytest
import torch
from oracle import DETERMINISTIC, STOCHASTIC, TWO, Mixture, TwoRungs, assert_near, labels

from priorguide.sample.guidance import unconditional
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.noise import DiscretePath, FlowPath
from priorguide.sample.seeds import SeededNoise


@pytest.mark.parametrize(
    ("name", "options", "eta"),
    [
        *DETERMINISTIC,
        *STOCHASTIC,
        ("euler", {"use_karras_sigmas": True}, 0.0),
        ("dpm++", {"use_karras_sigmas": True}, 0.0),
        ("flow_euler", {}, 0.0),
        ("flow_euler", {"shift": 2.0}, 0.0),
    ],
)
def test_every_scheduler_draws_from_a_known_mixture(name, options, eta):
    # Karras' levels spend most steps on the cosine's noisiest end.
    path = FlowPath() if name == "flow_euler" else DiscretePath.linear() if options else DiscretePath.cosine()
    mixture = Mixture(path=path)
    scheduler = make_scheduler(mixture, name, **options)
    x = sample(mixture, labels(3, 1000), range(1000), scheduler=scheduler, scales=[1.0], steps=50, eta=eta).flatten(1)
    distances = ((x[:, None] - mixture.means) ** 2).sum(2) / mixture.stds**2
    nearest = distances.argmin(1)
    for k, (mean, std, share) in enumerate(zip(mixture.means, mixture.stds, mixture.shares, strict=True)):
        own = x[nearest == k].double()
        assert len(own) / 1000 == pytest.approx(float(share), abs=0.04)
        assert (own.mean(0) - mean).abs().max() < 0.09  # 3 standard errors of the least component
        assert 0.85 < (own - own.mean(0)).square().mean().sqrt() / std < 1.1


PREDICTIONS = ["epsilon", "sample", "v_prediction", "flow_prediction"]


@pytest.mark.parametrize(("name", "options", "eta"), [*DETERMINISTIC, *STOCHASTIC])
def test_all_predictions_draw_the_same_pictures(name, options, eta):
    pictures = []
    for prediction in PREDICTIONS:
        mixture = Mixture(prediction=prediction)
        scheduler = make_scheduler(mixture, name, **options)
        pictures.append(sample(mixture, labels(3, 20), range(20), scheduler=scheduler, scales=[1.0], steps=20, eta=eta))
    for other in pictures[1:]:
        torch.testing.assert_close(other, pictures[0], rtol=0, atol=5e-3)  # epsilon is ill-conditioned in much noise


def gaussian(mean, path=None, prediction="v_prediction"):
    return Mixture([mean], [0.5], [1.0], path, prediction)


@pytest.mark.parametrize(("name", "options", "eta"), [*DETERMINISTIC, *STOCHASTIC, ("flow_euler", {}, 0.0)])
def test_guidance_by_a_prior_is_exact_for_gaussians(name, options, eta):
    """Scores of Gaussians of one width are linear in the mean: guided, they are those about the guided mean."""
    path = FlowPath() if name == "flow_euler" else DiscretePath.linear()
    fine = gaussian((1.0, 0.5), path)
    base = gaussian((0.5, -0.5), FlowPath(), "flow_prediction")
    expected = gaussian((0.5 + 3 * 0.5, -0.5 + 3 * 1.0), path)
    settings = {"scheduler": make_scheduler(fine, name, **options), "steps": 20, "eta": eta}
    bound = unconditional(base, onto=fine)
    guided = sample(fine, labels(0, 16), range(16), scales=[3.0], prior=bound, **settings)
    direct = sample(expected, labels(0, 16), range(16), scales=[1.0], **settings)
    torch.testing.assert_close(guided, direct, rtol=0, atol=2e-4)


def test_self_guidance_is_exact_for_gaussians():
    fine = Mixture([(1.0, 0.5), (0.5, -0.5)], [0.5, 0.5], [1e-200, 1.0])  # the null is the second component
    expected, settings = gaussian((2.0, 2.5)), {"scheduler": make_scheduler(fine), "steps": 20}
    guided = sample(fine, labels(0, 16), range(16), scales=[3.0], **settings)
    direct = sample(expected, labels(0, 16), range(16), scales=[1.0], **settings)
    torch.testing.assert_close(guided, direct, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "gain"), [("ddim", 3), ("euler", 3), ("dpm++", 9), ("unipc", 9)])
def test_solvers_converge_to_the_exact_flow(name, gain):
    """x_t = alpha m + sqrt(alpha^2 s^2 + sigma^2) z along the probability flow of N(m, s^2)."""
    model = gaussian((1.0, -0.5), DiscretePath.linear())
    noise = SeededNoise(range(64), model.shape).draw().double()
    errors = []
    for steps in (25, 100):
        scheduler = make_scheduler(model, name, timestep_spacing="trailing")
        alpha, sigma = model.path.coefficients(torch.tensor([999]))
        z = (noise - alpha * torch.tensor([1.0, -0.5]).reshape(1, 2, 1, 1)) / (alpha**2 * 0.25 + sigma**2).sqrt()
        exact = torch.tensor([1.0, -0.5]).reshape(1, 2, 1, 1) + 0.5 * z
        found = sample(model, labels(0, 64), range(64), scheduler=scheduler, scales=[1.0], steps=steps)
        errors.append(float((found - exact).abs().mean()))
    assert errors[1] < 0.02 and errors[1] < errors[0] / gain  # four times the steps: first and second order


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "options", "eta"),
    [
        *DETERMINISTIC,
        *STOCHASTIC,
        ("ddim", {"clip_sample": True, "timestep_spacing": "trailing"}, 0.0),
        ("dpm++", {"use_karras_sigmas": True}, 0.0),
        ("euler", {"timestep_spacing": "leading", "steps_offset": 1}, 0.0),
        ("ddpm", {"variance_type": "fixed_large", "thresholding": True}, 0.0),
    ],
)
def test_the_loop_is_diffusers_own(name, options, eta, prediction):
    model, steps = TwoRungs(prediction=prediction), 6
    scheduler = make_scheduler(model, name, **options)
    assert scheduler.config.prediction_type == prediction
    noise = torch.randn(4, *model.shape, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    step_noise = torch.stack([torch.randn(4, *model.shape, generator=generator) for _ in range(steps)])
    settings = {"scheduler": scheduler, "scales": [1.5, 2.5], "noise": noise, "step_noise": step_noise, "eta": eta}
    assert_near(sample(model, TWO, range(4), steps=steps, **settings), stock(model, scheduler, steps, noise, eta))


@torch.no_grad()
def stock(model, scheduler, steps, noise, eta):
    """InstructPix2Pix's guidance as diffusers' pipelines write it, at scales 1.5 and 2.5."""
    known = inspect.signature(scheduler.step).parameters
    # Of effect where x_0 is clipped: eps is what then remains of x_t.
    extra = {"eta": eta, "generator": torch.Generator().manual_seed(2), "use_clipped_model_output": True}
    extra = {key: value for key, value in extra.items() if key in known}
    scheduler.set_timesteps(steps)
    x, zeros = noise * scheduler.init_noise_sigma, {name: torch.zeros_like(part) for name, part in TWO.items()}
    parts = {
        "image": torch.cat([TWO["image"], TWO["image"], zeros["image"]]),
        "text": torch.cat([TWO["text"], zeros["text"], zeros["text"]]),
    }
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(torch.cat([x] * 3), t)
        text, image, uncond = model.denoise(x_t, t.expand(len(x_t)), parts).chunk(3)
        out = uncond + 2.5 * (text - image) + 1.5 * (image - uncond)
        x = scheduler.step(out, t, x, **extra).prev_sample
    return x


def test_given_timesteps_are_used():
    mixture, times, seen = Mixture(), [999, 700, 300, 10], []
    for name in ("ddpm", "euler", "dpm++", "flow_euler"):
        mixture.path = FlowPath() if name == "flow_euler" else DiscretePath.cosine()
        mixture.denoise = lambda x_t, t, parts: seen.append(t.tolist()) or Mixture.denoise(mixture, x_t, t, parts)
        seen.clear()
        arguments = {"scheduler": make_scheduler(mixture, name), "scales": [1.0]}
        x = sample(mixture, labels(0, 2), [0, 1], timesteps=times, **arguments)
        assert seen == [[float(t)] * 2 for t in times] and x.isfinite().all()
