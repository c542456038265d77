"""Versatile Diffusion on tiny random weights: beside the stock pipelines, in bundles, from a base, with its priors."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    DDIMScheduler,
    Transformer2DModel,
    UNet2DConditionModel,
    VersatileDiffusionImageVariationPipeline,
    VersatileDiffusionTextToImagePipeline,
)
from PIL import Image
from runs import CONFIGS, small
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from priorguide.sample import versatile_layouts as layouts
from priorguide.sample.bundle import Bundle, Recorded
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import Sampler, make_scheduler, sample
from priorguide.sample.model import keep_only
from priorguide.sample.models.pixart import PixArt
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.models.versatile import VersatileDiffusion, clip_input, encode_pictures
from priorguide.train.cli import main
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop

PROMPTS = ["a coat", "a hat"]
CONTEXTS = ["image", "text", "dual"]


def shaken(model):
    """As after a fine-tune, with everything moved a little."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def like(network, **changes):
    """A fresh network of these sizes."""
    sizes = {name: value for name, value in network.config.items() if not name.startswith("_")}
    return UNet2DConditionModel(**sizes | changes)


@pytest.fixture(scope="module")
def base():
    return StableDiffusion.tiny().eval()


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {context: shaken(VersatileDiffusion.tiny(context, text_weight=0.3)) for context in CONTEXTS}


@pytest.fixture(scope="module")
def pictures():
    """As the files have them, in 8 bits, so that none is rounded once more."""
    array = np.random.default_rng(2).integers(0, 256, (2, 24, 30, 3), dtype=np.uint8)
    return [Image.fromarray(rows) for rows in array], torch.from_numpy(array).movedim(-1, 1).float() / 255


@pytest.fixture(scope="module")
def conditions(models, pictures):
    batch = {"image": pictures[1], "text": PROMPTS}
    return {context: model.encode_condition(batch) for context, model in models.items()}


@pytest.fixture(scope="module")
def clip(models, tmp_path_factory):
    """CLIP's own folder, with both towers, their projections and the tokenizer."""
    text, vision = models["dual"].text_encoder, models["dual"].image_encoder
    whole = CLIPModel(
        CLIPConfig(text_config=text.config.to_dict(), vision_config=vision.config.to_dict(), projection_dim=16)
    )
    whole.load_state_dict({**whole.state_dict(), **text.state_dict(), **vision.state_dict()})
    whole.save_pretrained(folder := tmp_path_factory.mktemp("clip"))
    models["text"].tokenizer.save_pretrained(folder)
    return str(folder)


# --- beside diffusers


def scheduler_of(model):
    return DDIMScheduler(**model.path.scheduler_config(), steps_offset=1, clip_sample=False, set_alpha_to_one=False)


def run(pipe, asked, noise, **options):
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_inference_steps": 5, "guidance_scale": 7.5}
    return pipe(asked, **size, latents=noise, output_type="latent", **options).images


def test_the_stock_image_variation_is_equalled_but_for_its_null(models, pictures):
    model = models["image"]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    parts = (processor, model.image_encoder, model.network, model.vae, scheduler_of(model))
    pipe = VersatileDiffusionImageVariationPipeline(*parts)
    stock = pipe._encode_prompt(pictures[0], "cpu", 1, True, None)
    condition = model.encode_condition({"image": pictures[1]})
    torch.testing.assert_close(condition["image"], stock[2:], rtol=0, atol=1e-5)
    # Its fault: the grey null is handed over in [0, 1] and divided by 255, so that CLIP sees black.
    grey, black = (encode_pictures(torch.full((1, 3, 32, 32), value), model.image_encoder) for value in (0.5, 0.0))
    assert (stock[:1] - grey).abs().max() > 0.1 and (stock[:1] - black).abs().max() < 1e-2
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(3))
    expected = run(pipe, pictures[0], noise, negative_prompt=[Image.new("RGB", (32, 32), (127, 127, 127))] * 2)
    other = VersatileDiffusion(model.network, null_image=grey, vae=model.vae, sample_size=8)
    arguments = {"scheduler": scheduler_of(model), "scales": [7.5], "steps": 5, "noise": noise}
    found = sample(other, condition, [0, 1], **arguments)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    zeros = sample(model, condition, [0, 1], **arguments)
    assert (zeros - expected).abs().max() > 1e-2 * expected.abs().max()  # the null matters


