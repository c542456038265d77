"""DynamiCrafter, and VideoCrafter as its prior, beside the originals' own outputs."""

import math

import parity
import pytest
import torch
from video_files import SPACINGS, contents, dynamicrafter, resolution, videocrafter

from priorguide.sample.guidance import guide, rungs, unconditional
from priorguide.sample.latents import latent_space
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.models.dynamicrafter import DynamiCrafter
from priorguide.sample.noise import DiscretePath, add_noise, data_scale, like, split
from priorguide.sample.open_clip import tiny_tower, tower_pixels
from priorguide.sample.recognise import recognise
from priorguide.sample.video_network import VideoNetwork
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop, drop

TABLE = [Drop(("text",), 0.05), Drop(("text", "image"), 0.05), Drop(("image",), 0.05)]
SYSTEMS = ("dynamicrafter_256", "dynamicrafter_512", "dynamicrafter_512_interp", "dynamicrafter_1024")


@pytest.fixture(scope="module", params=SYSTEMS)
def vectors(request):
    return parity.vectors(request.param)


@pytest.fixture(scope="module")
def file(vectors, tmp_path_factory):
    file = tmp_path_factory.mktemp("video") / "model.ckpt"
    torch.save({"state_dict": contents(vectors, "finetuned"), "global_step": 1}, file)
    return file


@pytest.fixture(scope="module")
def model(vectors, file):
    return dynamicrafter(vectors, file)


@pytest.fixture(scope="module")
def base(vectors, base_file):
    if "prior" not in vectors.spec["networks"]:
        pytest.skip("no prior in this set")
    return videocrafter(vectors, base_file, "prior")


def batch(vectors, model):
    pixels = (vectors.io["video"] + 1) / 2
    frames = {"image": pixels[:, :, 0], "last": pixels[:, :, -1]}
    return {**frames, "text": vectors.io["tokens"], model.rate: vectors.io["fs"]}


@pytest.fixture(scope="module")
def condition(vectors, model):
    return model.encode_condition(batch(vectors, model))


@torch.no_grad()
def predict(vectors, model, condition):
    return model.denoise(vectors.io["x_t"], vectors.io["t"], condition)


@pytest.fixture(scope="module")
def ladder(vectors, model, condition):
    """The predictions on all rungs: unconditional, the image's, both's."""
    null = model.null(condition)
    parts = (null, {**condition, "text": null["text"]}, condition)
    return [predict(vectors, model, rung) for rung in parts]


@torch.no_grad()
def context(model, condition):
    """What the U-Net attends to."""
    return torch.cat([condition["text"], model.network.image_projection(condition["image"])], 1)


def test_parity_sizes_are_read_off_the_file(vectors, file, model):
    described = vectors.spec["networks"]["finetuned"]
    kept = ("model.", "first_stage_model.", "image_proj_model.", "embedder.model.visual.")
    own = {name: shape for name, shape in described["tensors"].items() if name.startswith(kept)}
    del own["embedder.model.visual.proj"]  # which the authors do not apply
    parts = (model.network, model.vae, model.image_encoder)
    assert sum(p.numel() for part in parts for p in part.parameters()) == sum(map(math.prod, own.values()))
    assert model.shape == tuple(vectors.io["z"].shape[1:])
    assert (model.prediction, model.default_rate) == (described["prediction_type"], described["unet"]["default_fs"])
    assert model.least_scale == described["model"].get("base_scale", 1)
    (said,) = recognise(file).items()
    assert said[0] is DynamiCrafter and described["name"].split("_")[1] in said[1]


def test_parity_pictures_as_the_tower_takes_them(vectors):
    io = vectors.io
    if "clip_pixels_first" not in io:
        pytest.skip("not in this set")
    found = tower_pixels((io["video"][:1, :, 0] + 1) / 2)
    assert vectors.error(found, "clip_pixels_first") < parity.NETWORK_TOLERANCE
    assert vectors.error(tower_pixels((io["antialias_in"] + 1) / 2), "antialias_out") < parity.NETWORK_TOLERANCE


