"""InstructPix2Pix, and Stable Diffusion as its prior, beside the originals' own outputs."""

import parity
import pytest
import torch

from priorguide.sample.guidance import guide, unconditional
from priorguide.sample.latents import latent_space, to_latents, to_pixels
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.model import keep_only
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.noise import add_noise
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop, drop

TABLE = [Drop(("text",), 0.05), Drop(("text", "image"), 0.05), Drop(("image",), 0.05)]


@pytest.fixture(scope="module")
def vectors():
    return parity.vectors("instruct_pix2pix")


@pytest.fixture(scope="module")
def files(vectors, tmp_path_factory):
    """Both networks as files in the published layout."""
    folder, found = tmp_path_factory.mktemp("ldm"), {}
    for name in vectors.spec["networks"]:
        found[name] = folder / f"{name}.ckpt"
        torch.save({"state_dict": vectors.weights(name), "global_step": 22000}, found[name])
    return found


def heads(described):
    unet = described["unet"]
    text = described.get("clip_text", described.get("open_clip_text"))
    return {
        "num_heads": unet.get("num_heads"),
        "num_head_channels": unet.get("num_head_channels"),
        "text_heads": text.get("num_attention_heads", text.get("heads")),
    }


def read(vectors, files, name, kind, **options):
    return kind.from_pretrained(files[name], **heads(vectors.spec["networks"][name]), **options).eval()


@pytest.fixture(scope="module")
def model(vectors, files):
    side = vectors.io["image"].shape[-1]
    return read(vectors, files, "finetuned", InstructPix2Pix, weights="model", resolution=side)


@pytest.fixture(scope="module")
def base(vectors, files):
    return read(vectors, files, "prior", StableDiffusion, resolution=vectors.io["image"].shape[-1])


@pytest.fixture(scope="module")
def condition(vectors, model):
    io = vectors.io
    with torch.no_grad():
        return model.encode_condition({"image": (io["image"] + 1) / 2, "text": io["input_ids"]})


def test_parity_sizes_are_read_off_the_file(vectors, model, base):
    for name, found in (("finetuned", model), ("prior", base)):
        described = vectors.spec["networks"][name]
        count = sum(p.numel() for part in (found.network, found.vae, found.text_encoder) for p in part.parameters())
        keys = described["tensors"]
        published = sum(torch.Size(shape).numel() for key, shape in keys.items() if not key.startswith("model_ema."))
        assert count == published and described["scale_factor"] == found.vae.config["scaling_factor"]
        assert found.network.config["in_channels"] == described["unet"]["in_channels"]
        assert found.prediction == described["prediction_type"]


def test_parity_encoders_and_nulls(vectors, model, base, condition):
    tolerance, io = parity.NETWORK_TOLERANCE, vectors.io
    assert vectors.error(condition["text"], "context") < tolerance
    assert vectors.error(condition["image"], "concat_latent") < tolerance
    assert vectors.error(model.null({})["text"], "null_context") < tolerance
    assert vectors.error(base.null({})["text"], "prior.null_context") < tolerance
    with torch.no_grad():
        edited = to_latents(model.vae, (io["edited"] + 1) / 2)
        assert vectors.error(edited, "z_edited") < tolerance
        decoded = model.decode(io["z_edited"][:1])
    torch.testing.assert_close(decoded, (io["vae_decode"] / 2 + 0.5).clamp(0, 1), rtol=0, atol=tolerance)
    assert latent_space(model.vae) == latent_space(base.vae) == base.space
    assert to_pixels(model.vae, io["z_edited"][:1]).shape == io["vae_decode"].shape


def test_parity_noise_schedule(vectors, model):
    io = vectors.io
    assert vectors.error(model.path.alphas_cumprod.float(), "alphas_cumprod") < 1e-6
    assert vectors.error(add_noise(io["z_edited"], io["noise"], *model.path.coefficients(io["t"])), "x_t") < 1e-5


@torch.no_grad()
def predictions(vectors, model, condition):
    """By the parts that are kept."""
    io = vectors.io
    kept = {(): "eps_uncond", ("image",): "eps_image_only", ("text",): "eps_text_only", ("image", "text"): "eps_full"}
    return {
        name: model.denoise(io["x_t"], io["t"], keep_only(model, condition, parts, len(io["t"])))
        for parts, name in kept.items()
    }


def test_parity_network_outputs(vectors, files, model, condition):
    for name, out in predictions(vectors, model, condition).items():
        assert vectors.error(out, name) < parity.NETWORK_TOLERANCE
    averaged = read(vectors, files, "finetuned", InstructPix2Pix, resolution=vectors.io["image"].shape[-1])
    with torch.no_grad():
        out = averaged.denoise(vectors.io["x_t"], vectors.io["t"], condition)
    assert vectors.error(out, "eps_full_ema") < parity.NETWORK_TOLERANCE  # by default, as the authors sample


