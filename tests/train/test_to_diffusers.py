"""`priorguide export BUNDLE --diffusers`: DiT in diffusers' own class, with the difference measured and told."""

import re

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel

from priorguide.sample.bundle import Bundle, Recorded
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import Sampler, sample
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dit_network import DiTNetwork
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.published import tiny_parts
from priorguide.train.cli import main

CLASSES, STEPS = 3, 25


def network(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES, **options}
    (made := DiTNetwork(**sizes)).initialise(zero_std=0.2)
    for parameter in made.t_embedder.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # so that the time matters
    return made.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A bundle of a DiT in latents with a prior, what `--diffusers` made of it, and what it said."""
    root = tmp_path_factory.mktemp("dit")
    vae = tiny_parts(4).vae
    model, base = DiT(network(), vae).eval(), DiT(network(1), vae).eval()
    guidance = Guidance((2.0,), unconditional(base, onto=model))
    sampler = Sampler(steps=STEPS, options={"timestep_spacing": "trailing"})
    recorded = Recorded.draw(model, {"label": torch.tensor([0, 2])}, [1, 2], guidance, sampler)
    provenance = {"class_names": ["a", "b", "c"]}
    options = {"guidance": guidance, "sampler": sampler, "recorded": recorded, "provenance": provenance}
    return Bundle.save(root / "bundle", model, **options), root / "stock"


@pytest.fixture(scope="module")
def said(folders):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", (lines := []).append)
        assert main(["export", str(folders[0]), "--diffusers", str(folders[1])]) == 0
    return lines[-1]


@torch.no_grad()
def test_the_stock_pipeline_makes_the_models_pictures(folders, said):
    """At the bundle's steps; the null is label 1000 there, and our third class row here."""
    bundle, pipeline = Bundle.load(folders[0]), DiTPipeline.from_pretrained(folders[1])
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.transformer) is DiTTransformer2DModel and pipeline.get_label_ids(["b"]) == [1]
    generator = torch.Generator().manual_seed(5)
    options = {"guidance_scale": 2.0, "num_inference_steps": STEPS, "generator": generator, "output_type": "pt"}
    stock = pipeline([0, 2], **options).images
    noise = torch.randn(2, *bundle.model.shape, generator=torch.Generator().manual_seed(5))
    condition, options = {"label": torch.tensor([0, 2])}, {"scheduler": bundle.scheduler, "steps": STEPS}
    own = bundle.model.decode(sample(bundle.model, condition, [0, 0], scales=[2.0], noise=noise, **options))
    assert own.std() > 0.01
    torch.testing.assert_close(own, stock, rtol=0, atol=2e-3)


def test_the_difference_is_told(said):
    found = re.search(
        r"differs .* by (\S+) of its size at the sampler's 25 times, by (\S+) at others, and 2 pict", said
    )
    assert found and float(found[1]) < 1e-4 < float(found[2]) < 1
    assert "holds a DiTPipeline, without the prior" in said


@torch.no_grad()
def test_without_the_fit_it_is_another_network(folders, said):
    model, stock = Bundle.load(folders[0]).model, DiTTransformer2DModel.from_pretrained(folders[1] / "transformer")
    own = model.network.state_dict()
    x, t, label = torch.randn(2, *model.shape), torch.tensor([959.0, 439.0]), torch.tensor([1, CLASSES])
    expected = model.network(x, t, label)

    def error():
        theirs = stock(x, t, torch.tensor([1, 1000])).sample
        return ((theirs - expected).square().mean() / expected.square().mean()).sqrt()

    assert error() < 1e-3
    for block in stock.transformer_blocks:
        block.norm1.emb.timestep_embedder.linear_1.weight.data = own["t_embedder.mlp.0.weight"]
    assert error() > 0.05


def test_it_is_read_back_as_ours_is(folders, said):
    """All of it but the time embedding's first layer, and the null rows in place of classes there are not."""
    own, back = Bundle.load(folders[0]).model.network, DiT.load_network(str(folders[1] / "transformer"))
    assert back.config["num_classes"] == 1000
    for name, tensor in back.state_dict().items():
        expected = own.state_dict()[name]
        if name == "y_embedder.embedding_table.weight":
            assert torch.equal(tensor[:CLASSES], expected[:-1])
            assert torch.equal(tensor[CLASSES:], expected[-1:].expand(1001 - CLASSES, -1))
        elif name != "t_embedder.mlp.0.weight":
            assert torch.equal(tensor, expected), name


def test_pixels_have_no_pipeline_but_a_network(tmp_path, capsys):
    folder = Bundle.save(tmp_path / "bundle", DiT(network(in_channels=1, learn_sigma=False)))
    assert main(["export", str(folder), "--diffusers", str(tmp_path / "stock")]) == 0
    assert "holds a DiTTransformer2DModel" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "stock").iterdir()} == {"transformer", "scheduler"}
    assert DiTTransformer2DModel.from_pretrained(tmp_path / "stock" / "transformer").config.out_channels == 1


def test_what_is_not_converted(tmp_path, capsys):
    folder = Bundle.save(tmp_path / "pixel", PixelUNet.tiny())
    wide = Bundle.save(tmp_path / "wide", DiT(network(num_classes=1001, in_channels=1)))
    for bundle, sentence in (
        (folder, "PixelUNet is not converted"),
        (tmp_path, "is no bundle: export the run first"),
        (wide, "it has no place for 1001 classes"),
    ):
        assert main(["export", str(bundle), "--diffusers", str(tmp_path / "out")]) == 1
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
