"""The priors that the image systems share, across networks, predictions and noise schedules, in one latent space."""

import warnings

import pytest
import torch

from priorguide.sample.guidance import unconditional
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dit_network import DiTNetwork
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.pixart import PixArt
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.noise import like


@pytest.fixture(scope="module")
def family():
    """Tiny models on one autoencoder: two to fine-tune, and what may be their prior."""
    torch.manual_seed(0)
    sd = StableDiffusion.tiny()
    alone = {"null_text": sd.null_text, "space": sd.space, "sample_size": 8}
    transformer = DiTNetwork(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    transformer.initialise(zero_std=0.2)
    pixart = PixArt.tiny()
    found = {
        "dit": DiT(transformer, sd.vae),
        "edit": InstructPix2Pix.tiny(),
        "sd": sd,
        "sd_v": StableDiffusion(StableDiffusion.tiny().network, prediction="v_prediction", **alone),
        "pixart": PixArt(pixart.network, pixart.null_text, sd.vae),
    }
    return {name: model.eval() for name, model in found.items()}


CONDITIONS = {
    "dit": {"label": torch.tensor([0, 2])},
    "edit": {"image": torch.randn(2, 4, 8, 8), "text": torch.randn(2, 8, 16)},
}
PAIRS = [("dit", name) for name in ("sd", "sd_v", "pixart")] + [("edit", name) for name in ("sd", "sd_v", "pixart")]


def bind(family, system, prior):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return unconditional(family[prior], onto=family[system])


@torch.no_grad()
@pytest.mark.parametrize(("system", "prior"), PAIRS)
def test_a_prior_says_the_same_x_0_as_its_own_network(family, system, prior):
    """What it expresses, solved for x_0 in the system's terms, is its own prediction's x_0, at equal log-SNR."""
    model, base, bound = family[system], family[prior], bind(family, system, prior)
    t = torch.tensor([60.0, 400.0], dtype=torch.float64)
    x_t = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))
    own_x, own_t = bound.locate(x_t, t)
    alpha, sigma = model.path.coefficients(t)
    own_alpha, own_sigma = base.path.coefficients(own_t)
    torch.testing.assert_close(own_alpha / own_sigma, alpha / sigma, rtol=1e-6, atol=0)
    null = bound.condition(CONDITIONS[system], 2)
    out = base.denoise(own_x, own_t.float(), null)
    a, s = like(own_alpha, out), like(own_sigma, out)
    x_0 = a * own_x - s * out if base.prediction == "v_prediction" else (own_x - s * out) / a
    expressed = bound.express(out, x_t, t)
    found = (x_t - like(sigma, out) * expressed) / like(alpha, out)
    torch.testing.assert_close(found, x_0, rtol=1e-4, atol=1e-4 * float(x_0.abs().max()))


@pytest.mark.parametrize(("system", "prior"), PAIRS)
def test_it_samples_with_each_prior(family, system, prior):
    model, scales = family[system], [1.5, 7.5][: len(family[system].ladder)]
    arguments = {"scheduler": make_scheduler(model), "scales": scales, "steps": 4}
    own = sample(model, CONDITIONS[system], [0, 1], **arguments)
    other = sample(model, CONDITIONS[system], [0, 1], prior=bind(family, system, prior), **arguments)
    assert other.isfinite().all() and not torch.allclose(own, other, rtol=1e-2)


@pytest.mark.parametrize("prior", ["sd", "pixart"])
def test_the_learned_variance_stays_the_systems_own(family, prior):
    model = family["dit"]
    scheduler = make_scheduler(model, "ddpm", variance_type="learned_range")
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(2))
    arguments = {"scheduler": scheduler, "scales": [1.5], "channels": 3, "steps": 3, "noise": noise}
    found = sample(model, CONDITIONS["dit"], [0, 1], prior=bind(family, "dit", prior), **arguments)
    assert found.isfinite().all() and found.shape == (2, *model.shape)


def test_where_stable_diffusion_meets_dits_noise_levels(family):
    with pytest.warns(UserWarning, match="outside its range the prior is asked at its nearest noise level") as said:
        bound = unconditional(family["sd"], onto=family["dit"])
    assert len(said) == 1
    t = torch.tensor([250.0, 500.0, 700.0, 990.0], dtype=torch.float64)
    _, located = bound.locate(torch.zeros(4, 4, 8, 8), t)
    assert located.round().tolist() == [341, 708, 966, 999]  # the last lies beyond the noisiest that it knows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound.locate(torch.zeros(4, 4, 8, 8), t)


def test_priors_of_other_latents_are_refused(family):
    torch.manual_seed(5)
    other = StableDiffusion.tiny()
    for parameter in other.vae.encoder.parameters():
        parameter += 0.1
    apart = StableDiffusion(other.network, other.null_text, other.vae, sample_size=8)
    with pytest.raises(ValueError, match="choose a base with the same autoencoder"):
        unconditional(apart, onto=family["edit"])
    with pytest.raises(ValueError, match="a prior must have the same channels"):
        unconditional(DiT.tiny(), onto=family["edit"])
