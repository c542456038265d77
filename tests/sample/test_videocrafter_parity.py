"""VideoCrafter beside the originals' own outputs."""

import math

import parity
import pytest
import torch
from video_files import SPACINGS, contents, videocrafter

from priorguide.sample.guidance import guide
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.models.videocrafter import VideoCrafter
from priorguide.sample.noise import add_noise, data_scale, like
from priorguide.sample.recognise import recognise

SYSTEMS = {
    "videocrafter1_t2v_512": "VideoCrafter1 512",
    "videocrafter1_t2v_1024": "VideoCrafter1 1024",
    "videocrafter2_t2v_512": "VideoCrafter2",
}


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request):
    return request.param


@pytest.fixture(scope="module")
def vectors(system):
    return parity.vectors(system)


@pytest.fixture(scope="module")
def file(vectors, tmp_path_factory):
    file = tmp_path_factory.mktemp("video") / "model.ckpt"
    torch.save({"state_dict": contents(vectors, "finetuned"), "global_step": 1}, file)
    return file


@pytest.fixture(scope="module")
def model(vectors, file):
    return videocrafter(vectors, file)


@pytest.fixture(scope="module")
def condition(vectors, model):
    return model.encode_condition({"text": vectors.io["tokens"], "fps": vectors.io["fs"]})


@torch.no_grad()
def predict(vectors, model, condition):
    return model.denoise(vectors.io["x_t"], vectors.io["t"], condition)


def test_parity_sizes_are_read_off_the_file(vectors, system, file, model):
    described = vectors.spec["networks"]["finetuned"]
    own = {name: shape for name, shape in described["tensors"].items() if name.startswith(("model.", "first_stage"))}
    parts = (model.network, model.vae)
    assert sum(p.numel() for part in parts for p in part.parameters()) == sum(map(math.prod, own.values()))
    assert described["scale_factor"] == model.vae.config["scaling_factor"]
    assert model.network.config["head_channels"] == described["unet"]["num_head_channels"]
    assert model.prediction == described["prediction_type"]
    assert recognise(file) == {VideoCrafter: SYSTEMS[system]}


def test_parity_encoders_and_null(vectors, model, condition):
    tolerance, io = parity.NETWORK_TOLERANCE, vectors.io
    assert vectors.error(condition["text"], "text_ctx") < tolerance
    assert vectors.error(model.null({})["text"], "text_ctx_null") < tolerance
    null_tokens = model.encode_condition({"text": io["null_tokens"]})["text"]
    assert vectors.error(null_tokens, "text_ctx_null") < tolerance
    with torch.no_grad():
        assert vectors.error(model.encode_pixels((io["video"] + 1) / 2), "z") < tolerance
        decoded = model.decode(io["z"][:1, :, : io["vae_decode"].shape[2]])
    torch.testing.assert_close(decoded, (io["vae_decode"] / 2 + 0.5).clamp(0, 1), rtol=0, atol=tolerance)


def test_parity_noise_schedule(vectors, model):
    io = vectors.io
    assert vectors.error(model.path.alphas_cumprod.float(), "alphas_cumprod") < 1e-6
    z = like(data_scale(model.path, io["t"]), io["z"]) * io["z"]
    assert vectors.error(add_noise(z, io["noise"], *model.path.coefficients(io["t"])), "x_t") < 1e-5
    scheduler = make_scheduler(model, **SPACINGS[vectors.spec["sampler"]["spacing"]])
    scheduler.set_timesteps(vectors.spec["sampler"]["steps"])
    assert torch.equal(scheduler.timesteps.flip(0), io["ddim_timesteps"].sort().values)


def test_parity_network_outputs(vectors, model, condition):
    tolerance, null = parity.NETWORK_TOLERANCE, model.null(condition)
    alone = model.encode_condition({"text": vectors.io["tokens"]})
    unsaid = {**alone, "text": null["text"]}
    found = {"out_cond": condition, "out_uncond": null, "out_uncond_default_fps": unsaid}
    outs = {name: predict(vectors, model, parts) for name, parts in found.items()}
    for name, out in outs.items():
        assert vectors.error(out, name) < tolerance, name
    scale = vectors.spec["guidance"]["g"]
    guided = guide([outs["out_uncond"], outs["out_cond"]], [scale])
    assert vectors.relative_error(guided, "guided_own") < parity.GUIDED_TOLERANCE


def test_parity_sampled(vectors, model, condition):
    described, io = vectors.spec["sampler"], vectors.io
    references = [name for name in io if name.startswith(f"ddim{described['steps']}_")]
    assert references
    for reference in references:
        eta = int(reference[-1])
        found = sample(
            model,
            condition,
            range(len(io["x_T"])),
            scheduler=make_scheduler(model, **SPACINGS[described["spacing"]], set_alpha_to_one=False),
            scales=[vectors.spec["guidance"]["g"]],
            rescale=described["guidance_rescale"],
            steps=described["steps"],
            eta=eta,
            noise=io["x_T"],
            step_noise=io["sampler_noise"] if eta else None,
        )
        assert vectors.relative_error(found, reference) < parity.TRAJECTORY_TOLERANCE, reference
