"""DynamiCrafter from a base, its conditions, its size, and its training, on tiny models."""

import math
from functools import partial

import pytest
import torch
from PIL import Image

from priorguide.sample.bundle import Bundle
from priorguide.sample.components import licences_of
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.latents import to_latents
from priorguide.sample.loop import Sampler, make_scheduler, sample
from priorguide.sample.models.dynamicrafter import DynamiCrafter
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.models.videocrafter import LICENCE, VideoCrafter
from priorguide.sample.open_clip import tiny_tower, tower_pixels
from priorguide.sample.video import filling
from priorguide.sample.video_network import VideoNetwork, text_attentions
from priorguide.train.adapters import Lora
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop

BASES = {"VideoCrafter1": VideoCrafter.tiny, "VideoCrafter2": partial(VideoCrafter.tiny, 0.7)}


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]().eval()


def started(base, **options):
    return DynamiCrafter.from_base(base, tiny_tower(), resolution=(16, 16), **options).eval()


@pytest.fixture(scope="module")
def model():
    return DynamiCrafter.tiny().eval()


def clips(rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(rows, 3, 4, 16, 16, generator=generator)
    return {"pixels": pixels, "image": pixels[:, :, 0], "text": ["a red square moves left", "rain"][:rows]}


def test_every_first_prediction_is_the_bases(base):
    model = started(base)
    condition = model.encode_condition({**clips(), model.rate: torch.tensor([3.0, 16.0])})
    own = base.encode_condition({"text": clips()["text"], "fps": torch.tensor([3.0, 16.0])})
    assert model.rate == ("fps" if base.always else "frame_stride") and model.path == base.path
    x_t, t = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([10, 800])
    with torch.no_grad():
        for ours, theirs in ((condition, own), (model.null(condition), base.null(own))):
            found, wanted = model.denoise(x_t, t, ours), base.denoise(x_t, t, theirs)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert found.std() > 0.1


def test_at_first_self_and_base_give_the_same_clip(base):
    model = started(base)
    condition = model.encode_condition({**clips(), model.rate: torch.tensor([3.0, 16.0])})
    options = {"scheduler": make_scheduler(model), "steps": 3, "scales": [1.5, 7.5], "eta": 1.0}
    own = sample(model, condition, [1, 2], **options)
    other = sample(model, condition, [1, 2], prior=unconditional(base, onto=model), **options)
    torch.testing.assert_close(other, own, rtol=0, atol=1e-4 * float(own.abs().max()))


def test_a_base_is_left_as_it_was_and_shares_no_weight(base):
    before = {name: tensor.clone() for name, tensor in base.network.state_dict().items()}
    model = started(base)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.network.state_dict().items())
    assert model.vae is base.vae and model.text_encoder is base.text_encoder


def test_bases_that_do_not_serve():
    with pytest.raises(ValueError, match="starts from VideoCrafter, got StableDiffusion"):
        DynamiCrafter.from_base(StableDiffusion.tiny(), tiny_tower())
    with pytest.raises(ValueError, match="give image_encoder"):
        DynamiCrafter.from_base(VideoCrafter.tiny())
    with pytest.raises(ValueError, match="multiples of 4, got 18 x 16"):
        DynamiCrafter.from_base(VideoCrafter.tiny(), tiny_tower(), resolution=(18, 16))
    with pytest.raises(ValueError, match="this network is DynamiCrafter's"):
        VideoCrafter(DynamiCrafter.tiny().network, torch.zeros(1, 8, 16), space="x")
    with pytest.raises(ValueError, match="this network is VideoCrafter's"):
        DynamiCrafter(VideoCrafter.tiny().network, torch.zeros(1, 8, 16), torch.zeros(1, 5, 16), space="x")


