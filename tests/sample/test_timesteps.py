"""Schedulers: what is left as it was, and what is refused."""

import copy

import diffusers
import pytest
import torch
from oracle import (
    Mixture,
    labels,
)

from priorguide.sample.loop import SCHEDULERS, Sampler, make_scheduler, sample
from priorguide.sample.noise import DiscretePath, FlowPath


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_passed_in_is_left_as_it_was(name):
    mixture = Mixture(path=FlowPath() if name == "flow_euler" else None)
    scheduler = make_scheduler(mixture, name)
    before = copy.deepcopy(vars(scheduler))
    first = sample(mixture, labels(0, 2), [0, 1], scheduler=scheduler, scales=[3.0], steps=5)
    for key, value in vars(scheduler).items():
        same = torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else value == before[key]
        assert same, key
    sample(mixture, labels(0, 2), [0, 1], scheduler=scheduler, scales=[3.0], steps=3)
    assert torch.equal(first, sample(mixture, labels(0, 2), [0, 1], scheduler=scheduler, scales=[3.0], steps=5))


def test_a_sampler_makes_its_scheduler():
    mixture = Mixture(prediction="epsilon")
    made = Sampler("dpm++", options={"algorithm_type": "sde-dpmsolver++"}).make(mixture)
    assert type(made).__name__ == "DPMSolverMultistepScheduler"
    assert made.config.algorithm_type == "sde-dpmsolver++" and made.config.prediction_type == "epsilon"


def test_pictures_are_not_clipped_unless_asked():
    mixture = Mixture()
    assert not make_scheduler(mixture, "ddim").config.clip_sample
    assert make_scheduler(mixture, "ddim", clip_sample=True).config.clip_sample


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: make_scheduler(m, "heun"), r"scheduler must be one of \['ddim', .*\], got 'heun'"),
        (lambda m: make_scheduler(m, "ddim", eta=1.0), r"DDIMScheduler has no option \['eta'\]"),
        (lambda m: make_scheduler(m, "ddim", beta_schedule="linear"), "noise schedule is not the model's"),
        (lambda m: make_scheduler(m, "ddim", num_train_timesteps=500), "noise schedule is not the model's"),
        (lambda m: make_scheduler(m, "ddim", rescale_betas_zero_snr=True), "noise schedule is not the model's"),
        (lambda m: make_scheduler(m, "flow_euler"), "does not follow a DiscretePath: only flow_euler follows a flow"),
        (lambda m: make_scheduler(m, "ddpm", variance_type="learned_range"), "wants a learned variance"),
        (lambda m: make_scheduler(m, "dpm++", prediction_type="flow_prediction"), "flow_prediction on a flow alone"),
        (lambda m: make_scheduler(Mixture(path=FlowPath()), "ddim"), "DDIMScheduler does not follow a FlowPath"),
    ],
)
def test_a_scheduler_that_does_not_follow_the_model_is_not_made(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(Mixture())


def run(model, **changes):
    settings = {"scheduler": make_scheduler(model, changes.pop("name", "ddim"), **changes.pop("options", {}))}
    settings |= {"scales": [3.0], "steps": 4} | changes
    rows = settings.pop("rows", 2)
    return sample(model, labels(0, rows), settings.pop("seeds", [0, 1]), **settings)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scheduler": diffusers.EDMEulerScheduler()}, "EDMEulerScheduler is not supported.*use one of DDIMScheduler"),
        ({"scheduler": diffusers.HeunDiscreteScheduler()}, "HeunDiscreteScheduler is not supported"),
        ({"scheduler": diffusers.DDIMScheduler()}, "DDIMScheduler's noise schedule is not the model's"),
        ({"scales": [3.0, 2.0]}, r"Mixture has a ladder of 1 rung\(s\) \(label\) and takes as many scales, got 2"),
        ({"scales": []}, "takes as many scales, got 0"),
        ({"steps": None}, "give either steps or timesteps, got steps=None, timesteps=None"),
        ({"timesteps": [900, 10]}, r"give either steps or timesteps, got steps=4, timesteps=\[900, 10\]"),
        ({"steps": None, "timesteps": [900, 10]}, "DDIMScheduler takes no timesteps of its own; give steps"),
        ({"name": "euler", "steps": None, "timesteps": [10, 900]}, "do not fall"),
        ({"name": "euler", "steps": None, "timesteps": [1500, 10]}, "not those of the model's path"),
        ({"name": "dpm++", "options": {"use_flow_sigmas": True}}, "not those of the model's path"),
        ({"name": "euler", "options": {"timestep_type": "continuous"}}, "not those of the model's path"),
        ({"name": "euler_ancestral", "steps": 4}, "cannot take 4 steps here, one of them is too long; take more"),
        ({"name": "euler", "eta": 0.5}, "EulerDiscreteScheduler has no eta"),
        ({"noise": torch.zeros(2, 3, 1, 1)}, r"noise must have shape \(2, 2, 1, 1\), got \(2, 3, 1, 1\)"),
        (
            {"step_noise": torch.zeros(4, 2, 2)},
            r"step_noise must have shape \(steps, \*\(2, 2, 1, 1\)\)",
        ),
        (
            {"name": "ddpm", "step_noise": torch.zeros(2, 2, 2, 1, 1)},
            "step_noise must hold the noise of each of 4 steps, it ran out",
        ),
        ({"rows": 3}, "condition part 'label' must have 2 rows, one per sample, got 3"),
        ({"seeds": [0, -1]}, r"seeds must lie in \[0, 2\*\*32\), got \[0, -1\]"),
        ({"seeds": [0, 2**32]}, r"seeds must lie in \[0, 2\*\*32\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(Mixture(), **changes)


@pytest.mark.parametrize(
    ("scheduler", "changes"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), {"steps": 4}),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), {"timesteps": [1000, 500, 100]}),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {"steps": 4}),
    ],
    ids=["another T", "a shift of given times", "inverted"],
)
def test_a_flow_scheduler_must_be_on_the_models_flow(scheduler, changes):
    with pytest.raises(ValueError, match="not those of the model's path at its timesteps, or do not fall"):
        sample(Mixture(path=FlowPath()), labels(0, 1), [0], scheduler=scheduler, scales=[1.0], **changes)


def test_a_table_that_ends_without_signal_needs_a_scheduler_that_can_start_there():
    root = DiscretePath.scaled_linear().alphas_cumprod.sqrt()
    path = DiscretePath(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)
    mixture = Mixture(path=path)
    trailing = {"timestep_spacing": "trailing"}
    x = sample(mixture, labels(0, 50), range(50), scheduler=make_scheduler(mixture, **trailing), scales=[1.0], steps=25)
    assert (x.flatten(1).mean(0) - mixture.means[0]).abs().max() < 0.2
    with pytest.raises(ValueError, match="do not fall from a finite one"):
        euler = make_scheduler(mixture, "euler", **trailing)
        sample(mixture, labels(0, 1), [0], scheduler=euler, scales=[1.0], steps=5)


def test_first_timesteps_that_round_to_one_lose_no_step():
    mixture = Mixture()  # whose noisiest levels lie within one unit of t
    scheduler = make_scheduler(mixture, "dpm++", use_karras_sigmas=True)
    x = sample(mixture, labels(0, 2), [0, 1], scheduler=scheduler, scales=[1.0], steps=6)
    scheduler.set_timesteps(6)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    assert mixture.rows == [2] * 6 and x.isfinite().all()
