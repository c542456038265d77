"""Zero-1-to-3, and Stable Diffusion as its prior, beside the originals' own outputs."""

import json
import math

import parity
import pytest
import torch
from safetensors.torch import save_file
from test_instruct_pix2pix_parity import heads

from priorguide.sample.clip_image import clip_pixels
from priorguide.sample.guidance import guide, unconditional
from priorguide.sample.latents import latent_space, to_latents
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.models.image_variations import ImageVariations
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.models.zero123 import Zero123
from priorguide.sample.noise import add_noise
from priorguide.sample.recognise import recognise
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop, drop

TABLE = [Drop(("clip",), 0.05), Drop(("clip", "image"), 0.05), Drop(("image",), 0.05)]


@pytest.fixture(scope="module")
def vectors():
    return parity.vectors("zero123")


@pytest.fixture(scope="module")
def files(vectors, tmp_path_factory):
    """Both networks as files in the published layout, with what the schedule computes."""
    folder, found = tmp_path_factory.mktemp("ldm"), {}
    for name in vectors.spec["networks"]:
        found[name] = folder / f"{name}.ckpt"
        computed = {"alphas_cumprod": vectors.io["alphas_cumprod"], "model_ema.num_updates": torch.tensor(0)}
        torch.save({"state_dict": {**vectors.weights(name), **computed}, "global_step": 105000}, found[name])
    return found


def read(vectors, files, **options):
    described = vectors.spec["networks"]["finetuned"]
    side = vectors.io["img_cond"].shape[-1]
    return Zero123.from_pretrained(
        files["finetuned"], num_heads=described["unet"]["num_heads"], resolution=side, **options
    )


@pytest.fixture(scope="module")
def model(vectors, files):
    return read(vectors, files, weights="model").eval()


@pytest.fixture(scope="module")
def base(vectors, files):
    options = {"resolution": vectors.io["img_cond"].shape[-1], **heads(vectors.spec["networks"]["prior"])}
    return StableDiffusion.from_pretrained(files["prior"], **options).eval()


@pytest.fixture(scope="module")
def condition(vectors, model):
    return model.encode_condition({"image": (vectors.io["img_cond"] + 1) / 2, "pose": vectors.io["T"]})


def context(model, condition):
    """The one token that the U-Net attends to."""
    with torch.no_grad():
        return model.network.encoder_hid_proj(torch.cat([condition["clip"], condition["pose"]], 1))[:, None]


def test_parity_sizes_are_read_off_the_file(vectors, files, model):
    described = vectors.spec["networks"]["finetuned"]
    parts = (model.network, model.vae, model.image_encoder)
    kept = ("model.", "first_stage_model.", "cond_stage_model.model.visual.", "cc_projection.")
    keys = {name: shape for name, shape in described["tensors"].items() if name.startswith(kept)}
    assert sum(p.numel() for part in parts for p in part.parameters()) == sum(
        math.prod(shape) for shape in keys.values()
    )
    assert described["scale_factor"] == model.vae.config["scaling_factor"]
    assert model.prediction == described["prediction_type"]
    assert recognise(files["finetuned"]) == {Zero123: "Zero-1-to-3, live and averaged weights"}


def test_parity_pictures_as_clip_takes_them(vectors):
    found = clip_pixels((vectors.io["img_cond"][:1] + 1) / 2)
    assert vectors.error(found, "clip_pixels_first") < parity.NETWORK_TOLERANCE


def test_parity_encoders_and_nulls(vectors, model, base, condition):
    tolerance, io = parity.NETWORK_TOLERANCE, vectors.io
    assert vectors.error(condition["clip"][:, None], "clip_emb") < tolerance
    assert vectors.error(condition["image"], "concat_latent") < tolerance
    assert vectors.error(context(model, condition), "context") < tolerance
    null = model.null(condition)
    assert vectors.error(model.null({})["clip"][:, None], "null_clip_emb") == 0
    assert vectors.error(context(model, null), "context_train_null") < tolerance
    assert not null["image"].any() and torch.equal(null["pose"], io["T"])
    assert vectors.error(base.null({})["text"], "prior.null_context") < tolerance
    with torch.no_grad():
        assert vectors.error(to_latents(model.vae, (io["img_target"] + 1) / 2), "z_target") < tolerance
        posterior = model.vae.encode(io["img_cond"]).latent_dist
        assert vectors.error(posterior.logvar, "vae_logvar") < tolerance
        decoded = model.decode(io["z_target"][:1])
    torch.testing.assert_close(decoded, (io["vae_decode"] / 2 + 0.5).clamp(0, 1), rtol=0, atol=tolerance)
    assert latent_space(model.vae) == base.space