def test_frames_are_one_picture_or_two(model):
    batch = clips()
    frame = model.encode_condition(batch)["frame"]
    torch.testing.assert_close(frame, to_latents(model.vae, batch["image"])[:, :, None])  # scaled
    between = DynamiCrafter.tiny("512", interpolation=True).eval()
    both = between.encode_condition(batch)
    assert both["frame"].shape == (2, 4, 4, 8, 8) and not both["frame"][:, :, 1:3].any()
    torch.testing.assert_close(both["frame"][:, :, 3], to_latents(between.vae, batch["pixels"][:, :, -1]))
    given = between.encode_condition({**batch, "last": batch["image"]})["frame"]
    assert torch.equal(given[:, :, 0], given[:, :, 3])
    with pytest.raises(ValueError, match="interpolation needs the last picture"):
        between.encode_condition({name: part for name, part in batch.items() if name != "pixels"})
    with pytest.raises(ValueError, match=r"must have shape \(B, 3, 16, 16\), got \(2, 3, 8, 8\)"):
        model.encode_condition({**batch, "image": torch.zeros(2, 3, 8, 8)})


def test_the_picture_in_one_frame_is_seen_from_that_frame(model):
    """Each frame attends to its own tokens: changing those of one frame changes that frame's layer alone."""
    network = model.network
    layer = network.unet.get_submodule(text_attentions(network.unet)[0])
    hidden, context = torch.randn(2 * 4, 9, layer.query_dim), torch.randn(2 * 4, 5 + 64, 16)
    other = context.clone()
    other[:, 5 + 16 : 5 + 32] += 1  # the second frame's
    with torch.no_grad():
        apart = (layer(hidden, context) - layer(hidden, other)).abs().amax((1, 2)) > 0
    assert apart.tolist() == [False, True, False, False] * 2


def test_conditions_from_the_command_line(tmp_path, model):
    Image.new("RGB", (40, 30), (200, 10, 10)).save(file := tmp_path / "frame.png")
    batch = model.read_condition(image=str(file), text="a wave", frame_stride="5")
    assert batch["image"].shape == (1, 3, 16, 16) and batch["frame_stride"].tolist() == [5]
    assert model.encode_condition(batch)["frame_stride"].tolist() == [5]
    assert model.encode_condition(model.read_condition(image=str(file), text=""))["frame_stride"].tolist() == [3]
    later = DynamiCrafter.tiny("1024", interpolation=True)
    assert later.read_condition(image=str(file), last=str(file), text="x", fps="8")["last"].shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="text, image, last, and fps or not"):
        later.read_condition(image=str(file), text="x", fps="8")
    with pytest.raises(ValueError, match="frame_stride must be a whole number above 0, got '-1'"):
        model.read_condition(image=str(file), text="x", frame_stride="-1")
    prior = VideoCrafter.tiny(0.7)
    assert prior.read_condition(text="x", fps="24")["fps"].tolist() == [24]
    with pytest.raises(ValueError, match=r"\['text'\], got \['fps', 'text'\]"):
        VideoCrafter.tiny().read_condition(text="x", fps="24")


@pytest.mark.parametrize(("have", "size"), [((30, 40), (16, 16)), ((10, 90), (20, 32)), ((20, 32), (20, 32))])
def test_a_frame_is_filled(have, size):
    pixels = torch.rand(1, 1, *have)
    found = filling(pixels, size)
    assert found.shape == (1, 3, *size)
    if have == size:
        assert torch.equal(found, pixels.expand(-1, 3, -1, -1))


def test_what_the_tower_sees_keeps_plain_colours():
    grey = torch.full((1, 3, 300, 500), 0.5)
    found = tower_pixels(grey)
    assert found.shape == (1, 3, 224, 224)
    torch.testing.assert_close(found, found[..., :1, :1].expand_as(found), atol=1e-5, rtol=0)


def test_licences_go_on():
    base = VideoCrafter.tiny()
    base.licence = LICENCE
    model = started(base)
    assert model.licence == LICENCE
    with pytest.raises(ValueError, match="research only"):
        licences_of(model, base, restricted=False)
    assert licences_of(model, base, restricted=True)["prior"] == LICENCE


