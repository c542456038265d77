"""InstructPix2Pix and Stable Diffusion on tiny random weights: beside the stock pipelines, in bundles, from a base."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from priorguide.sample.bundle import Bundle, Recorded
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import Sampler, make_scheduler, sample
from priorguide.sample.model import keep_only
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop

PROMPTS = ["make it winter", "add a hat"]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return StableDiffusion.tiny().eval()


@pytest.fixture(scope="module")
def model(base):
    """A fine-tune that has moved: with random weights in the new channels, and everything else shaken."""
    torch.manual_seed(1)
    found = InstructPix2Pix.from_base(base, resolution=16)
    with torch.no_grad():
        for parameter in found.network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return found.eval()


@pytest.fixture(scope="module")
def condition(model):
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.encode_condition({"image": pixels, "text": PROMPTS})


def stock(model, scheduler):
    return StableDiffusionInstructPix2PixPipeline(
        model.vae, model.text_encoder, model.tokenizer, model.network, scheduler, None, None, None, False
    )


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_the_stock_pipeline_is_equalled(model, kind):
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    scheduler = kind(**model.path.scheduler_config(), timestep_spacing="leading", steps_offset=1)
    if kind is DDIMScheduler:
        scheduler = kind(**model.path.scheduler_config(), steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(3))
    pipe = stock(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPTS,
        pixels,
        num_inference_steps=5,
        guidance_scale=7.5,
        image_guidance_scale=1.5,
        latents=noise,
        output_type="latent",
    ).images
    condition = model.encode_condition({"image": pixels, "text": PROMPTS})
    found = sample(model, condition, [0, 1], scheduler=scheduler, scales=[1.5, 7.5], steps=5, noise=noise)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not torch.allclose(found, sample(model, condition, [0, 1], scheduler=scheduler, scales=[1.5, 3], steps=5))


def test_at_the_start_self_and_base_guidance_are_the_same(base, condition):
    model = InstructPix2Pix.from_base(base, resolution=16).eval()
    arguments = {"scheduler": make_scheduler(model), "scales": [1.5, 7.5], "steps": 4}
    own = sample(model, condition, [0, 1], **arguments)
    other = sample(model, condition, [0, 1], prior=unconditional(base, onto=model), **arguments)
    torch.testing.assert_close(own, other, rtol=0, atol=1e-5 * float(own.abs().max()))
    assert model.network.conv_in.weight.shape[1] == 8 and base.network.conv_in.weight.shape[1] == 4


def test_the_base_changes_the_lowest_rung_alone(base, model, condition):
    prior = unconditional(base, onto=model)
    arguments = {"scheduler": make_scheduler(model), "steps": 3}
    at = {scales: sample(model, condition, [0, 1], scales=scales, **arguments) for scales in [(1.0, 7.5), (1.5, 7.5)]}
    with_base = {s: sample(model, condition, [0, 1], scales=s, prior=prior, **arguments) for s in at}
    assert torch.equal(at[1.0, 7.5], with_base[1.0, 7.5])  # no prior is evaluated
    assert not torch.allclose(at[1.5, 7.5], with_base[1.5, 7.5], atol=1e-3)


@pytest.mark.parametrize(("kind", "channels", "count"), [(StableDiffusion, 4, 859_520_964), (InstructPix2Pix, 8, None)])
def test_full_size(kind, channels, count):
    """As published: 859,520,964 parameters, and 8-channel 859,532,484; 83,653,863 in the autoencoder."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=channels, cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    assert sum(p.numel() for p in unet.parameters()) == (count or 859_532_484)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    model = kind(unet, torch.zeros(1, 77, 768), space="latents")
    assert model.shape == (4, model.shape[1], model.shape[1])


def test_a_bundle_with_prompts(base, model, condition, tmp_path):
    guidance = Guidance((1.5, 7.5), unconditional(base, onto=model))
    sampler = Sampler(steps=3)
    recorded = Recorded.draw(model, condition, [5, 6], guidance, sampler)
    Bundle.save(tmp_path / "bundle", model, guidance=guidance, sampler=sampler, recorded=recorded)
    folders = {path.name for path in (tmp_path / "bundle").iterdir() if path.is_dir()}
    assert folders == {"unet", "unconditional_unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    loaded = Bundle.load(tmp_path / "bundle")
    assert loaded.replay().identical
    again = loaded.model.encode_condition({"image": condition["image"], "text": PROMPTS})
    assert torch.equal(again["text"], condition["text"])
    prior = loaded.guidance.prior.model
    assert prior.vae is None and prior.text_encoder is None  # a prior needs neither
    assert torch.equal(prior.null({})["text"], base.null_text)


def test_conditions_from_the_command_line(model, tmp_path):
    Image.new("L", (30, 20), 128).save(tmp_path / "grey.png")
    batch = model.read_condition(image=str(tmp_path / "grey.png"), text="make it winter")
    found = model.encode_condition(batch)
    assert found["image"].shape == (1, *model.shape) and found["text"].shape == model.null_text.shape
    with pytest.raises(ValueError, match=r"the conditions to give are \['image', 'text'\], got \['text'\]"):
        model.read_condition(text="make it winter")


def test_it_learns_one_batch_and_its_null_parts_from_the_condition(base):
    torch.manual_seed(4)
    model = InstructPix2Pix.from_base(base, resolution=16)
    table = [Drop(("text",), 0.05), Drop(("text", "image"), 0.05), Drop(("image",), 0.05)]
    tuning = FineTune(model, table, ema_decay=0)
    pixels = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        x_0, condition = model.eval().encode({"pixels": 1 - pixels, "image": pixels, "text": PROMPTS * 2})
    model.train()
    eps, t = torch.randn_like(x_0), torch.tensor([100, 300, 600, 900])
    optimizer = torch.optim.AdamW(model.network.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = tuning.loss(x_0, condition, eps, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert model.network.conv_in.weight[:, 4:].abs().max() > 0
    model.eval()
    with torch.no_grad():
        null = keep_only(model, condition, (), 4)
        parted = model.denoise(x_0, t, condition) - model.denoise(x_0, t, null)
    assert parted.abs().max() > 0.1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda b, m: InstructPix2Pix.from_base(m), "starts from Stable Diffusion, got InstructPix2Pix"),
        (lambda b, m: InstructPix2Pix.from_base(b, resolution=18), "resolution must be a multiple of 4, got 18"),
        (lambda b, m: StableDiffusion(m.network, b.null_text, b.vae), "takes 4 input channels, this U-Net 8"),
        (lambda b, m: StableDiffusion(b.network, b.null_text), "give the autoencoder as vae, or name its space"),
        (lambda b, m: m.encode_condition({"image": torch.rand(1, 3, 8, 8), "text": [""]}), r"\(B, 3, 16, 16\)"),
        (lambda b, m: m.encode_condition({"image": torch.rand(1, 3, 16, 16), "text": "a"}), "list of prompts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(base, model, make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(base, model)


def test_a_model_without_its_encoders_says_so(base):
    alone = StableDiffusion(base.network, base.null_text, space=base.space)
    for call in (lambda: alone.decode(torch.zeros(1, 4, 8, 8)), lambda: alone.encode_pixels(torch.zeros(1, 3, 16, 16))):
        with pytest.raises(ValueError, match="came as a prior, without its autoencoder"):
            call()
    with pytest.raises(ValueError, match="came without its text encoder"):
        alone.encode_condition({"text": ["a hat"]})
    with pytest.raises(ValueError, match="load it without prior_only"):
        InstructPix2Pix.from_base(alone)