def test_the_stock_text_to_image_is_equalled(models):
    model = models["text"]
    parts = (model.tokenizer, model.text_encoder, model.network, None, model.vae, scheduler_of(model))
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(3))
    expected = run(VersatileDiffusionTextToImagePipeline(*parts), PROMPTS, noise)
    condition = model.encode_condition({"text": PROMPTS})
    found = sample(model, condition, [0, 1], scheduler=scheduler_of(model), scales=[7.5], steps=5, noise=noise)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_dual_attention_in_diffusers_needs_its_mask_left_out(models, conditions):
    """Its fault: the blocks hand their attention an argument that DualTransformer2DModel does not take."""
    model, full = models["dual"], conditions["dual"]
    x_t, t, context = torch.randn(2, *model.shape), torch.tensor([5, 900]), torch.cat([full["text"], full["image"]], 1)
    plain = like(model.network)
    plain.load_state_dict(model.network.state_dict())
    with pytest.raises(TypeError, match="encoder_attention_mask"):
        plain(x_t, t, context)
    with torch.no_grad():
        assert model.denoise(x_t, t, full).isfinite().all()


def test_either_context_alone_at_the_ends_of_the_weight(models, conditions):
    """Each with its own attention, and the rest shared: once in memory."""
    dual, full = models["dual"], conditions["dual"]
    x_t, t = torch.randn(2, *dual.shape), torch.tensor([5, 900])
    shared = dual.network.state_dict()
    for weight, kind in ((0.0, "image"), (1.0, "text")):
        place = f".transformers.{layouts.KINDS.index(kind)}."
        state = {
            name.replace(place, "."): tensor
            for name, tensor in shared.items()
            if ".transformers." not in name or place in name
        }
        network = like(dual.network, dual_cross_attention=False)
        network.load_state_dict(state)
        nulls = {f"null_{kind}": getattr(dual, f"null_{kind}")}
        single = VersatileDiffusion(network, **nulls, vae=dual.vae, context=kind, sample_size=8).eval()
        both = VersatileDiffusion(
            dual.network, dual.null_text, dual.null_image, dual.vae, context="dual", text_weight=weight
        ).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                both.denoise(x_t, t, full), single.denoise(x_t, t, {kind: full[kind]}), rtol=0, atol=1e-5
            )


# --- from a base


@pytest.mark.parametrize("context", CONTEXTS)
def test_from_a_base(base, clip, pictures, context, record_property):
    """The first unconditional prediction is the base's with text, whose null is the base's own; without a picture it is
    not, since the base knows no context of zeros: the gap is what is recorded."""
    before = copy.deepcopy(base.network.state_dict())
    model = VersatileDiffusion.from_base(base, clip, context=context, resolution=16).eval()
    assert model.space == base.space and model.vae is base.vae
    x_t, t = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(4)), torch.tensor([100, 700])
    with torch.no_grad():
        own = model.denoise(x_t, t, keep_only(model, {}, (), 2))
        theirs = base.denoise(x_t, t, keep_only(base, {}, (), 2))
    gap = ((own - theirs).abs().max() / theirs.abs().max()).item()
    record_property("gap", gap)
    assert torch.equal(own, theirs) if context == "text" else 1e-3 < gap < 1
    if context == "text":
        condition = model.encode_condition({"text": PROMPTS})
        arguments = {"scheduler": make_scheduler(model), "scales": [2.0], "steps": 3}
        guided = [sample(model, condition, [0, 1], prior=p, **arguments) for p in (None, unconditional(base, model))]
        torch.testing.assert_close(*guided, rtol=0, atol=1e-5 * float(guided[0].abs().max()))
    shaken(model)  # it shares no weight with its base, nor one context with the other
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.network.state_dict().items())
    if context == "dual":
        first, second = (
            {name: t for name, t in model.network.named_parameters() if f".transformers.{i}." in name} for i in (0, 1)
        )
        assert first and not {t.data_ptr() for t in first.values()} & {t.data_ptr() for t in second.values()}


# --- priors


def test_every_published_prior_binds_and_guides(base, models, conditions):
    """SD 1.4 as it is, SD 2.1 by v, PixArt on another noise schedule: all with one autoencoder, as published."""
    model, condition = models["image"], conditions["image"]
    velocity = StableDiffusion(base.network, base.null_text, space=base.space, prediction="v_prediction", sample_size=8)
    torch.manual_seed(5)
    pixart = PixArt.tiny().eval()
    pixart.space = model.space
    priors = {"self": None, "sd14": base, "sd21": velocity, "pixart": pixart}
    arguments = {"scheduler": scheduler_of(model), "scales": [2.0], "steps": 4}
    found = {
        name: sample(model, condition, [0, 1], prior=unconditional(prior, onto=model) if prior else None, **arguments)
        for name, prior in priors.items()
    }
    assert all(latents.isfinite().all() for latents in found.values())
    names = list(found)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i]]
    assert all((found[a] - found[b]).abs().max() > 1e-3 for a, b in pairs)