def test_a_bundle_with_a_prior_of_clips(tmp_path):
    base, model = VideoCrafter.tiny().eval(), DynamiCrafter.tiny().eval()
    guidance, sampler = Guidance((1.5, 7.5), unconditional(base, onto=model)), Sampler(steps=2, eta=1.0)
    Bundle.save(tmp_path / "bundle", model, guidance=guidance, sampler=sampler)
    folders = {path.name for path in (tmp_path / "bundle").iterdir() if path.is_dir()}
    wanted = {"unet", "unconditional_unet", "vae", "text_encoder", "tokenizer", "image_encoder", "scheduler"}
    assert folders == wanted
    loaded = Bundle.load(tmp_path / "bundle")
    batch = {**clips(), "frame_stride": torch.tensor([3, 3])}
    condition, again = model.encode_condition(batch), loaded.model.encode_condition(batch)
    assert all(torch.equal(again[name], condition[name]) for name in condition)
    own = sample(
        model,
        condition,
        [1, 2],
        scheduler=sampler.make(model),
        scales=(1.5, 7.5),
        steps=2,
        eta=1.0,
        prior=guidance.prior,
    )
    assert torch.equal(loaded.sample(condition, [1, 2]), model.decode(own))
    assert loaded.guidance.prior.model.vae is None


def test_an_adapter_trains_what_is_new_in_full():
    model = started(VideoCrafter.tiny())
    FineTune(model, lora=Lora(rank=2), ema_decay=0)
    trained = {name for name, p in model.network.named_parameters() if p.requires_grad}
    for name in ("image_projection.latents", "image_attention.0.to_v_ip.weight", "image_attention.0.alpha"):
        assert name in trained
    adapted = {name for name in trained if "lora_A" in name}
    assert adapted and all(name.startswith("unet.") for name in adapted) and "unet.conv_out.weight" not in trained


def test_overfitting_one_batch_parts_condition_and_null():
    torch.manual_seed(0)
    model = started(VideoCrafter.tiny())
    batch = {**clips(1), "frame_stride": torch.tensor([4])}
    tune = FineTune(model, [Drop(("image", "text"), 0.1)], ema_decay=0)
    x_0, condition = model.encode(batch)
    null, t = model.null(condition), torch.tensor([600])
    optimiser = torch.optim.Adam(model.network.parameters(), 1e-2)
    tune.train()
    losses = []
    for step in range(24):
        given = condition if step % 2 else null
        # The null's target is another: the two must part to fit both.
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(step % 2))
        loss = tune.loss(x_0, given, eps, t).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    tune.eval()
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    with torch.no_grad():
        x_t = torch.randn(1, *model.shape)
        apart = model.denoise(x_t, t, condition) - model.denoise(x_t, t, null)
    assert apart.abs().max() > 1e-2


def test_full_size():
    """The published sizes (the authors' config: 320 x [1, 2, 4, 4], contexts of 1024, heads of 64, 16 frames, a
    resampler 4 deep). The U-Net is diffusers' own but for the picture's keys and values, counted here by hand."""
    projection = {"hidden_dims": 1024, "depth": 4, "heads": 12, "dim_head": 64, "ffn_ratio": 4}
    with torch.device("meta"):
        plain = VideoNetwork(temporal_conv=True, rate=False)
        network = VideoNetwork(in_channels=8, rate=True, image_width=1280, projection=projection, learned_gain=True)
        first = VideoNetwork(temporal_conv=False, relative=16)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    layers = [320] * 5 + [640] * 5 + [1280] * 6
    image = 2 * 1024 * sum(layers) + len(layers)
    rate = 320 * 1280 + 1280 + 1280 * 1280 + 1280
    frame = 4 * 320 * 9
    assert count(network.unet) == count(plain.unet) + rate + frame
    assert count(network.image_attention) == image
    block = 4 * 1024 * 768 + 2 * 1024 * 4096 + 3 * 2 * 1024
    ends = 1280 * 1024 + 1024 + 1024 * 1024 + 1024 + 2 * 1024 + 256 * 1024
    assert count(network.image_projection) == 4 * block + ends
    tables = 2 * 33 * 64 * 2 * 17
    convolutions = [4 * (3 * w * w + w) + 4 * 2 * w for w in (*[320] * 5, *[640] * 5, *[1280] * 12)]
    assert count(first) == count(plain) - sum(convolutions) + tables
    assert math.isclose(count(network), 1.44e9, rel_tol=0.05)
    model = DynamiCrafter(network, torch.empty(1, 77, 1024), torch.empty(1, 257, 1280), space="latents")
    assert model.shape == (4, 16, 32, 32)
