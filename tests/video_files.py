"""Files in VideoCrafter's and DynamiCrafter's published layout, from the parity vectors."""

import re

import torch

from priorguide.sample.models.dynamicrafter import DynamiCrafter
from priorguide.sample.models.videocrafter import VideoCrafter


def contents(vectors, network):
    """A network's tensors, and its schedule's tables as the spec computes them."""
    described = vectors.spec["networks"][network]
    state = {**vectors.weights(network)}
    for name, table in described["computed"].items():
        state[name] = torch.zeros(table["shape"])
    state["alphas_cumprod"] = vectors.io["alphas_cumprod"].clone()
    if "scale_arr" in state:
        least, over = re.match(r"linspace\(1, ([\d.]+), (\d+)\)", described["schedule"]["scale_arr"]).groups()
        state["scale_arr"] = torch.full_like(state["scale_arr"], float(least))
        state["scale_arr"][: int(over)] = torch.linspace(1, float(least), int(over))
    return state


def resolution(vectors):
    return tuple(vectors.io["video"].shape[-2:])


def dynamicrafter(vectors, path, network="finetuned", **options):
    described = vectors.spec["networks"][network]
    tower = described["open_clip_vision"]
    return DynamiCrafter.from_pretrained(
        path,
        resolution=resolution(vectors),
        interpolation="interp" in described["name"],
        projection_heads=described["resampler"]["heads"],
        text_heads=described["open_clip_text"]["heads"],
        image_heads=tower["width"] // tower["head_width"],
        **options,
    ).eval()


def videocrafter(vectors, path, network="finetuned", **options):
    described = vectors.spec["networks"][network]
    return VideoCrafter.from_pretrained(
        path,
        resolution=resolution(vectors),
        frames=described["unet"]["temporal_length"],
        text_heads=described["open_clip_text"]["heads"],
        **options,
    ).eval()


SPACINGS = {
    "uniform": {"timestep_spacing": "leading", "steps_offset": 1},
    "uniform_trailing": {"timestep_spacing": "trailing"},
}
"""A spec's words for a sampler's timesteps, as DDIM's options."""