def test_a_base_of_the_same_encoder_binds_whatever_its_decoder_is(base, models):
    """Latents of [0, 1] pictures are Stable Diffusion's: only another encoder makes others."""
    model = models["image"]
    assert base.space == model.space
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.vae.decoder.conv_in.weight += 1
    again = StableDiffusion(other.network, other.null_text, other.vae, sample_size=8)
    assert unconditional(again, onto=model).model is again
    with torch.no_grad():
        other.vae.encoder.conv_in.weight += 1
    again = StableDiffusion(other.network, other.null_text, other.vae, sample_size=8)
    with pytest.raises(ValueError, match="choose a base with the same autoencoder"):
        unconditional(again, onto=model)


# --- conditions


def test_the_null_is_one_definition(models, conditions):
    for context, model in models.items():
        null = model.null(conditions[context])
        assert null.keys() == set(layouts.kinds_of(context))
        if "image" in null:
            assert not null["image"].any()
        if "text" in null:
            assert torch.equal(
                null["text"][:1], model.encode_condition({"image": null.get("image"), "text": [""]})["text"]
            )


def test_a_picture_is_asked_for_by_itself(models, pictures):
    model, pixels = models["image"], torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    itself = model.encode_condition({"pixels": pixels})["image"]
    assert torch.equal(itself, model.encode_condition({"image": pixels})["image"])
    other = model.encode_condition({"pixels": pixels, "image": pictures[1]})["image"]
    assert torch.equal(other, model.encode_condition({"image": pictures[1]})["image"]) and not torch.equal(
        other, itself
    )


def test_clip_sees_eight_bits_cut_off_and_the_centre():
    """A grey picture twice as wide as high: its outer quarters are cut off."""
    pixels = torch.zeros(1, 1, 8, 16)
    pixels[..., 4:12] = (100 + 0.9) / 255
    found = clip_input(pixels, 8)
    processor = CLIPImageProcessorPil()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    torch.testing.assert_close(found[0], ((100 / 255 - mean) / std).expand(-1, 8, 8), rtol=0, atol=1e-6)


def test_conditions_from_the_command_line(models, tmp_path):
    Image.new("L", (30, 20), 128).save(tmp_path / "grey.png")
    values = {"image": str(tmp_path / "grey.png"), "text": "a coat"}
    for context, model in models.items():
        own = {name: values[name] for name in layouts.kinds_of(context)}
        found = model.encode_condition(model.read_condition(**own))
        assert {name: part.shape for name, part in found.items()} == {n: p.shape for n, p in model.null({}).items()}
    with pytest.raises(ValueError, match=r"the conditions to give are \['image', 'text'\], got \['text'\]"):
        models["dual"].read_condition(text="a coat")


# --- bundles, training


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_bundle(base, models, conditions, pictures, tmp_path, context):
    model, condition = models[context], conditions[context]
    guidance, sampler = Guidance((2.0,), unconditional(base, onto=model)), Sampler(steps=3)
    recorded = Recorded.draw(model, condition, [5, 6], guidance, sampler)
    Bundle.save(tmp_path / "bundle", model, guidance=guidance, sampler=sampler, recorded=recorded)
    loaded = Bundle.load(tmp_path / "bundle")
    assert loaded.replay().identical
    assert loaded.model.context == context and loaded.model.text_weight == 0.3
    again = loaded.model.encode_condition({"image": pictures[1], "text": PROMPTS})
    assert all(torch.equal(again[name], part) for name, part in condition.items())
    needed = {"image": {"image_encoder"}, "text": {"text_encoder", "tokenizer"}}
    needed["dual"] = needed["image"] | needed["text"]
    folders = {path.name for path in (tmp_path / "bundle").iterdir() if path.is_dir()}
    assert folders == {"unet", "unconditional_unet", "vae", "scheduler", *needed[context]}