@torch.no_grad()
def test_parity_guided_predictions(vectors, model, base, condition):
    io, scales = vectors.io, [vectors.spec["guidance"]["g_I"], vectors.spec["guidance"]["g_T"]]
    rungs = predictions(vectors, model, condition)
    upper = [rungs["eps_image_only"], rungs["eps_full"]]
    assert vectors.relative_error(guide([rungs["eps_uncond"], *upper], scales), "guided_own") < parity.GUIDED_TOLERANCE
    prior = unconditional(base, onto=model)
    out = base.denoise(io["x_t"], io["t"], prior.condition(condition, len(io["t"])))
    assert vectors.error(out, "prior.eps_null") < parity.NETWORK_TOLERANCE
    guided = guide([prior.express(out, io["x_t"], io["t"].double()), *upper], scales)
    assert vectors.relative_error(guided, "guided_prior") < parity.GUIDED_TOLERANCE


@pytest.mark.parametrize(
    ("scheduler", "reference"),
    [("euler", "euler5"), ("euler", "euler5_prior"), ("euler_ancestral", "euler_ancestral5")],
)
def test_parity_sampled(vectors, model, base, condition, scheduler, reference):
    io, count = vectors.io, len(vectors.io["z_T"])
    made = make_scheduler(model, scheduler, timestep_spacing="linspace")
    made.set_timesteps(len(io["sampler_noise"]))
    found = sample(
        model,
        {name: part[:count] for name, part in condition.items()},
        range(count),
        scheduler=made,
        scales=[vectors.spec["guidance"]["g_I"], vectors.spec["guidance"]["g_T"]],
        prior=unconditional(base, onto=model) if reference.endswith("prior") else None,
        steps=len(io["sampler_noise"]),
        noise=io["z_T"] / made.init_noise_sigma,
        step_noise=io["sampler_noise"],
    )
    assert vectors.relative_error(found, reference) < parity.TRAJECTORY_TOLERANCE


def test_parity_drop_out(vectors, model, condition):
    dropped = drop(condition, model.null(condition), TABLE, vectors.io["dropout_random"])
    assert vectors.error(dropped["text"], "dropout_context") < parity.NETWORK_TOLERANCE
    assert vectors.error(dropped["image"], "dropout_concat") < parity.NETWORK_TOLERANCE


@torch.no_grad()
def test_parity_training_loss(vectors, model, condition):
    io = vectors.io
    dropped = drop(condition, model.null(condition), TABLE, io["dropout_random"])
    loss = FineTune(model, TABLE, ema_decay=0).eval().loss(io["z_edited"], dropped, io["noise"], io["t"]).mean()
    assert vectors.relative_error(loss, "train_loss") < parity.NETWORK_TOLERANCE


def test_parity_widened_from_the_base(vectors, base):
    model = InstructPix2Pix.from_base(base, resolution=vectors.io["image"].shape[-1])
    assert vectors.error(model.network.conv_in.weight, "init_conv_in_from_base") == 0
    x_t, t = vectors.io["x_t"], vectors.io["t"]
    with torch.no_grad():
        own = model.denoise(x_t, t, keep_only(model, {}, (), len(t)))
        assert torch.equal(own, base.denoise(x_t, t, keep_only(base, {}, (), len(t))))


def test_parity_through_a_pipeline_folder(vectors, base, tmp_path):
    """What diffusers' own pipeline saves of the base loads to the same null prediction."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from priorguide.sample.text import tiny_text

    words = base.text_encoder.config.vocab_size
    vocabulary = {f"w{i}</w>": i for i in range(words - 2)} | {"<|startoftext|>": words - 2, "<|endoftext|>": words - 1}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=len(vectors.io["null_ids"][0]))
    assert type(tokenizer) is type(tiny_text()[1])
    parts = (base.vae, base.text_encoder, tokenizer, base.network)
    scheduler = DDIMScheduler(**base.path.scheduler_config(), clip_sample=False)
    StableDiffusionPipeline(*parts, scheduler, None, None, requires_safety_checker=False).save_pretrained(tmp_path)
    found = StableDiffusion.from_pretrained(tmp_path, resolution=vectors.io["image"].shape[-1], prior_only=True).eval()
    assert found.space == base.space and found.vae is None and found.text_encoder is None
    with torch.no_grad():
        x_t, t = vectors.io["x_t"], vectors.io["t"]
        out = found.denoise(x_t, t, keep_only(found, {}, (), len(t)))
    assert vectors.error(out, "prior.eps_null") < parity.NETWORK_TOLERANCE
