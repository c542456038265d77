"""Versatile Diffusion's image flow, and its priors, beside the originals' own outputs."""

import random

import parity
import pytest
import torch
from test_instruct_pix2pix_parity import heads

from priorguide.sample.guidance import guide, unconditional
from priorguide.sample.latents import latent_space, to_latents
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.model import keep_only
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.models.versatile import VersatileDiffusion, clip_input, encode_pictures
from priorguide.sample.noise import add_noise
from priorguide.train.fine_tune import FineTune

FLOWS = {"image": "i2i", "text": "t2i"}
CONTEXTS = [*FLOWS, "dual"]


@pytest.fixture(scope="module")
def vectors():
    return parity.vectors("versatile_diffusion")


@pytest.fixture(scope="module")
def weights(vectors):
    return vectors.weights("finetuned")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("versatile")


@pytest.fixture(scope="module")
def file(weights, folder):
    """The current layout."""
    torch.save(weights, folder / "vd.pth")
    return folder / "vd.pth"


def options(vectors, **more):
    described = vectors.spec["networks"]["finetuned"]
    return {
        "num_heads": described["unet_image"]["num_heads"],
        "text_heads": described["clip_text"]["num_attention_heads"],
        "image_heads": described["clip_vision"]["num_attention_heads"],
        "resolution": vectors.io["image01"].shape[-1],
        **more,
    }


@pytest.fixture(scope="module")
def models(vectors, file):
    """By context; "dual" weighs as its reference does."""
    return {
        context: VersatileDiffusion.from_pretrained(
            file, context=context, text_weight=0.25 if context == "dual" else 0.5, **options(vectors)
        ).eval()
        for context in CONTEXTS
    }


@pytest.fixture(scope="module")
def base(vectors, folder, models):
    """SD 1.4, with the latents' name of the fine-tuned model: the rule gives both different autoencoders."""
    torch.save({"state_dict": vectors.weights("prior")}, path := folder / "sd14.ckpt")
    described = heads(vectors.spec["networks"]["prior"])
    found = StableDiffusion.from_pretrained(path, **described, resolution=vectors.io["image01"].shape[-1]).eval()
    assert found.space == latent_space(found.vae) != models["image"].space
    found.space = models["image"].space
    return found


def condition(vectors, context):
    parts = {"image": vectors.io["ctx_image"], "text": vectors.io["ctx_text"]}
    return parts if context == "dual" else {context: parts[context]}


@torch.no_grad()
def predictions(vectors, model):
    """The unconditional prediction, and that with the whole condition."""
    io, full = vectors.io, condition(vectors, model.context)
    return [model.denoise(io["x_t"], io["t"], keep_only(model, full, keep, len(io["t"]))) for keep in ((), full)]


def test_parity_sizes_are_read_off_the_file(vectors, models):
    """Counted from the file's own tensors, flow by flow; one copy of what two contexts share."""
    described = vectors.spec["networks"]["finetuned"]

    def published(*prefixes):
        tensors = described["tensors"].items()
        return sum(torch.Size(shape).numel() for key, shape in tensors if key.startswith(prefixes))

    shared = ("diffuser.image.data_blocks.", "diffuser.image.time_embed.")
    image, text = "diffuser.image.context_blocks.", "diffuser.text.context_blocks."
    wanted = {"image": (*shared, image), "text": (*shared, text), "dual": (*shared, image, text)}
    for context, model in models.items():
        assert sum(p.numel() for p in model.network.parameters()) == published(*wanted[context])
        assert model.prediction == described["prediction_type"]
        assert model.vae.config["scaling_factor"] == described["scale_factor"]
    vae, clip = models["dual"].vae, models["dual"]
    assert sum(p.numel() for p in vae.parameters()) == published("vae.image.")
    assert sum(p.numel() for p in clip.text_encoder.parameters()) == published("ctx.text.model.text_")
    assert sum(p.numel() for p in clip.image_encoder.parameters()) == published("ctx.image.model.vis")


@torch.no_grad()
def test_parity_encoders_and_nulls(vectors, models, base):
    tolerance, io = parity.NETWORK_TOLERANCE, vectors.io
    assert vectors.error(clip_input(io["image01"][:1], 224), "clip_pixels_first") < 1e-6
    found = models["dual"].encode_condition({"pixels": io["image01"], "text": io["input_ids"]})
    assert vectors.error(found["image"], "ctx_image") < tolerance
    assert vectors.error(found["text"], "ctx_text") < tolerance
    null = models["dual"].null(found)
    assert not null["image"].any() and null["image"].shape == io["ctx_image"].shape
    assert vectors.error(null["text"][:1], "ctx_text_null") < tolerance
    assert torch.equal(models["text"].encode_condition({"text": io["null_ids"]})["text"], models["text"].null_text)
    grey = encode_pictures(torch.full((1, 3, 64, 64), 0.5), models["image"].image_encoder)
    assert vectors.error(grey, "ctx_image_grey") < tolerance
    assert vectors.error(base.null({})["text"], "prior.null_context") < tolerance


