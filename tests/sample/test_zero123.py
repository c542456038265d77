"""Zero-1-to-3 and SD image variations on tiny random weights: beside the stock pipeline, from bases, in bundles."""

import math
import warnings

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionImageVariationPipeline, UNet2DConditionModel
from PIL import Image

from priorguide.sample.bundle import Bundle, Recorded
from priorguide.sample.clip_image import clip_pixels
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import Sampler, make_scheduler, sample
from priorguide.sample.model import keep_only
from priorguide.sample.models.image_variations import ImageVariations
from priorguide.sample.models.pixart import PixArt
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.models.zero123 import Zero123, camera_move, with_projection
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop

TABLE = [Drop(("clip",), 0.05), Drop(("clip", "image"), 0.05), Drop(("image",), 0.05)]


def draw(*shape, seed=2):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return ImageVariations.tiny().eval()


@pytest.fixture(scope="module")
def model(base):
    """A fine-tune that has moved: everything is shaken, the new channels and the pose's columns too."""
    torch.manual_seed(1)
    found = Zero123.from_base(base, resolution=16)
    with torch.no_grad():
        for parameter in found.network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return found.eval()


@pytest.fixture(scope="module")
def batch():
    angle = torch.tensor([0.3, -2.0])
    return {"image": draw(2, 3, 16, 16), "pose": camera_move(angle / 4, angle, angle / 10)}


@pytest.fixture(scope="module")
def condition(model, batch):
    return model.encode_condition(batch)


@torch.no_grad()
def predict(model, condition):
    return model.denoise(draw(2, *model.shape, seed=3), torch.tensor([900, 200]), condition)