def test_parity_encoders_and_nulls(vectors, model, condition):
    tolerance, io = parity.NETWORK_TOLERANCE, vectors.io
    null, length = model.null({}), io["text_ctx"].shape[1]
    assert vectors.error(condition["text"], "text_ctx") < tolerance
    assert vectors.error(condition["image"], "clip_tokens") < tolerance
    assert vectors.error(condition["frame"].expand(io["c_concat"].shape), "c_concat") < tolerance
    assert vectors.error(null["text"], "text_ctx_null") < tolerance
    assert vectors.error(null["image"], "clip_tokens_null") < tolerance
    assert vectors.error(context(model, condition)[:, length:], "image_ctx") < tolerance
    assert vectors.error(context(model, null)[:, length:], "image_ctx_null") < tolerance
    assert torch.equal(model.null(condition)["frame"], condition["frame"])
    with torch.no_grad():
        assert vectors.error(model.encode_pixels((io["video"] + 1) / 2), "z") < tolerance
        decoded = model.decode(io["z"][:1, :, : io["vae_decode"].shape[2]])
    torch.testing.assert_close(decoded, (io["vae_decode"] / 2 + 0.5).clamp(0, 1), rtol=0, atol=tolerance)


def test_parity_noise_schedule(vectors, model):
    io, described = vectors.io, vectors.spec["sampler"]
    assert vectors.error(model.path.alphas_cumprod.float(), "alphas_cumprod") < 1e-6
    z = like(data_scale(model.path, io["t"]), io["z"]) * io["z"]
    assert vectors.error(add_noise(z, io["noise"], *model.path.coefficients(io["t"])), "x_t") < 1e-5
    scheduler = make_scheduler(model, **SPACINGS[described["spacing"]])
    scheduler.set_timesteps(described["steps"])
    assert torch.equal(scheduler.timesteps.flip(0), io["ddim_timesteps"].sort().values)


def test_parity_network_outputs(vectors, model, condition, ladder):
    tolerance, io = parity.NETWORK_TOLERANCE, vectors.io
    for out, name in zip(ladder, ("out_uncond", "out_image_only", "out_cond"), strict=True):
        assert vectors.error(out, name) < tolerance, name
    unsaid = {name: value for name, value in batch(vectors, model).items() if name != model.rate}
    out = predict(vectors, model, model.encode_condition(unsaid))
    assert vectors.error(out, "out_cond_default_fs") < tolerance
    if "x0_cond" in io:
        alpha, sigma = (like(c, out) for c in model.path.coefficients(io["t"]))
        z_0, eps = split(model.prediction, ladder[-1], io["x_t"], alpha, sigma)
        assert vectors.error(z_0, "x0_cond") < tolerance and vectors.error(eps, "eps_cond") < tolerance


def test_parity_guided_predictions(vectors, ladder):
    described = vectors.spec["guidance"]
    single = guide(ladder, [described["g"]] * 2)  # equal scales: no rung between
    assert vectors.relative_error(single, "guided_own") < parity.GUIDED_TOLERANCE
    multi = guide(ladder, [described["g_img"], described["g"]])
    assert vectors.relative_error(multi, "guided_multi_own") < parity.GUIDED_TOLERANCE


def test_parity_equal_scales_skip_the_rung_between(vectors, ladder):
    used, scales = rungs([vectors.spec["guidance"]["g"]] * 2)
    assert used == [0, 2]
    assert vectors.relative_error(guide([ladder[k] for k in used], scales), "guided_own") < parity.GUIDED_TOLERANCE


def test_parity_guided_by_videocrafter(vectors, model, base, condition, ladder):
    io, described = vectors.io, vectors.spec["guidance"]
    prior = unconditional(base, onto=model)
    own = prior.condition(condition, len(io["t"]))
    assert own.keys() == {"text"}
    assert vectors.error(base.null({})["text"], "prior.text_ctx_null") < parity.NETWORK_TOLERANCE
    out = predict(vectors, base, own)
    assert vectors.error(out, "prior.eps_null") < parity.NETWORK_TOLERANCE
    rungs = [prior.express(out, io["x_t"], io["t"].double()), *ladder[1:]]
    for name, scale in (("guided_prior", described["g"]), ("guided_multi_prior", described["g_img"])):
        assert vectors.relative_error(guide(rungs, [scale, described["g"]]), name) < parity.GUIDED_TOLERANCE
    assert latent_space(model.vae) == base.space