@pytest.mark.parametrize("context", CONTEXTS)
def test_it_learns_one_batch_and_its_null_parts_from_the_condition(context):
    torch.manual_seed(4)
    model = VersatileDiffusion.tiny(context)
    tuning = FineTune(model, [Drop(layouts.kinds_of(context), 0.1)], ema_decay=0)
    with torch.no_grad():
        x_0, condition = model.eval().encode({"pixels": torch.rand(4, 3, 16, 16), "text": PROMPTS * 2})
    model.train()
    eps, t = torch.randn_like(x_0), torch.tensor([100, 300, 600, 900])
    optimizer = torch.optim.AdamW(model.network.parameters(), 1e-2)
    losses = []
    for _ in range(50):
        loss = tuning.loss(x_0, condition, eps, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    model.eval()
    with torch.no_grad():
        parted = model.denoise(x_0, t, condition) - model.denoise(x_0, t, keep_only(model, condition, (), 4))
    assert parted.abs().max() > 0.1


@pytest.mark.parametrize("context", ["image", "dual"])
def test_the_config_reads_a_folder_as_a_user_lays_it_out(tmp_path, context):
    """Pictures of several sizes with captions in metadata.jsonl, the offline overlay's model, one comparison."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i in range(40):
        Image.new("RGB", (20 + i, 40 - i // 2), (6 * i, 255 - 5 * i, 90)).save(folder / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"colour {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    content = small(CONFIGS / "versatile.yaml", tmp_path / "run", tmp_path)
    overlay = yaml.safe_load((CONFIGS / "versatile_offline.yaml").read_text())
    content["trainer"] |= {"accelerator": "cpu", "precision": "32-true", "accumulate_grad_batches": 1}
    comparison = content["trainer"]["callbacks"][0]["init_args"]
    comparison |= overlay["trainer"]["callbacks"][1]["init_args"] | {"every_n_steps": 2}
    content["model"] |= overlay["model"] | {"drop": [{"parts": list(layouts.kinds_of(context)), "probability": 0.1}]}
    content["model"]["model"]["init_args"]["context"] = context
    content["data"]["init_args"] |= {"source": str(folder), "resolution": 16, "num_workers": 0, "val_fraction": 0.6}
    (config := tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(config)]) == 0
    record = (tmp_path / "run" / "compare" / "metrics.jsonl").read_text()
    assert '"sd14"' in record and '"self"' in record


# --- sizes, refusals


def test_full_size():
    """As published: Stable Diffusion 1.x's 859,520,964 for one context (CompVis: 860M), and its 16 attention blocks
    once more for the second. CLIP ViT-L/14 as a whole, with its logit scale, has 427,616,513 (OpenAI: 428M)."""
    with torch.device("meta"):
        made = {
            dual: UNet2DConditionModel(
                cross_attention_dim=768, attention_head_dim=8, sample_size=64, dual_cross_attention=dual
            )
            for dual in (False, True)
        }
        text = layouts._tower("text", 768, 3072, 768, 12, 12, (49408, 77))
        vision = layouts._tower("image", 1024, 4096, 768, 24, 16, (224, 14))
    count = {dual: sum(p.numel() for p in unet.parameters()) for dual, unet in made.items()}
    blocks = [block for block in made[False].modules() if isinstance(block, Transformer2DModel)]
    attention = sum(p.numel() for block in blocks for p in block.parameters())
    assert len(blocks) == 16 and count == {False: 859_520_964, True: 859_520_964 + attention}
    assert sum(p.numel() for tower in (text, vision) for p in tower.parameters()) + 1 == 427_616_513
    null = torch.zeros(1, 257, 768)
    model = VersatileDiffusion(made[False], null_image=null, space="latents")
    assert model.shape == (4, 64, 64) and 1 + (vision.config.image_size // vision.config.patch_size) ** 2 == 257


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda b, m: VersatileDiffusion.from_base(m["text"], "clip"), "starts from Stable Diffusion, got Versatile"),
        (lambda b, m: VersatileDiffusion(m["dual"].network, null_image=m["dual"].null_image), "U-Net attends to both"),
        (lambda b, m: VersatileDiffusion(m["image"].network, space="x"), "null_image must be given"),
        (
            lambda b, m: VersatileDiffusion(b.network, b.null_text, torch.zeros(1, 5, 16), space="x"),
            "null_text must be left out with context='image'",
        ),
        (lambda b, m: VersatileDiffusion.tiny("sound"), "context must be one of .*image.*text.*dual.*got 'sound'"),
        (lambda b, m: VersatileDiffusion.tiny("dual", text_weight=1.5), r"text_weight must lie in \[0, 1\], got 1.5"),
        (lambda b, m: m["text"].encode_condition({"text": "a coat"}), "list of prompts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(base, models, make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(base, models)


def test_a_model_without_its_encoders_says_so(base, models, clip):
    alone = VersatileDiffusion(models["image"].network, null_image=models["image"].null_image, space=base.space)
    with pytest.raises(ValueError, match="came as a prior, without its autoencoder"):
        alone.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="came without its image encoder"):
        alone.encode_condition({"pixels": torch.rand(1, 3, 16, 16)})
    prior = StableDiffusion(base.network, base.null_text, space=base.space)
    with pytest.raises(ValueError, match="load it without prior_only"):
        VersatileDiffusion.from_base(prior, clip)


def test_a_base_of_another_width_is_refused(base, clip):
    wide = StableDiffusion(like(base.network, cross_attention_dim=24), torch.zeros(1, 8, 24), base.vae, sample_size=8)
    with pytest.raises(ValueError, match="takes contexts of width 24, .* makes ones of 16"):
        VersatileDiffusion.from_base(wide, clip, context="text", resolution=16)
    with pytest.raises(ValueError, match="takes contexts of width 24, .* makes ones of 16"):
        VersatileDiffusion.from_base(wide, clip, resolution=16)