def test_the_stock_pipeline_of_image_variations_is_equalled(base, batch, tmp_path):
    scheduler = DDIMScheduler(**base.path.scheduler_config(), steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    parts = (base.vae, base.image_encoder, base.network, scheduler, None, None, False)
    pipe = StableDiffusionImageVariationPipeline(*parts)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *base.shape, generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
    pictures = clip_pixels(batch["image"], base.image_encoder.config.image_size)
    expected = pipe(pictures, height=16, width=16, **options).images
    pipe.save_pretrained(tmp_path)
    again = ImageVariations.from_pretrained(tmp_path, resolution=16).eval()
    for model in (base, again):
        condition = model.encode_condition({"image": batch["image"]})
        found = sample(model, condition, [0, 1], scheduler=scheduler, scales=[3.0], steps=4, noise=noise)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    alone = ImageVariations.from_pretrained(tmp_path, resolution=16, prior_only=True)
    assert alone.vae is None and alone.image_encoder is None and alone.space == base.space
    with pytest.raises(ValueError, match="takes 8 input channels, this U-Net 4"):
        Zero123.from_pretrained(tmp_path, resolution=16)


def test_at_the_start_every_prediction_is_the_base_s(base, batch):
    model = Zero123.from_base(base, resolution=16).eval()
    condition = model.encode_condition(batch)
    own = {"clip": condition["clip"]}
    torch.testing.assert_close(predict(model, condition), predict(base, own), rtol=0, atol=1e-5)
    torch.testing.assert_close(predict(model, model.null(condition)), predict(base, base.null(own)), rtol=0, atol=1e-5)
    arguments = {"scheduler": make_scheduler(model), "scales": [3.0], "steps": 4}
    guided = [sample(model, condition, [0, 1], prior=p, **arguments) for p in (None, unconditional(base, onto=model))]
    torch.testing.assert_close(*guided, rtol=0, atol=1e-5 * float(guided[0].abs().max()))
    with torch.no_grad():
        model.network.conv_out.weight.zero_()
    differ = {name for name, p in model.network.named_parameters() if name.startswith(model.added)}
    assert differ == {"conv_in.weight", "conv_in.bias", "encoder_hid_proj.weight", "encoder_hid_proj.bias"}
    assert base.network.conv_out.weight.any() and base.network.config["in_channels"] == 4


def test_from_stable_diffusion_there_is_a_gap(base):
    """Its null is a text of many tokens, the fine-tune's one token of zeros: the first predictions differ."""
    torch.manual_seed(0)
    other = StableDiffusion.tiny().eval()
    model = Zero123.from_base(other, base.image_encoder, resolution=16).eval()
    own, theirs = (predict(found, keep_only(found, {}, (), 2)) for found in (model, other))
    gap = float((own - theirs).abs().max() / theirs.abs().max())
    assert 1e-4 < gap < 1  # with these random weights, whose attention says little; what it is for real ones is open
    zeros = {"text": torch.zeros(2, 1, 16)}
    torch.testing.assert_close(own, predict(other, zeros), rtol=0, atol=1e-5)  # all of the gap is the context's


def test_the_pose_is_never_dropped(model, condition):
    null = model.null(condition)
    assert torch.equal(null["pose"], condition["pose"]) and not null["clip"].any() and not null["image"].any()
    moved = {**null, "pose": null["pose"].flip(0)}
    assert (predict(model, null) - predict(model, moved)).abs().max() > 1e-4
    bare = model.without_context()
    assert torch.equal(predict(bare, null), predict(bare, moved))
    assert bare.network.conv_out.weight.data_ptr() == model.network.conv_out.weight.data_ptr()
    with pytest.raises(ValueError, match=r"drop-out names \['pose'\], but the model's parts are \['clip', 'image'\]"):
        FineTune(model, [Drop(("pose",), 0.1)])


def test_priors_of_other_kinds(base, model, condition):
    """Those that know nothing of views or poses: by text, on another schedule, and the authors' own null."""
    torch.manual_seed(5)
    text, other = StableDiffusion.tiny(), PixArt.tiny()
    priors = [
        base,
        model.without_context(),
        StableDiffusion(text.network, text.null_text, space=model.space),
        StableDiffusion(text.network, text.null_text, space=model.space, prediction="v_prediction"),
        PixArt(other.network, other.null_text, space=model.space),
    ]
    arguments = {"scheduler": make_scheduler(model), "scales": [3.0], "steps": 3}
    found = [sample(model, condition, [0, 1], **arguments)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PixArt's noise ends elsewhere, which is said
        found += [
            sample(model, condition, [0, 1], prior=unconditional(p.eval(), onto=model), **arguments) for p in priors
        ]
    assert all(x.isfinite().all() for x in found)
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(found) for b in found[:i])


def test_full_size():
    """As published: 859,532,484 parameters in the U-Net and 772 x 768 + 768 in the projection; ViT-L/14 303,966,208."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        network = with_projection(unet, torch.empty(768, 772), torch.empty(768))
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, patch_size=14, projection_dim=768))
    model = Zero123(network, image_encoder=encoder, space="latents")
    assert sum(p.numel() for p in model.network.parameters()) == 859_532_484 + 772 * 768 + 768
    assert sum(p.numel() for p in encoder.parameters()) == 303_966_208
    assert model.shape == (4, 32, 32) and {n: p.shape[1:] for n, p in model.null({}).items()}["clip"] == (768,)


def test_a_bundle_with_views(base, model, batch, condition, tmp_path):
    guidance, sampler = Guidance((3.0,), unconditional(base, onto=model)), Sampler(steps=3, eta=1.0)
    recorded = Recorded.draw(model, condition, [5, 6], guidance, sampler)
    Bundle.save(tmp_path / "bundle", model, guidance=guidance, sampler=sampler, recorded=recorded)
    folders = {path.name for path in (tmp_path / "bundle").iterdir() if path.is_dir()}
    assert folders == {"unet", "unconditional_unet", "vae", "image_encoder", "scheduler"}
    loaded = Bundle.load(tmp_path / "bundle")
    assert loaded.replay().identical and loaded.guidance.prior.model.vae is None
    again = loaded.model.encode_condition(batch)
    assert all(torch.equal(again[name], condition[name]) for name in condition)


def test_moves_from_the_command_line(model, tmp_path):
    Image.new("RGB", (30, 20), (9, 99, 199)).save(file := tmp_path / "photo.png")
    one = model.encode_condition(model.read_condition(image=str(file), azimuth="90", polar="-30", radius="0.5"))
    assert {name: len(part) for name, part in one.items()} == {"image": 1, "clip": 1, "pose": 1}
    expected = torch.tensor([[-math.pi / 6, 1, 0, 0.5]])
    torch.testing.assert_close(one["pose"], expected, rtol=0, atol=1e-6)
    table = model.encode_condition(model.read_condition(image=str(file), azimuth="0:360:30", polar="10"))
    assert {len(part) for part in table.values()} == {12}
    turned = torch.atan2(table["pose"][:, 1], table["pose"][:, 2]).rad2deg() % 360
    torch.testing.assert_close(turned, torch.arange(0.0, 360, 30), rtol=0, atol=1e-4)
    assert model.read_condition(image=str(file))["pose"].tolist() == [[0, 0, 1, 0]]
    spiral = model.read_condition(image=str(file), azimuth="0:-90:-30", polar="0:30:10")["pose"]
    torch.testing.assert_close(spiral[2], camera_move(*torch.tensor([[20.0], [-60], [0]]).deg2rad())[0])
    for wrong, sentence in (
        ({"azimuth": "30"}, "conditions to give are image, and any of polar, azimuth, radius"),
        ({"image": str(file), "elevation": "30"}, r"got \['elevation', 'image'\]"),
        ({"image": str(file), "azimuth": "left"}, "azimuth must be a number, or first:stop:step"),
        ({"image": str(file), "azimuth": "0:360:0"}, "azimuth must be a number, or first:stop:step"),
        ({"image": str(file), "radius": "inf"}, "radius must be a number"),
        ({"image": str(file), "azimuth": "0:360:30", "polar": "0:30:10"}, "polar 3, azimuth 12, radius 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model.read_condition(**wrong)


def test_it_learns_one_batch_and_its_null_parts_from_the_condition(base, batch):
    torch.manual_seed(4)
    model = Zero123.from_base(base, resolution=16)
    tuning = FineTune(model, TABLE, lr_multipliers={"encoder_hid_proj": 10}, ema_decay=0)
    with torch.no_grad():
        x_0, condition = model.eval().encode({"pixels": 1 - batch["image"], **batch})
    model.train()
    eps, t = torch.randn_like(x_0), torch.tensor([300, 700])
    parameters = dict(model.network.named_parameters())
    faster = [p for name, p in parameters.items() if next(iter(tuning.lr_multipliers)) in name]
    rest = [p for p in parameters.values() if not any(p is other for other in faster)]
    assert [tuple(p.shape) for p in faster] == [(16, 20), (16,)]
    optimizer = torch.optim.AdamW([{"params": faster, "lr": 1e-1}, {"params": rest, "lr": 1e-2}])
    losses = []
    for _ in range(60):
        loss = tuning.loss(x_0, condition, eps, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    moved = model.network.encoder_hid_proj.weight[:, -4:]
    assert moved.abs().max() > 0 and model.network.conv_in.weight[:, 4:].abs().max() > 0  # both began at zero
    model.eval()
    assert (predict(model, condition) - predict(model, model.null(condition))).abs().max() > 0.1


def test_the_config_steps_where_the_authors_do():
    """Their 50 timesteps 1 + 20 k without the noisiest, by steps of 20 to alpha-bar of 0."""
    from importlib.resources import files

    content = yaml.safe_load((files("priorguide.configs") / "zero123.yaml").read_text())
    (comparison,) = [c for c in content["trainer"]["callbacks"] if c["class_path"].endswith("PriorComparison")]
    sampler = Sampler(**comparison["init_args"]["sampler"])
    scheduler = sampler.make(Zero123.tiny())
    scheduler.set_timesteps(sampler.steps)
    assert scheduler.timesteps.tolist() == [1 + 20 * k for k in range(50)][-2::-1]
    assert scheduler.config.num_train_timesteps // sampler.steps == 20 and sampler.eta == 1
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]


def test_files_are_told_by_their_shapes():
    unet, tower = "model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.model.visual.proj"
    views = {unet: (320, 8, 3, 3), tower: (1024, 768), "cc_projection.weight": (768, 772)}
    plain = {unet: (320, 4, 3, 3), tower: (1024, 768), "model_ema.diffusion_modelout2bias": (4,)}
    assert Zero123.recognise(views) == "Zero-1-to-3, one set of weights"
    assert ImageVariations.recognise(plain) == "SD image variations, live and averaged weights"
    assert Zero123.recognise(plain) is ImageVariations.recognise(views) is StableDiffusion.recognise(plain) is None
    assert Zero123.recognise({unet: (320, 8, 3, 3), tower: (1024, 768)}) is None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda b, m, c: Zero123.from_base(m), "starts from ImageVariations or StableDiffusion, got Zero123"),
        (lambda b, m, c: Zero123.from_base(b, resolution=18), "resolution must be a multiple of 4, got 18"),
        (lambda b, m, c: Zero123.from_base(ImageVariations(b.network, space="x")), "came without its encoders"),
        (lambda b, m, c: Zero123.from_base(StableDiffusion.tiny()), "and give image_encoder"),
        (lambda b, m, c: Zero123(b.network, b.vae), "takes 8 input channels, this U-Net 4"),
        (lambda b, m, c: ImageVariations(m.network, b.vae), "takes 4 input channels, this U-Net 8"),
        (lambda b, m, c: m.encode_condition({**c, "image": draw(2, 3, 8, 8)}), r"shape \(B, 3, 16, 16\)"),
        (lambda b, m, c: m.encode_condition({**c, "pose": draw(2, 3)}), r"pose must have shape \(B, 4\)"),
        (lambda b, m, c: m.encode_condition({"image": c["image"], "pose": c["pose"]}), "needs its CLIP embedding too"),
        (lambda b, m, c: b.read_condition(clip="0"), r"the conditions to give are \['image'\], got \['clip'\]"),
        (
            lambda b, m, c: ImageVariations(b.network, b.vae).encode_condition({"image": draw(1, 3, 16, 16)}),
            "came without its image encoder",
        ),
    ],
)
def test_what_does_not_fit_is_refused(base, model, condition, make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(base, model, condition)


def test_a_folder_without_a_projection_is_no_zero123(base, tmp_path):
    wide = {name: value for name, value in base.network.config.items() if not name.startswith("_")} | {"in_channels": 8}
    for name, part in (
        ("unet", UNet2DConditionModel(**wide)),
        ("vae", base.vae),
        ("image_encoder", base.image_encoder),
    ):
        part.save_pretrained(tmp_path / name)
    make_scheduler(base).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"has no projection of embedding and pose .* it is no Zero-1-to-3"):
        Zero123.from_pretrained(tmp_path, resolution=16)
    (tmp_path / "cc_projection").mkdir()
    with pytest.raises(ValueError, match="cc_projection holds no weights"):
        Zero123.from_pretrained(tmp_path, resolution=16)
    torch.save({"projection.weight": torch.zeros(16, 20)}, tmp_path / "cc_projection" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="does not fit Linear: it lacks bias"):
        Zero123.from_pretrained(tmp_path, resolution=16)