def test_parity_noise_schedule(vectors, model):
    io = vectors.io
    assert vectors.error(model.path.alphas_cumprod.float(), "alphas_cumprod") < 1e-6
    assert vectors.error(add_noise(io["z_target"], io["noise"], *model.path.coefficients(io["t"])), "x_t") < 1e-5


@torch.no_grad()
def predict(vectors, model, condition):
    return model.denoise(vectors.io["x_t"], vectors.io["t"], condition)


def test_parity_network_outputs(vectors, files, model, condition):
    tolerance, bare = parity.NETWORK_TOLERANCE, model.without_context()
    null = model.null(condition)
    references = {
        "eps_cond": (model, condition),
        "eps_token_only": (model, {**condition, "image": null["image"]}),
        "eps_train_null": (model, null),
        "eps_uncond": (bare, null),
        "eps_latent_only": (bare, condition),
        "eps_cond_ema": (read(vectors, files).eval(), condition),  # by default, as the authors sample
    }
    for name, (network, parts) in references.items():
        assert vectors.error(predict(vectors, network, parts), name) < tolerance, name
    assert vectors.error(predict(vectors, bare, null), "eps_train_null") > 0.1


def test_parity_guided_predictions(vectors, model, base, condition):
    io, scale, top = vectors.io, vectors.spec["guidance"]["g"], predict(vectors, model, condition)
    for other, alone, reference in (
        (model.without_context(), "eps_uncond", "guided_own"),
        (base, "prior.eps_null", "guided_prior"),
    ):
        prior = unconditional(other, onto=model)
        out = predict(vectors, other, prior.condition(condition, len(io["t"])))
        assert vectors.error(out, alone) < parity.NETWORK_TOLERANCE
        guided = guide([prior.express(out, io["x_t"], io["t"].double()), top], [scale])
        assert vectors.relative_error(guided, reference) < parity.GUIDED_TOLERANCE


def test_parity_guided_by_the_v_prior(vectors, model, condition, tmp_path):
    other = parity.vectors("sd21")
    torch.save({"state_dict": other.weights("network")}, tmp_path / "v2.ckpt")
    described = other.spec["networks"]["network"]
    options = {"prediction": described["prediction_type"], "resolution": 64, "prior_only": True, **heads(described)}
    base = StableDiffusion.from_pretrained(tmp_path / "v2.ckpt", **options).eval()
    io, scale = vectors.io, vectors.spec["guidance"]["g"]
    prior = unconditional(base, onto=model)
    out = predict(vectors, base, prior.condition(condition, len(io["t"])))
    eps = prior.express(out, io["x_t"], io["t"])
    assert other.error(eps, "for_zero123.eps_null") < parity.NETWORK_TOLERANCE
    guided = guide([eps, predict(vectors, model, condition)], [scale])
    assert other.relative_error(guided, "for_zero123.guided_prior") < parity.GUIDED_TOLERANCE


@pytest.mark.parametrize("reference", ["ddim5_eta0", "ddim5_eta1", "ddim5_eta0_prior"])
def test_parity_sampled(vectors, model, base, condition, reference):
    # The authors' loop leaves out the noisiest of its timesteps. diffusers' DDIM takes none that are given; the first-
    # order DPM-Solver++ is the same sampler, its SDE form that of eta = 1 (arXiv 2211.01095, section 4).
    io = vectors.io
    kind = "sde-dpmsolver++" if "eta1" in reference else "dpmsolver++"
    options = {"solver_order": 1, "algorithm_type": kind, "final_sigmas_type": "sigma_min"}
    times = io["ddim_timesteps"].flip(0).tolist()[1:]
    found = sample(
        model,
        condition,
        range(len(io["x_T"])),
        scheduler=make_scheduler(model, "dpm++", **options),
        scales=[vectors.spec["guidance"]["g"]],
        prior=unconditional(base if reference.endswith("prior") else model.without_context(), onto=model),
        timesteps=times,
        noise=io["x_T"],
        step_noise=io["sampler_noise"] if "eta1" in reference else None,
    )
    assert vectors.relative_error(found, reference) < parity.TRAJECTORY_TOLERANCE


def test_parity_drop_out(vectors, model, condition):
    dropped = drop(condition, model.null(condition), TABLE, vectors.io["dropout_random"])
    assert vectors.error(context(model, dropped), "dropout_context") < parity.NETWORK_TOLERANCE
    assert vectors.error(dropped["image"], "dropout_concat") < parity.NETWORK_TOLERANCE
    assert torch.equal(dropped["pose"], condition["pose"])