@torch.no_grad()
def test_parity_autoencoder_and_noise(vectors, models):
    """Pictures in [0, 1], which the autoencoder sees as [-1, 1]: Stable Diffusion's own convention of latents."""
    io, model = vectors.io, models["image"]
    assert vectors.error(to_latents(model.vae, io["image01"]), "z") < parity.NETWORK_TOLERANCE
    assert vectors.error(model.decode(io["z"][:1]), "vae_decode01") < parity.NETWORK_TOLERANCE
    assert vectors.error(model.path.alphas_cumprod.float(), "alphas_cumprod") < 1e-6
    assert vectors.error(add_noise(io["z"], io["noise"], *model.path.coefficients(io["t"])), "x_t") < 1e-5


@torch.no_grad()
def test_parity_network_outputs(vectors, models):
    io = vectors.io
    for context, flow in FLOWS.items():
        null, full = predictions(vectors, models[context])
        assert vectors.error(full, f"eps_{flow}") < parity.NETWORK_TOLERANCE
        assert vectors.error(null, f"eps_{flow}_null") < parity.NETWORK_TOLERANCE
    grey = models["image"].denoise(io["x_t"], io["t"], {"image": io["ctx_image_grey"].expand(len(io["t"]), -1, -1)})
    assert vectors.error(grey, "eps_i2i_grey") < parity.NETWORK_TOLERANCE
    dual = models["dual"].denoise(io["x_t"], io["t"], condition(vectors, "dual"))
    assert vectors.error(dual, "eps_dual_text25") < parity.NETWORK_TOLERANCE


@torch.no_grad()
def test_parity_dual_is_one_context_at_either_end(vectors, models):
    model, io = models["dual"], vectors.io
    for weight, flow in ((0.0, "i2i"), (1.0, "t2i")):
        again = VersatileDiffusion(
            model.network, model.null_text, model.null_image, model.vae, context="dual", text_weight=weight
        )
        out = again.denoise(io["x_t"], io["t"], condition(vectors, "dual"))
        assert vectors.error(out, f"eps_{flow}") < parity.NETWORK_TOLERANCE


def test_parity_guided_predictions(vectors, models, base):
    io, scales = vectors.io, [vectors.spec["guidance"]["g"]]
    for context, flow in FLOWS.items():
        null, full = predictions(vectors, models[context])
        assert vectors.relative_error(guide([null, full], scales), f"guided_{flow}_own") < parity.GUIDED_TOLERANCE
        prior = unconditional(base, onto=models[context])
        with torch.no_grad():
            out = base.denoise(io["x_t"], io["t"], prior.condition(condition(vectors, context), len(io["t"])))
        assert vectors.error(out, "prior.eps_null") < parity.NETWORK_TOLERANCE
        guided = guide([prior.express(out, io["x_t"], io["t"]), full], scales)
        assert vectors.relative_error(guided, f"guided_{flow}_prior") < parity.GUIDED_TOLERANCE


