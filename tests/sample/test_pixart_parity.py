"""PixArt-alpha beside the original's own outputs."""

import re
import warnings

import parity
import pytest
import torch

from priorguide.sample.guidance import guide
from priorguide.sample.model import keep_only
from priorguide.sample.models.pixart import PixArt
from priorguide.sample.noise import add_noise


@pytest.fixture(scope="module", params=["pixart_256", "pixart_ms"])
def vectors(request):
    return parity.vectors(request.param)


def position_table(side, width, scale):
    """DiT's fixed table, with positions divided by `scale`: half the channels for the column, half for the row."""
    frequencies = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] / scale * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], 1).float()[None]


@pytest.fixture(scope="module")
def file(vectors, tmp_path_factory):
    """An original file, whose live weights are not the ones to sample with."""
    described = vectors.spec["networks"]["network"]
    sizes, weights = described["model"], vectors.weights("network")
    table = position_table(sizes["input_size"] // sizes["patch_size"], sizes["hidden_size"], sizes["lewei_scale"])
    assert list(table.shape) == described["computed"]["pos_embed"]["shape"]
    weights["pos_embed"] = table
    live = {name: tensor if name == "pos_embed" else torch.zeros_like(tensor) for name, tensor in weights.items()}
    file = tmp_path_factory.mktemp("pixart") / "original.pth"
    torch.save({"state_dict": live, "state_dict_ema": weights, "epoch": 3}, file)
    return file


@pytest.fixture(scope="module", params=["original file", "diffusers folder"])
def model(request, vectors, file, tmp_path_factory):
    heads = vectors.spec["networks"]["network"]["model"]["num_heads"]
    model = PixArt.from_pretrained(file, num_heads=heads, space="latents")
    if request.param == "diffusers folder":
        folder = tmp_path_factory.mktemp("pixart")
        model.network.save_pretrained(folder / "transformer")
        null = vectors.weights("network")["y_embedder.y_embedding"]
        model = PixArt.from_pretrained(folder, null_text=null, space="latents")
    return model.eval()


def caption(vectors):
    return {"text": vectors.io["y"][:, 0], "mask": vectors.io["mask"][:, 0, 0]}


@torch.no_grad()
def whole(model, vectors, condition):
    """All output channels."""
    parts = model.denoise_with_variance(vectors.io["x_t"], vectors.io["t"], condition)
    return torch.cat([part for part in parts if part is not None], 1)


def test_parity_weight_rule(vectors):
    weights = vectors.weights("network")
    for key, values in vectors.spec["networks"]["network"]["rule_check"].items():
        torch.testing.assert_close(weights[key].flatten()[:4], torch.tensor(values))


def test_parity_sizes_are_read_off_the_file(vectors, model):
    described, config = vectors.spec["networks"]["network"], model.network.config
    sizes = described["model"]
    named = {
        "sample_size": "input_size",
        "num_layers": "depth",
        "num_attention_heads": "num_heads",
        "patch_size": "patch_size",
        "in_channels": "in_channels",
        "caption_channels": "caption_channels",
        "interpolation_scale": "lewei_scale",
    }
    assert {own: config[own] for own in named} == {own: sizes[theirs] for own, theirs in named.items()}
    assert model.learned_range == sizes["pred_sigma"]
    assert model.null_text.shape == (1, sizes["model_max_length"], sizes["caption_channels"])
    parameters = sum(p.numel() for p in model.network.parameters())
    assert parameters + model.null_text.numel() == described["parameters"]


def test_parity_noise_schedule(vectors, model):
    io = vectors.io
    assert vectors.error(model.path.alphas_cumprod.float(), "alphas_cumprod") < 1e-6
    assert vectors.error(add_noise(io["x0"], io["noise"], *model.path.coefficients(io["t"])), "x_t") < 1e-5


def test_parity_size_conditions_are_the_sample_s_own(vectors, model):
    seen = []
    embed = model.network.adaln_single.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    whole(model, vectors, caption(vectors))
    embed.remove()
    assert torch.equal(seen[0]["resolution"], vectors.io["img_hw"])
    assert torch.equal(seen[0]["aspect_ratio"], vectors.io["aspect_ratio"])


def test_parity_null_text(vectors, model):
    null = keep_only(model, {}, frozenset(), len(vectors.io["y"]))
    assert vectors.error(null["text"][:, None], "y_null") == 0
    assert null["mask"].min() == 1


def test_parity_network_outputs(vectors, model):
    condition, tolerance = caption(vectors), parity.NETWORK_TOLERANCE
    null = model.null(condition)
    assert vectors.error(whole(model, vectors, condition), "out_cond") < tolerance
    assert vectors.error(whole(model, vectors, null), "out_null_full_mask") < tolerance
    assert (
        vectors.error(whole(model, vectors, {**condition, "text": null["text"]}), "out_null_caption_mask") < tolerance
    )


def test_parity_guided_prediction_with_the_authors_null(vectors, model):
    condition = caption(vectors)
    authors = {**condition, "text": model.null(condition)["text"]}
    with torch.no_grad():
        ladder = [model.denoise(vectors.io["x_t"], vectors.io["t"], part) for part in (authors, condition)]
    scale = float(re.search(r"\+ ([\d.]+) \(", vectors.spec["io"]["guided_eps_own"]["what"])[1])
    assert vectors.relative_error(guide(ladder, [scale]), "guided_eps_own") < parity.GUIDED_TOLERANCE
    ladder[0] = model.denoise(vectors.io["x_t"], vectors.io["t"], model.null(condition)).detach()
    assert vectors.relative_error(guide(ladder, [scale]), "guided_eps_own") > 0.01


def test_parity_live_weights_are_another_set(vectors, file):
    heads = vectors.spec["networks"]["network"]["model"]["num_heads"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live = PixArt.from_pretrained(file, weights="model", num_heads=heads, space="latents")
    assert whole(live, vectors, caption(vectors)).abs().max() == 0