@torch.no_grad()
def test_parity_training_loss(vectors, model, condition):
    io = vectors.io
    dropped = drop(condition, model.null(condition), TABLE, io["dropout_random"])
    loss = FineTune(model, TABLE, ema_decay=0).eval().loss(io["z_target"], dropped, io["noise"], io["t"]).mean()
    assert vectors.relative_error(loss, "train_loss") < parity.NETWORK_TOLERANCE


@pytest.mark.parametrize(("part", "layer"), [("cc_projection", "projection"), ("clip_camera_projection", "proj")])
def test_parity_through_a_pipeline_folder(vectors, model, condition, tmp_path, part, layer):
    """As the Hub's variants are laid out, the one with safetensors, the other with torch's files."""
    safe, bare = part == "cc_projection", unprojected(model.network)
    for name, module in (("unet", bare), ("vae", model.vae)):
        module.save_pretrained(tmp_path / name, safe_serialization=safe)
    model.image_encoder.save_pretrained(tmp_path / "image_encoder")
    if not safe:
        held = model.image_encoder.state_dict()
        (tmp_path / "image_encoder" / "model.safetensors").unlink()
        torch.save(held, tmp_path / "image_encoder" / "pytorch_model.bin")
    (tmp_path / part).mkdir()
    linear = {f"{layer}.{name}": tensor for name, tensor in model.network.encoder_hid_proj.state_dict().items()}
    file = tmp_path / part / "diffusion_pytorch_model"
    save_file(linear, f"{file}.safetensors") if safe else torch.save(linear, f"{file}.bin")
    make_scheduler(model).save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": Zero123.published_as[0]}))
    found = Zero123.from_pretrained(tmp_path, resolution=vectors.io["img_cond"].shape[-1]).eval()
    batch = {"image": (vectors.io["img_cond"] + 1) / 2, "pose": vectors.io["T"]}
    assert vectors.error(predict(vectors, found, found.encode_condition(batch)), "eps_cond") < parity.NETWORK_TOLERANCE
    assert recognise(tmp_path) == {Zero123: Zero123.published_as[0]}


def unprojected(network):
    """The U-Net as published pipelines have it."""
    from diffusers import UNet2DConditionModel

    own = {name: value for name, value in network.config.items() if not name.startswith(("_", "encoder_hid"))}
    bare = UNet2DConditionModel(**own)
    bare.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("encoder_hid")})
    return bare


def test_parity_in_the_layout_of_image_variations(vectors, model, condition, tmp_path):
    """Its files hold the same image tower, four input channels and no projection: from it, all is its own at first."""
    state = {k: v for k, v in vectors.weights("finetuned").items() if not k.startswith(("cc_", "model_ema"))}
    state["model.diffusion_model.input_blocks.0.0.weight"] = state["model.diffusion_model.input_blocks.0.0.weight"][
        :, :4
    ]
    torch.save({"state_dict": state}, file := tmp_path / "variations.ckpt")
    heads = vectors.spec["networks"]["finetuned"]["unet"]["num_heads"]
    side = vectors.io["img_cond"].shape[-1]
    found = ImageVariations.from_pretrained(file, num_heads=heads, resolution=side).eval()
    assert recognise(file) == {ImageVariations: "SD image variations, one set of weights"}
    own = found.encode_condition({"image": (vectors.io["img_cond"] + 1) / 2})
    assert vectors.error(own["clip"][:, None], "clip_emb") < parity.NETWORK_TOLERANCE
    bare = model.without_context()  # with zeros for the image it is this very network, its context at zero
    out = predict(vectors, bare, bare.null(condition))
    torch.testing.assert_close(predict(vectors, found, found.null(own)), out, rtol=0, atol=1e-5)
    tuned = Zero123.from_base(found, resolution=side).eval()
    torch.testing.assert_close(predict(vectors, tuned, tuned.null(condition)), out, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        predict(vectors, tuned, condition), predict(vectors, found, own), rtol=0, atol=parity.NETWORK_TOLERANCE
    )


def test_parity_of_other_models_the_file_is_none(vectors, files):
    side, described = vectors.io["img_cond"].shape[-1], vectors.spec["networks"]["finetuned"]
    with pytest.raises(ValueError, match="has no text encoder"):
        InstructPix2Pix.from_pretrained(files["finetuned"], num_heads=described["unet"]["num_heads"], resolution=side)
    with pytest.raises(ValueError, match="has no CLIP image tower"):
        Zero123.from_pretrained(files["prior"], num_heads=described["unet"]["num_heads"], resolution=side)
    assert Zero123 not in recognise(files["prior"])
