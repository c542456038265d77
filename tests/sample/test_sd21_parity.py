"""Stable Diffusion 2.1 (v-prediction) as itself and as the prior of an epsilon model, beside the original's outputs."""

import parity
import pytest
import torch
from test_instruct_pix2pix_parity import heads

from priorguide.sample.guidance import guide, unconditional
from priorguide.sample.model import keep_only
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.noise import convert, like


@pytest.fixture(scope="module")
def vectors():
    return parity.vectors("sd21")


@pytest.fixture(scope="module")
def file(vectors, tmp_path_factory):
    path = tmp_path_factory.mktemp("sd21") / "v2.ckpt"
    torch.save({"state_dict": vectors.weights("network")}, path)
    return path


@pytest.fixture(scope="module")
def model(vectors, file):
    described = vectors.spec["networks"]["network"]
    options = {"prediction": described["prediction_type"], "resolution": 64, "prior_only": True}
    return StableDiffusion.from_pretrained(file, **heads(described), **options).eval()


def test_parity_the_prediction_is_asked_for(vectors, file):
    with pytest.raises(ValueError, match="do not tell what they predict: give prediction, 'v_prediction'"):
        StableDiffusion.from_pretrained(file, **heads(vectors.spec["networks"]["network"]))
    with pytest.raises(ValueError, match="attention heads of a U-Net of widths .* are not in its file"):
        StableDiffusion.from_pretrained(file, prediction="v_prediction")


@torch.no_grad()
def test_parity_outputs_and_their_conversion(vectors, model):
    io = vectors.io
    assert vectors.error(model.null({})["text"], "null_context") < parity.NETWORK_TOLERANCE
    out = model.denoise(io["x_t"], io["t"], {"text": io["context"]})
    assert vectors.error(out, "v_cond") < parity.NETWORK_TOLERANCE
    alpha, sigma = (like(c, out) for c in model.path.coefficients(io["t"]))
    for target, name in (("epsilon", "eps_cond"), ("sample", "x0_cond")):
        found = convert(out, io["x_t"], "v_prediction", target, alpha, sigma)
        assert vectors.error(found, name) < parity.NETWORK_TOLERANCE
    null = keep_only(model, {"text": io["context"]}, (), len(io["t"]))
    assert vectors.error(model.denoise(io["x_t"], io["t"], null), "v_null") < parity.NETWORK_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("system", ["zero123", "versatile_diffusion", "instruct_pix2pix"])
def test_parity_null_for_the_epsilon_systems(vectors, model, system):
    other = parity.vectors(system)
    x_t, t = other.io["x_t"], other.io["t"]
    out = model.denoise(x_t, t, keep_only(model, {}, (), len(t)))
    assert vectors.error(out, f"for_{system}.v_null") < parity.NETWORK_TOLERANCE
    alpha, sigma = (like(c, out) for c in model.path.coefficients(t))
    eps = convert(out, x_t, "v_prediction", "epsilon", alpha, sigma)
    assert vectors.error(eps, f"for_{system}.eps_null") < parity.NETWORK_TOLERANCE


@torch.no_grad()
def test_parity_as_the_prior_of_instruct_pix2pix(vectors, model, tmp_path):
    other = parity.vectors("instruct_pix2pix")
    torch.save({"state_dict": other.weights("finetuned")}, path := tmp_path / "edit.ckpt")
    described = other.spec["networks"]["finetuned"]
    edit = InstructPix2Pix.from_pretrained(path, weights="model", resolution=64, **heads(described)).eval()
    io = other.io
    condition = {"image": io["concat_latent"], "text": io["context"]}
    prior = unconditional(model, onto=edit)  # the contexts differ in width, the latents do not
    out = model.denoise(io["x_t"], io["t"], prior.condition(condition, len(io["t"])))
    ladder = [prior.express(out, io["x_t"], io["t"])]
    ladder += [edit.denoise(io["x_t"], io["t"], keep_only(edit, condition, keep, len(io["t"]))) for keep in edit.ladder]
    scales = [other.spec["guidance"]["g_I"], other.spec["guidance"]["g_T"]]
    assert vectors.relative_error(guide(ladder, scales), "for_instruct_pix2pix.guided_prior") < parity.GUIDED_TOLERANCE