def test_parity_sd21_as_the_prior(vectors, models, tmp_path):
    """v becomes epsilon."""
    other = parity.vectors("sd21")
    torch.save({"state_dict": other.weights("network")}, tmp_path / "v2.ckpt")
    described = other.spec["networks"]["network"]
    kept = {"prediction": described["prediction_type"], "resolution": 64, "prior_only": True}
    base = StableDiffusion.from_pretrained(tmp_path / "v2.ckpt", **heads(described), **kept).eval()
    base.space = models["image"].space
    io, prior = vectors.io, unconditional(base, onto=models["image"])
    with torch.no_grad():
        out = base.denoise(io["x_t"], io["t"], prior.condition(condition(vectors, "image"), len(io["t"])))
    eps = prior.express(out, io["x_t"], io["t"])
    assert other.error(eps, "for_versatile_diffusion.eps_null") < parity.NETWORK_TOLERANCE
    guided = guide([eps, predictions(vectors, models["image"])[1]], [vectors.spec["guidance"]["g"]])
    assert other.relative_error(guided, "for_versatile_diffusion.guided_prior") < parity.GUIDED_TOLERANCE


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("context", FLOWS)
def test_parity_sampled(vectors, models, base, context, with_prior):
    model, io = models[context], vectors.io
    steps = len(io["ddim_timesteps"])
    scheduler = make_scheduler(model, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == sorted(io["ddim_timesteps"].tolist(), reverse=True)
    found = sample(
        model,
        condition(vectors, context),
        range(len(io["x_T"])),
        scheduler=scheduler,
        scales=[vectors.spec["guidance"]["g"]],
        prior=unconditional(base, onto=model) if with_prior else None,
        steps=steps,
        noise=io["x_T"],
    )
    name = f"ddim5_{FLOWS[context]}{'_prior' if with_prior else ''}"
    assert vectors.relative_error(found, name) < parity.TRAJECTORY_TOLERANCE


@torch.no_grad()
def test_parity_training_loss(vectors, models):
    io = vectors.io
    tuning = FineTune(models["image"], [], ema_decay=0).eval()
    loss = tuning.loss(io["z"], condition(vectors, "image"), io["noise"], io["t"]).mean()
    assert vectors.relative_error(loss, "train_loss_i2i") < parity.NETWORK_TOLERANCE


# --- layouts


@pytest.fixture(scope="module")
def legacy(vectors, weights, folder):
    """The layout of 2022 in shuffled order, its autoencoder in a file of its own, its CLIP in a folder."""
    names = vectors.spec["networks"]["finetuned"]["legacy_layout"]
    order = list(names)
    random.Random(0).shuffle(order)
    torch.save({old: weights[names[old]] for old in order}, folder / "vd-official.pth")
    prefix = "vae.image."
    vae = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    torch.save({"state_dict": vae}, folder / "kl-f8.pth")
    return folder / "vd-official.pth"


@pytest.fixture(scope="module")
def clip(vectors, weights, folder):
    """One CLIP of both towers, as it is published. The authors' file has a whole one of each context's."""
    from transformers import CLIPConfig, CLIPModel

    from priorguide.sample.text import tiny_text

    described = vectors.spec["networks"]["finetuned"]
    text, vision = dict(described["clip_text"]), described["clip_vision"]
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=text["projection_dim"])
    model = CLIPModel(config)
    state = {name: weights[f"ctx.{'text' if 'text' in name else 'image'}.model.{name}"] for name in model.state_dict()}
    model.load_state_dict(state)
    model.save_pretrained(folder / "clip")
    tiny_text()[1].save_pretrained(folder / "clip")
    return folder / "clip"


@torch.no_grad()
@pytest.mark.parametrize("context", CONTEXTS)
def test_parity_the_layout_of_2022_is_the_same_network(vectors, models, folder, legacy, clip, context):
    parts = {"vae": str(folder / "kl-f8.pth"), "clip": str(clip), "text_weight": 0.25}
    found = VersatileDiffusion.from_pretrained(legacy, context=context, **parts, **options(vectors)).eval()
    state = models[context].network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.network.state_dict().items())
    assert found.space == models[context].space
    io = vectors.io
    batch = {"pixels": io["image01"], "text": io["input_ids"]}
    for name, part in found.encode_condition(batch).items():
        assert vectors.error(part, f"ctx_{name}") < parity.NETWORK_TOLERANCE


def test_parity_either_layout_lacks_what_it_does_not_have(vectors, legacy, folder, clip):
    with pytest.raises(ValueError, match=r"vd-official.pth has no autoencoder \(vae.image.\*\): give one as `vae`"):
        VersatileDiffusion.from_pretrained(legacy, **options(vectors))
    vae = str(folder / "kl-f8.pth")
    with pytest.raises(ValueError, match=r"has no ctx.image.model.visual_projection.weight.*: give CLIP as `clip`"):
        VersatileDiffusion.from_pretrained(legacy, vae=vae, **options(vectors))