def test_parity_sampled(vectors, model, condition, request):
    described, scales, io = vectors.spec["sampler"], vectors.spec["guidance"], vectors.io
    references = [name for name in io if name.startswith(f"ddim{described['steps']}_")]
    assert len(references) >= 2
    for reference in references:
        eta = int(reference[-1])
        found = sample(
            model,
            condition,
            range(len(io["x_T"])),
            scheduler=make_scheduler(model, **SPACINGS[described["spacing"]], set_alpha_to_one=False),
            scales=[scales["g_img" if "multi" in reference else "g"], scales["g"]],
            rescale=described["guidance_rescale"],
            prior=unconditional(request.getfixturevalue("base"), onto=model) if "prior" in reference else None,
            steps=described["steps"],
            eta=eta,
            noise=io["x_T"],
            step_noise=io["sampler_noise"] if eta else None,
        )
        assert vectors.relative_error(found, reference) < parity.TRAJECTORY_TOLERANCE, reference


def test_parity_drop_out(vectors, model, condition):
    for draw in ("dropout0", "dropout1"):
        dropped = drop(condition, model.null(condition), TABLE, vectors.io[f"{draw}_random"])
        assert vectors.error(context(model, dropped), f"{draw}_context") < parity.NETWORK_TOLERANCE
        assert all(torch.equal(dropped[name], condition[name]) for name in model.always)


@torch.no_grad()
def test_parity_training_loss(vectors, model, condition):
    io = vectors.io
    loss = FineTune(model, TABLE, ema_decay=0).eval().loss(io["z"], condition, io["noise"], io["t"]).mean()
    assert vectors.relative_error(loss, "train_loss") < parity.NETWORK_TOLERANCE


@pytest.fixture(scope="module")
def base_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prior") / "model.ckpt"
    torch.save({"state_dict": contents(parity.vectors(SYSTEMS[0]), "prior")}, file)
    return file


@pytest.fixture(scope="module")
def published():
    """A DynamiCrafter's tensors under their published names."""
    vectors = parity.vectors(SYSTEMS[0])
    return vectors, contents(vectors, "finetuned")


@pytest.mark.parametrize("prefixes", [("module", "_forward_module."), ("state_dict", "module.")])
def test_parity_of_files_as_training_leaves_them(published, tmp_path, prefixes):
    vectors, state = published
    entry, prefix = prefixes
    averaged = {}
    for name, tensor in state.items():
        if name.startswith("model.diffusion_model."):
            averaged[f"model_ema.{name.removeprefix('model.').replace('.', '')}"] = tensor
    live = {name: 1.1 * tensor if name.startswith("model.diff") else tensor for name, tensor in state.items()}
    wrapped = {prefix + name: tensor for name, tensor in {**live, **averaged}.items()}
    torch.save({entry: wrapped, "global_step": 1}, file := tmp_path / "mp_rank_00_model_states.pt")
    model = dynamicrafter(vectors, file, prior_only=True)
    condition = {
        "text": vectors.io["text_ctx"],
        "image": vectors.io["clip_tokens"],
        "frame": vectors.io["c_concat"],
        model.rate: vectors.io["fs"],
    }
    assert vectors.error(predict(vectors, model, condition), "out_cond") < parity.NETWORK_TOLERANCE
    assert [*recognise(file)] == [DynamiCrafter] and model.vae is None
    live = dynamicrafter(vectors, file, weights="model", prior_only=True)
    assert vectors.error(predict(vectors, live, condition), "out_cond") > 0.1


REFUSED = {
    "has besides .*thing.extra": lambda state: {**state, "thing.extra": torch.zeros(1)},
    "lacks .*attn2.to_k_ip": lambda state: {k: v for k, v in state.items() if "to_k_ip" not in k},
    "has besides .*own": lambda state: {**state, "model.diffusion_model.own": torch.zeros(1)},
    "neither scaled_linear": lambda state: {**state, "alphas_cumprod": torch.linspace(1, 0, 1000)},
    "another noise schedule": lambda state: {
        **state,
        "alphas_cumprod": DiscretePath.scaled_linear().scaling(zero_terminal_snr=True).alphas_cumprod.float(),
    },
    "no VideoCrafter nor DynamiCrafter": lambda state: {k: v for k, v in state.items() if "init_attn" not in k},
}


