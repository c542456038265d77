"""Stock pipelines in another prior's guidance against loops written out from the paper's equation."""

import copy

import pytest
import torch
from tiny_pipelines import another, dit, instruct_pix2pix, sd3, stable_diffusion, wan

from priorguide.sample.pipeline import prior_guidance

STEPS, SCALE = 4, 4.0


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps_of(pipe, steps=STEPS, **options):
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps, **options)
    return scheduler, scheduler.timesteps


@torch.no_grad()
def stable_diffusion_by_hand(tiny, prior):
    scheduler, times = steps_of(tiny.pipe)
    x, (text, null) = noise(2, 4, 8, 8), (tiny.options[name] for name in ("prompt_embeds", "negative_prompt_embeds"))
    for t in times:
        cond, uncond = tiny.pipe.unet(x, t, text).sample, prior(x, t, null).sample
        x = scheduler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
    return x


@torch.no_grad()
def instruct_pix2pix_by_hand(tiny, prior):
    """The prior is the four-channel network that knows no picture; equation 3 of arXiv 2211.09800."""
    scheduler, times = steps_of(tiny.pipe)
    text, null = (tiny.options[name] for name in ("prompt_embeds", "negative_prompt_embeds"))
    image = tiny.pipe.vae.encode(2 * tiny.options["image"] - 1).latent_dist.mode()
    x = noise(2, 4, 8, 8)
    for t in times:
        both = tiny.pipe.unet(torch.cat([x, image], 1), t, text).sample
        picture = tiny.pipe.unet(torch.cat([x, image], 1), t, null).sample
        uncond = prior(x, t, null).sample
        x = scheduler.step(uncond + 1.5 * (picture - uncond) + SCALE * (both - picture), t, x).prev_sample
    return x


@torch.no_grad()
def dit_by_hand(tiny, prior):
    """The learned range is no part of the picture here: DDIM's variance is fixed."""
    scheduler, times = steps_of(tiny.pipe)
    x, labels = noise(2, 4, 8, 8), torch.tensor(tiny.options["class_labels"])
    for t in times:
        cond = tiny.pipe.transformer(x, t.expand(2), labels).sample[:, :4]
        uncond = prior(x, t.expand(2), torch.full((2,), 1000)).sample[:, :4]
        x = scheduler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
    return (tiny.pipe.vae.decode(x / tiny.pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def sd3_by_hand(tiny, prior):
    scheduler, times = steps_of(tiny.pipe)
    parts, x = tiny.options, noise(2, 4, 8, 8)
    for t in times:
        cond = tiny.pipe.transformer(x, parts["prompt_embeds"], parts["pooled_prompt_embeds"], t.expand(2)).sample
        null = parts["negative_prompt_embeds"], parts["negative_pooled_prompt_embeds"]
        uncond = prior(x, *null, t.expand(2)).sample
        x = scheduler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
    return x


@torch.no_grad()
def wan_by_hand(tiny, priors):
    """Wan 2.2: above 0.8 of the path one pair of networks, below it the other."""
    scheduler, times = steps_of(tiny.pipe)
    x, (text, null) = noise(2, 4, 2, 2, 2), (tiny.options[n] for n in ("prompt_embeds", "negative_prompt_embeds"))
    assert (times >= 800).any() and (times < 800).any()
    for t in times:
        network, prior = (own[0 if t >= 800 else 1] for own in (tiny.networks, priors))
        cond, uncond = network(x, t.expand(2), text).sample, prior(x, t.expand(2), null).sample
        x = scheduler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
    return x


def four_channels():
    return another(stable_diffusion().pipe.unet, 5)


def two_priors():
    return [another(network, seed) for network, seed in zip(wan(two=True).networks, (5, 6), strict=True)]


CASES = {
    "Stable Diffusion": (stable_diffusion, four_channels, stable_diffusion_by_hand),
    "InstructPix2Pix": (instruct_pix2pix, four_channels, instruct_pix2pix_by_hand),
    "DiT": (dit, lambda: another(dit().pipe.transformer, 5), dit_by_hand),
    "Stable Diffusion 3": (sd3, lambda: another(sd3().pipe.transformer, 5), sd3_by_hand),
    "Wan 2.2": (
        lambda: wan(two=True),
        lambda: [another(n, 5 + i) for i, n in enumerate(wan(True).networks)],
        wan_by_hand,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loop_by_hand(name):
    make, priors, by_hand = CASES[name]
    tiny, prior = make(), priors()
    wanted = by_hand(tiny, prior)
    with prior_guidance(tiny.pipe, prior):
        found = tiny(num_inference_steps=STEPS)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (tiny(num_inference_steps=STEPS) - wanted).abs().max() > 0.05
