"""Bundles in diffusers: the stock pipeline where there is one, and every component of a stock class."""

import json

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_bundle import forge, refused
from test_bundle_forms import SYSTEMS, adapt, tiny

from priorguide.sample.bundle import Bundle
from priorguide.sample.candidates import with_network
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.kept import same_tensors
from priorguide.sample.loop import Sampler
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.seeds import SeededNoise

SAMPLER = Sampler(steps=4, options={"timestep_spacing": "trailing"})
PROMPTS = ["make it blue", "at night"]


def pictures_of(bundle, pipeline, images):
    """What the bundle makes, and what the stock pipeline makes of the same noise, pictures and prompts."""
    pipeline.set_progress_bar_config(disable=True)
    model = bundle.model
    batch = {"text": PROMPTS} if images is None else {"text": PROMPTS, "image": images}
    own = bundle.sample(model.encode_condition(batch), [3, 4])
    scales = bundle.guidance.scales
    options = {"num_inference_steps": 4, "latents": SeededNoise([3, 4], model.shape).draw(), "output_type": "pt"}
    if images is None:
        side = images_side(model)
        return own, pipeline(PROMPTS, guidance_scale=scales[0], height=side, width=side, **options).images
    options |= {"image_guidance_scale": scales[0], "guidance_scale": scales[1]}
    return own, pipeline(PROMPTS, image=images, **options).images


def images_side(model):
    return model.shape[-1] * 2


def test_an_instruct_pix2pix_bundle_opens_as_its_stock_pipeline_with_equal_pictures(tmp_path):
    model = tiny(InstructPix2Pix)
    base = tiny(StableDiffusion, 1)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name, prior in (("self", None), ("base", unconditional(base, onto=model))):
        folder = Bundle.save(tmp_path / name, model, guidance=Guidance((1.5, 5.0), prior), sampler=SAMPLER)
        pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
        own, stock = pictures_of(Bundle.load(folder), pipeline, images)
        equal = (own - stock).abs().max() < 1e-4
        assert own.std() > 0.01 and equal == (prior is None)  # the stock pipeline has no prior


def test_an_adapters_bundle_opens_as_the_stock_pipeline_and_its_adapter(tmp_path):
    base = tiny(InstructPix2Pix)
    adapter = adapt(base.network)
    model = with_network(base, adapter.merged())
    folder = Bundle.save(tmp_path / "a", model, guidance=Guidance((1.5, 5.0)), sampler=SAMPLER, adapter=adapter)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    bundle, pipeline = Bundle.load(folder), diffusers.DiffusionPipeline.from_pretrained(folder)
    own, bare = pictures_of(bundle, pipeline, images)
    assert (own - bare).abs().max() > 0.01
    pipeline.load_lora_weights(folder)
    own, stock = pictures_of(bundle, pipeline, images)
    torch.testing.assert_close(own, stock, atol=1e-4, rtol=0)


def test_a_stable_diffusion_bundle_opens_as_its_stock_pipeline(tmp_path):
    folder = Bundle.save(tmp_path / "sd", tiny(StableDiffusion), guidance=Guidance((4.0,)), sampler=SAMPLER)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is diffusers.StableDiffusionPipeline
    own, stock = pictures_of(Bundle.load(folder), pipeline, None)
    torch.testing.assert_close(own, stock, atol=1e-4, rtol=0)


def test_a_model_alone_opens_too(tmp_path):
    folder = Bundle.save(tmp_path / "sd", tiny(StableDiffusion))
    assert type(diffusers.DiffusionPipeline.from_pretrained(folder).scheduler) is diffusers.DDIMScheduler
    assert Bundle.load(folder).scheduler is None


@pytest.mark.parametrize("kind", SYSTEMS.values(), ids=SYSTEMS.keys())
def test_every_stock_component_loads_by_itself(kind, tmp_path):
    folder = Bundle.save(tmp_path / "bundle", tiny(kind))
    stock = {}
    for place in sorted(path for path in folder.iterdir() if (path / "config.json").is_file()):
        config = json.loads((place / "config.json").read_text())
        name = config["_class_name"] if "_class_name" in config else config["architectures"][0]
        found = getattr(diffusers, name, None) or getattr(transformers, name, None)
        if found is not None:
            stock[place.name] = found.from_pretrained(place, use_safetensors=True)
            stored = load_file(next(place.glob("*.safetensors")))
            state = stock[place.name].state_dict()
            assert same_tensors({k: state[k] for k in stored}, stored)
    ours = type(tiny(kind).network).__module__.startswith("priorguide.")
    assert (tiny(kind).network_name in stock) != ours
    assert all(name in stock for name in ("vae", "text_encoder") if (folder / name).is_dir())
    if (folder / "model_index.json").is_file():
        assert diffusers.DiffusionPipeline.from_pretrained(folder).components["vae"] is not None


def test_an_index_that_leads_elsewhere_is_refused(tmp_path):
    folder = Bundle.save(tmp_path / "sd", tiny(StableDiffusion))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["os", "system"]}))
    forge(folder)
    assert "only diffusers and transformers are known" in refused(Bundle.load, folder)