@pytest.mark.parametrize("message", REFUSED)
def test_parity_of_files_that_do_not_fit(published, tmp_path, message):
    vectors, state = published
    torch.save({"state_dict": REFUSED[message](state)}, file := tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=message):
        dynamicrafter(vectors, file)


def test_parity_of_what_a_file_does_not_tell(published, tmp_path):
    vectors, state = published
    torch.save({"state_dict": state}, file := tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="give projection_heads"):
        DynamiCrafter.from_pretrained(file)
    with pytest.raises(ValueError, match="is DynamiCrafter 256, not 512"):
        dynamicrafter(vectors, file, version="512")
    with pytest.raises(ValueError, match="is DynamiCrafter, not VideoCrafter"):
        videocrafter(vectors, file)
    other = parity.vectors("dynamicrafter_512")
    silent = {
        name: t for name, t in contents(other, "finetuned").items() if name not in ("scale_arr", "alphas_cumprod")
    }
    torch.save({"state_dict": silent}, file := tmp_path / "silent.ckpt")
    with pytest.raises(ValueError, match="give version, 512 or 1024"):
        dynamicrafter(other, file)
    assert dynamicrafter(other, file, version="1024").least_scale == 0.3


def test_parity_of_a_fine_tune_at_its_start(published, base_file, tmp_path):
    """From VideoCrafter1's own file: the first unconditional prediction is the prior's, whatever the frame."""
    vectors, _ = published
    base = videocrafter(vectors, base_file, "prior")
    model = DynamiCrafter.from_base(base, tiny_tower(), resolution(vectors)).eval()
    condition = model.encode_condition(batch(vectors, model))
    assert vectors.error(predict(vectors, model, model.null(condition)), "prior.eps_null") < parity.NETWORK_TOLERANCE
    assert condition["frame"].any()


def published_shape(name, shape):
    """A tensor's shape at the published width, from that at the vectors': the U-Net is ten times as wide, its first
    temporal attention has 8 heads of 64, contexts are of 1024; the resampler is 1024 wide, with 12 heads of 64."""
    part = name.removeprefix("model.diffusion_model.")
    if name.startswith("image_proj_model."):
        wide = {64: 1024, 96: 1536, 48: 768, 256: 4096}
        wide |= {96: 1280} if "proj_in" in name else {}
        return [1, 256, 1024] if name.endswith("latents") else [wide[size] for size in shape]
    if "relative_position" in part:
        return [33, 64]
    if part.startswith("init_attn"):
        return [4 * size if size >= 128 else 10 * size if size > 1 else size for size in shape]
    if ".1.transformer_blocks" in part and any(f"attn2.to_{key}" in part for key in ("k", "v")):
        return [10 * shape[0], 1024]
    return [10 * size if size % 32 == 0 else size for size in shape]


@pytest.mark.parametrize("network", ["finetuned", "prior"])
def test_parity_of_the_full_size(network):
    """The published network has as many parameters as the original's tensors at the published width. Its resampler has
    four layers, the vectors' two."""
    described = parity.vectors(SYSTEMS[0]).spec["networks"][network]["tensors"]
    kept = {name: shape for name, shape in described.items() if name.startswith(("model.", "image_proj_model."))}
    counts = {name: math.prod(published_shape(name, shape)) for name, shape in kept.items()}
    wanted = sum(counts.values()) + sum(n for name, n in counts.items() if name.startswith("image_proj_model.layers."))
    projection = {"hidden_dims": 1024, "depth": 4, "heads": 12, "dim_head": 64, "ffn_ratio": 4}
    with torch.device("meta"):
        found = (
            VideoNetwork(temporal_conv=False, relative=16)
            if network == "prior"
            else VideoNetwork(in_channels=8, rate=True, image_width=1280, projection=projection, learned_gain=True)
        )
    assert sum(p.numel() for p in found.parameters()) == wanted
