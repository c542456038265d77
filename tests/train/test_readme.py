"""README's three ways to sample run as they are printed, and give the same picture."""

import re
import shlex
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_pipelines import shaken

from priorguide.sample.bundle import Bundle
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import Sampler
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.train.cli import main

README = Path(__file__).parents[2] / "README.md"


def test_the_three_ways_to_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = re.search(r"\n## Sampling from a bundle\n(.*?)\n## ", README.read_text(), re.DOTALL)[1]
    command, python, stock = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)
    model, base = InstructPix2Pix.tiny().eval(), StableDiffusion.tiny().eval()
    for seed, one in enumerate((model, base)):
        shaken(one.network, seed)
    guidance = Guidance((1.5, 4.0), unconditional(base, onto=model), refresh=2)
    Bundle.save("runs/instruct_pix2pix/bundle", model, guidance=guidance, sampler=Sampler("ddim", 4))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save("photo.png")
    for line in command.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "priorguide" and main(arguments) == 0
    names: dict = {}
    exec(python, names)
    exec(stock, names)
    written = [np.asarray(Image.open(path), float) for path in sorted(Path("winter").glob("*seed-0.png"))]
    pixels = 255 * names["pixels"][0].permute(1, 2, 0).numpy()
    assert len(written) == 1 and len(list(Path("winter").glob("*-seed-*.png"))) == 4
    for other in (written[0], np.asarray(names["picture"], float)):
        assert abs(pixels - other).max() <= 1
    unguided = names["bundle"].sample(names["condition"], [0], scales=[1.0, 1.0])
    assert (names["pixels"] - unguided).abs().max() > 0.05
    assert not torch.equal(names["pixels"], names["bundle"].sample(names["condition"], [1]))
