"""The code of docs/serving.md runs as it is printed."""

import re
from pathlib import Path

import torch
from PIL import Image
from tiny_pipelines import shaken

from priorguide.sample import pipeline_table
from priorguide.sample.bundle import Bundle
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import Sampler
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.stable_diffusion import StableDiffusion

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_page_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline_table, "PIPELINES", dict(pipeline_table.PIPELINES))
    model, base = InstructPix2Pix.tiny().eval(), StableDiffusion.tiny().eval()
    shaken(model.network, 1)
    guidance = Guidance((1.5, 4.0), unconditional(base, onto=model))
    Bundle.save("bundle", model, guidance=guidance, sampler=Sampler("ddim", 3))
    Image.new("RGB", (16, 16), (200, 90, 30)).save("photo.png")
    first, second, third = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    exec(first, names)
    assert Image.open("winter.png").size == (16, 16)
    bundle = Bundle.load("bundle")
    photo = torch.tensor((200, 90, 30)).reshape(1, 3, 1, 1).expand(1, 3, 16, 16) / 255
    condition = bundle.model.encode_condition({"image": photo, "text": ["make it winter"]})
    latents = {"generator": [torch.Generator().manual_seed(0)], "output_type": "pt"}
    stock = names["pipe"]("make it winter", image=Image.open("photo.png"), **latents).images
    torch.testing.assert_close(stock.float(), bundle.sample(condition, [0]), rtol=1e-3, atol=1e-3)
    self_guided = bundle_without_prior(bundle)
    names["pipe"] = self_guided.pipeline()
    exec(second, names)
    assert names["picture"].size == (16, 16)
    exec(third, names)
    assert "MyPipeline" in pipeline_table.PIPELINES


def bundle_without_prior(bundle):
    import dataclasses

    return dataclasses.replace(bundle, guidance=dataclasses.replace(bundle.guidance, prior=None))