@pytest.mark.parametrize(
    ("change", "context", "sentence"),
    [
        (
            ("diffuser.image.data_blocks.5.0.in_layers.0.weight", None),
            "image",
            "lacks diffuser.image.data_blocks.5.0",
        ),
        (("diffuser.text.context_blocks.3.0.norm.bias", None), "text", "lacks diffuser.text.context_blocks.3.0.norm.b"),
        (("diffuser.text.context_blocks.3.0.norm.bias", None), "dual", "lacks diffuser.text.context_blocks.3.0.norm.b"),
        (("diffuser.image.context_blocks.16.0.norm.bias", 8), "image", "has besides diffuser.image.context_blocks.16"),
        (("diffuser.image.spare", 8), "text", "has besides diffuser.image.spare"),
        (("diffuser.image.data_blocks.0.0.weight", None), "image", "is no Versatile Diffusion checkpoint"),
        (("diffuser.image.data_blocks.29.0.2.weight", None), "image", "lacks diffuser.image.data_blocks.29.0.2.weight"),
        (("ctx.image.model.vision_model.post_layernorm.bias", None), "image", "lacks vision_model.post_layernorm.bias"),
    ],
)
def test_parity_names_that_are_missing_or_left_over_are_named(vectors, weights, folder, change, context, sentence):
    name, size = change
    state = {key: tensor for key, tensor in weights.items() if key != name}
    torch.save(state if size is None else {**state, name: torch.zeros(size)}, folder / "changed.pth")
    with pytest.raises(ValueError, match=sentence):
        VersatileDiffusion.from_pretrained(folder / "changed.pth", context=context, **options(vectors))


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("model.diffusion_model.unet_text.input_blocks.4.1.norm.bias", "text"),
        ("model.diffusion_model.unet_image.output_blocks.5.2.conv.bias", "image"),
    ],
)
def test_parity_the_layout_of_2022_is_spoken_of_in_its_own_words(vectors, legacy, folder, name, context):
    state = torch.load(legacy)
    torch.save({key: tensor for key, tensor in state.items() if key != name}, folder / "changed.pth")
    with pytest.raises(ValueError, match=f"it lacks {name}$"):
        VersatileDiffusion.from_pretrained(folder / "changed.pth", context=context, **options(vectors))


def test_parity_what_another_context_lacks_is_not_missed(vectors, weights, models, folder):
    """A file of the image flow alone, as an image variation needs it; of half precision, as one of the published is."""
    kept = {name: t.half() for name, t in weights.items() if not name.startswith(("diffuser.text.", "ctx.text."))}
    torch.save(kept, folder / "image.pth")
    found = VersatileDiffusion.from_pretrained(folder / "image.pth", **options(vectors))
    assert found.ladder == (frozenset({"image"}),) and found.space == models["image"].space
    assert {tensor.dtype for tensor in found.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="lacks diffuser.text.context_blocks"):
        VersatileDiffusion.from_pretrained(folder / "image.pth", context="text", **options(vectors))


def test_parity_files_are_recognised(vectors):
    described = vectors.spec["networks"]
    names = described["finetuned"]["tensors"]
    shapes = {"current": {name: tuple(shape) for name, shape in names.items()}}
    shapes["2022"] = {old: tuple(names[new]) for old, new in described["finetuned"]["legacy_layout"].items()}
    for kind, found in shapes.items():
        assert VersatileDiffusion.recognise(found) == f"Versatile Diffusion, {kind} layout"
        assert StableDiffusion.recognise(found) is None
    prior = {name: tuple(shape) for name, shape in described["prior"]["tensors"].items()}
    assert VersatileDiffusion.recognise(prior) is None and StableDiffusion.recognise(prior)


@pytest.mark.parametrize("context", CONTEXTS)
def test_parity_through_a_pipeline_folder(vectors, models, clip, tmp_path, context):
    """What diffusers calls image_unet/ and text_unet/: of the second only the text context's attention is read."""
    from diffusers import DDIMScheduler
    from safetensors.torch import save_file

    model = models["image"]
    model.network.save_pretrained(tmp_path / "image_unet")
    (tmp_path / "text_unet").mkdir()
    text = {name: t for name, t in models["text"].network.state_dict().items() if ".attentions." in name}
    data = {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(2)}  # the text flow's own data blocks
    save_file(text | data, tmp_path / "text_unet" / "diffusion_pytorch_model.safetensors")
    model.vae.save_pretrained(tmp_path / "vae")
    models["dual"].image_encoder.save_pretrained(tmp_path / "image_encoder")
    models["dual"].text_encoder.save_pretrained(tmp_path / "text_encoder")
    DDIMScheduler(**model.path.scheduler_config()).save_pretrained(tmp_path / "scheduler")
    side = vectors.io["image01"].shape[-1]
    arguments = {"context": context, "text_weight": 0.25, "resolution": side}
    if context != "image":
        with pytest.raises(ValueError, match=r"has neither CLIP's config.json nor a folder tokenizer/"):
            VersatileDiffusion.from_pretrained(tmp_path, **arguments)
    found = VersatileDiffusion.from_pretrained(tmp_path, clip=str(clip), prior_only=True, **arguments).eval()
    assert found.vae is None and found.space == model.space
    for out, own in zip(predictions(vectors, found), predictions(vectors, models[context]), strict=True):
        torch.testing.assert_close(out, own, rtol=0, atol=parity.NETWORK_TOLERANCE)
