"""DiT: its contract, its start, its files, its sizes, and the stock pipeline beside it.

Its parity with the original is in test_dit_parity.py.
"""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file

from priorguide.sample.guidance import unconditional
from priorguide.sample.latents import latent_space
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.model import keep_only
from priorguide.sample.models import find
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dit_network import DiTNetwork, network_from_state, published
from priorguide.sample.models.pixel import PixelUNet


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DiT.tiny().eval()


def small(**sizes):
    """A tiny network of other sizes, without zeros at its start."""
    network = DiTNetwork(**{"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3, **sizes})
    network.initialise(zero_std=0.2)
    return network.eval()


def autoencoder(seed=0, **options):
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **options,
    )


@torch.no_grad()
def predict(model, label, seed=1, batch=4):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, *model.shape, generator=generator)
    t = torch.tensor([999.0, 600.5, 20.0, 0.0])[:batch]
    return model.denoise(x_t, t, {"label": label} if model.num_classes else {})


def null_label(model, batch=4):
    return keep_only(model, {}, frozenset(), batch)["label"]


def test_batch_becomes_x_0_and_a_condition(model):
    batch = {"pixels": torch.rand(2, 1, 8, 8), "label": torch.tensor([0, 2])}
    x_0, condition = model.encode(batch)
    torch.testing.assert_close(x_0, batch["pixels"] * 2 - 1)
    torch.testing.assert_close(model.decode(x_0), batch["pixels"])
    assert condition["label"].tolist() == [0, 2]
    assert model.space == "pixels in [-1, 1]"
    with pytest.raises(ValueError, match=r"shape \(1, 8, 9\), the network takes \(1, 8, 8\)"):
        model.encode({"pixels": torch.rand(2, 1, 8, 9), "label": torch.tensor([0, 2])})


def test_null_is_the_last_row_and_idempotent(model):
    null = model.null({"label": torch.tensor([0, 2])})
    assert null["label"].tolist() == [3, 3]
    assert torch.equal(model.null(null)["label"], null["label"])
    assert model.null({})["label"].tolist() == [3]


def test_label_matters_and_a_dropped_one_does_not(model):
    first, second = predict(model, torch.tensor([0, 0, 0, 0])), predict(model, torch.tensor([1, 1, 1, 1]))
    dropped = predict(model, torch.tensor([0, 3, 0, 3]))
    null = predict(model, null_label(model))
    assert (first - second).abs().amax((1, 2, 3)).min() > 1e-3
    assert (first - null).abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(dropped[1::2], null[1::2])
    torch.testing.assert_close(dropped[::2], first[::2])


@torch.no_grad()
def test_a_batch_equals_its_singles(model):
    x_t, t, label = torch.randn(3, *model.shape), torch.tensor([900.0, 400.0, 3.0]), torch.tensor([0, 2, 3])
    together = model.denoise(x_t, t, {"label": label})
    for i in range(3):
        torch.testing.assert_close(
            model.denoise(x_t[i : i + 1], t[i : i + 1], {"label": label[i : i + 1]})[0], together[i]
        )


def test_learned_variance_is_the_second_half(model):
    x_t, t, condition = torch.randn(1, *model.shape), torch.tensor([500.0]), {"label": torch.tensor([1])}
    with torch.no_grad():
        prediction, v = model.denoise_with_variance(x_t, t, condition)
        assert torch.equal(torch.cat([prediction, v], 1), model.network(x_t, t, condition["label"]))
        assert torch.equal(prediction, model.denoise(x_t, t, condition))
    assert prediction.shape == v.shape == x_t.shape and model.learned_range
    without = DiT.create(8, channels=1, width=32, depth=1, num_heads=2)
    assert without.denoise_with_variance(x_t, t, {})[1] is None and not without.learned_range


@torch.no_grad()
def test_starts_as_the_identity_with_a_zero_output():
    network = DiT.create(8, num_classes=3, channels=3, width=32, depth=2, num_heads=2).network
    tokens, embedding = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in network.blocks:
        assert torch.equal(block(tokens, embedding), tokens)
    assert network(torch.randn(2, 3, 8, 8), torch.tensor([5.0, 900.0]), torch.tensor([0, 3])).abs().max() == 0
    assert 0.01 < network.y_embedder.embedding_table.weight.std() < 0.03


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = small()
        if checkpointing:
            network.enable_gradient_checkpointing()
        torch.manual_seed(1)
        network.train()(
            torch.randn(2, 4, 8, 8), torch.tensor([5.0, 900.0]), torch.tensor([0, 3])
        ).square().sum().backward()
        gradients.append(network.blocks[0].attn.qkv.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("num_classes", [0, 2, 7])
def test_from_base_starts_at_the_base_s_unconditional_prediction(model, num_classes):
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    tuned = DiT.from_base(model, num_classes).eval()
    label = null_label(tuned) if num_classes else None
    assert torch.equal(predict(tuned, label), predict(model, null_label(model)))
    assert tuned.num_classes == num_classes and tuned.space == model.space
    assert unconditional(model, onto=tuned).condition({"label": torch.zeros(1)}, 4)["label"].tolist() == [3] * 4
    tuned.network.y_embedder.embedding_table.weight.data.zero_()
    tuned.network.blocks[0].attn.qkv.weight.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())


def test_from_base_spreads_new_rows_about_the_null_as_the_bases_own(model):
    torch.manual_seed(0)
    base = DiT.create(input_size=8, channels=1, num_classes=500, width=32, depth=1, num_heads=2)
    base.network.y_embedder.embedding_table.weight.data.normal_(3, 0.7)
    unconditional_base = DiT.create(input_size=8, channels=1, width=32, depth=1, num_heads=2)
    for start, options, std in ((base, {}, 0.7), (base, {"row_std": 0.3}, 0.3), (unconditional_base, {}, 1.0)):
        rows = DiT.from_base(start, 200, **options).network.y_embedder.embedding_table.weight
        assert (rows[:-1] - rows[-1]).std().item() == pytest.approx(std, rel=0.05)
    with pytest.raises(ValueError, match="starts from a DiT, got PixelUNet"):
        DiT.from_base(PixelUNet.tiny())


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_saves_and_loads(model, tmp_path, shard):
    model.network.save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard == "20KB")
    label = torch.tensor([0, 1, 2, 3])
    for folder in (tmp_path, tmp_path / "transformer"):
        assert torch.equal(predict(DiT.from_pretrained(folder).eval(), label), predict(model, label))
    loaded = find("DiT").from_components(DiT.load_network(str(tmp_path / "transformer")), **model.config())
    assert torch.equal(predict(loaded.eval(), label), predict(model, label))
    assert loaded.config() == model.config()


def test_reads_original_files(model, tmp_path):
    other = small(in_channels=1)
    live, averaged = other.state_dict(), model.network.state_dict()
    files = {name: tmp_path / name for name in ("flat.pt", "flat.safetensors", "old.pt", "all.pt")}
    torch.save(averaged, files["flat.pt"])
    save_file(averaged, files["flat.safetensors"])
    torch.save(averaged, files["old.pt"], _use_new_zipfile_serialization=False)
    arguments = argparse.Namespace(model="DiT-XL/2", lr=1e-4)
    torch.save({"model": live, "ema": averaged, "opt": {"state": {}}, "args": arguments}, files["all.pt"])
    label = torch.tensor([0, 1, 2, 3])
    for file in files.values():
        read = DiT.from_pretrained(file, num_heads=2).eval()
        assert read.network.config["num_classes"] == 3 and read.network.config["depth"] == 2
        assert torch.equal(predict(read, label), predict(model, label))
    read = DiT.from_pretrained(files["all.pt"], weights="model", num_heads=2).eval()
    assert torch.equal(predict(read, label), predict(DiT(other), label))


def test_reads_every_size_off_a_file(tmp_path):
    sizes = {"input_size": 12, "patch_size": 4, "in_channels": 3, "hidden_size": 384, "depth": 1, "num_heads": 6,
             "num_classes": 5, "learn_sigma": False}  # fmt: skip
    torch.save(small(**sizes).state_dict(), tmp_path / "small.pt")
    config = DiT.from_pretrained(tmp_path / "small.pt").network.config
    assert {name: config[name] for name in sizes} == sizes


def test_tells_what_a_file_is(model):
    def shapes(network):
        return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}

    with torch.device("meta"):
        full = DiTNetwork(**published("XL/2"))
    assert DiT.recognise(shapes(full)) == "DiT of width 1152, 28 layers, 1000 classes, 8 output channels"
    assert DiT.recognise(shapes(model.network)).endswith(" 3 classes, 2 output channels, num_heads to be given")
    for name in ("pos_embed", "x_embedder.proj.weight", "blocks.0.attn.qkv.weight"):
        assert DiT.recognise({key: shape for key, shape in shapes(full).items() if key != name}) is None
        assert DiT.recognise({**shapes(full), name: (3,)}) is None
    assert DiT.recognise(shapes(PixelUNet.tiny().network)) is None and DiT.recognise({}) is None


def test_a_file_s_tensors_become_the_network_s_own(model):
    state = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    halved = "blocks.1.mlp.fc2.bias"
    state[halved] = state[halved].half()
    network = network_from_state(state, "a file", num_heads=2)
    for name, tensor in network.state_dict().items():
        assert (tensor.data_ptr() == state[name].data_ptr()) == (name != halved) and tensor.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in network.parameters())


# The paper's table 4, in millions of parameters; the original's XL/2 to the last element, the position table included.
@pytest.mark.parametrize(
    ("size", "patches"), [("S", (33, 33, 33)), ("B", (130, 130, 131)), ("L", (458, 458, 459)), ("XL", (675, 675, 676))]
)
def test_full_size(size, patches):
    for patch, millions in zip((2, 4, 8), patches, strict=True):
        with torch.device("meta"):
            network = DiTNetwork(**published(f"{size}/{patch}"))
        assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == millions


def test_full_size_to_the_last_element():
    for resolution, side, elements in ((256, 32, 675_129_632), (512, 64, 675_129_632 + (32**2 - 16**2) * 1152)):
        with torch.device("meta"):
            network = DiTNetwork(**published("XL/2", resolution))
        assert sum(tensor.numel() for tensor in network.state_dict().values()) == elements
        model = DiT(network, space="latents")
        assert model.shape == (4, side, side) and model.num_classes == 1000 and model.learned_range
    for name in ("M/2", "S/3", "XL"):
        with pytest.raises(ValueError, match=f"one of S, B, L, XL with a patch of 2, 4 or 8, as in XL/2, got '{name}'"):
            published(name)


class Foreign:
    """What a file must not make us build."""


def test_bad_files_are_refused(model, tmp_path):
    state = model.network.state_dict()
    file = tmp_path / "dit.pt"
    unreadable = "is not a whole checkpoint|is refused, and nothing of it was run"

    def refused(match, held=None, **options):
        if held is not None:
            torch.save(held, file)
        with pytest.raises(ValueError, match=match):
            DiT.from_pretrained(file, **{"num_heads": 2, **options})

    with pytest.raises(FileNotFoundError, match="neither a file or folder here nor a Hub id"):
        DiT.from_pretrained(file)
    refused("num_heads cannot be read off .*width 32", state, num_heads=None)
    for zipped in (True, False):
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
        whole = file.read_bytes()
        for length in (0, 10, 100, 200, 290, len(whole) // 3, len(whole) - 100, len(whole) - 1):
            file.write_bytes(whole[:length])
            refused(unreadable)
    file.write_bytes(pickle.dumps(Foreign()))
    refused(unreadable)
    refused(unreadable, {"ema": state, "args": Foreign()})
    refused("must hold a dictionary of tensors, found list", [1, 2])
    refused(r"no weights called 'ema'; it has \['model'\]", {"model": state})
    refused("is no DiT: it lacks x_embedder.proj.weight, .*begins with conv_in", {"conv_in": torch.zeros(1)})
    name = "blocks.1.mlp.fc2.bias"
    refused(f"it lacks {name}$", {key: value for key, value in state.items() if key != name})
    refused("has besides extra, more$", {**state, "extra": torch.zeros(1), "more": torch.zeros(1)})
    refused(rf"has {name} \(3,\) in place of \(32,\)", {**state, name: torch.zeros(3)})
    file = tmp_path / "dit.safetensors"
    save_file(state, file)
    file.write_bytes(file.read_bytes()[:-100])
    refused(unreadable)


def test_damaged_folders_are_refused(model, tmp_path):
    model.network.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    whole, state = file.read_bytes(), model.network.state_dict()
    name = "blocks.1.mlp.fc2.bias"
    rest = {key: value for key, value in state.items() if key != name}
    for held, match in (
        (rest, f"it lacks {name}$"),
        ({**state, "extra": torch.zeros(1)}, "it has besides extra$"),
        ({**state, name: torch.zeros(3)}, f"no whole DiTNetwork: .*{name}"),
    ):
        save_file(held, file, {"format": "pt"})
        with pytest.raises(ValueError, match=match):
            DiT.from_pretrained(tmp_path)
    for length in (0, 5, len(whole) - 100):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="no whole DiTNetwork"):
            DiT.from_pretrained(tmp_path)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        DiT.from_pretrained(tmp_path)
    PixelUNet.tiny().network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must name DiTNetwork or DiTTransformer2DModel, got 'UNet2DModel'"):
        DiT.from_pretrained(tmp_path)


@pytest.fixture
def other():
    """diffusers' own DiT, made to agree with the original: its frequencies, its norms, one embedding for all blocks."""
    torch.manual_seed(0)
    other = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8,
                                  num_layers=3, sample_size=8, num_embeds_ada_norm=5, norm_eps=1e-6)  # fmt: skip
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    shared = other.transformer_blocks[0].norm1.emb.state_dict()
    for block in other.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return other.eval()


def compare_with(other, model):
    """The network's and diffusers' own outputs on one batch, of labels and the null."""
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0.0, 500.0, 999.0])
    label = torch.tensor([0, 4, 5])
    with torch.no_grad():
        return model.network(x, t, label), other(x, t, label).sample


def test_reads_a_diffusers_folder(other, tmp_path):
    other.save_pretrained(tmp_path)
    found, expected = compare_with(other, DiT.from_pretrained(tmp_path, space="latents").eval())
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    other.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.data[0] += 1
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="differently in each block .*class_embedder"):
        DiT.from_pretrained(tmp_path, space="latents")


def test_reads_a_folder_as_the_authors_uploaded_theirs(other, tmp_path):
    """An older class name, settings that are no more, and torch's own format, read with weights only."""
    other.save_pretrained(tmp_path, safe_serialization=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "cross_attention_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, expected = compare_with(other, DiT.from_pretrained(tmp_path, space="latents").eval())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_type": "ada_norm_single"}))
    with pytest.raises(ValueError, match="must name DiTNetwork or DiTTransformer2DModel, got 'Transformer2DModel'"):
        DiT.from_pretrained(tmp_path, space="latents")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (file,) = tmp_path.glob("*.bin")
    file.write_bytes(pickle.dumps(Foreign()))
    with pytest.raises(ValueError, match="no whole DiTTransformer2DModel"):
        DiT.from_pretrained(tmp_path, space="latents")


def test_names_on_the_hub(other, tmp_path, monkeypatch):
    """What is asked for, and in what order; the Hub itself is in test_hub.py."""
    vae, asked = autoencoder(), []
    (tmp_path / "safe").mkdir()
    DiTPipeline(other, vae, DDIMScheduler()).save_pretrained(tmp_path / "safe")
    DiTPipeline(other, vae, DDIMScheduler()).save_pretrained(tmp_path / "torch", safe_serialization=False)
    vae.save_pretrained(tmp_path / "vae")

    def locate(name, *, revision=None, allow_patterns=None):
        asked.append((str(name), revision, allow_patterns))
        return tmp_path / str(name).split("/")[-1] if str(name).startswith("owner/") else Path(name)

    monkeypatch.setattr("priorguide.sample.models.dit.locate", locate)
    model = DiT.from_pretrained("owner/safe", revision="v1")
    assert asked.pop(0) == ("owner/safe", "v1", None) and model.space == latent_space(vae)
    asked.clear()
    DiT.from_pretrained("owner/torch", revision="v2")
    assert asked[:2] == [("owner/torch", "v2", None), ("owner/torch", "v2", ["*.json", "*.bin"])]
    torch.save(small().state_dict(), tmp_path / "dit.pt")
    model = DiT.from_pretrained(tmp_path / "dit.pt", num_heads=2, vae="owner/vae")
    assert asked[-1] == ("owner/vae", None, None) and model.space == latent_space(vae)


def test_a_prior_alone_keeps_its_space(other, tmp_path):
    DiTPipeline(other, autoencoder(), DDIMScheduler()).save_pretrained(tmp_path)
    whole, alone = DiT.from_pretrained(tmp_path), DiT.from_pretrained(tmp_path, prior_only=True)
    assert alone.vae is None and whole.vae is not None and alone.space == whole.space == latent_space(whole.vae)
    tuned = DiT.from_base(whole, num_classes=2)
    unconditional(alone, onto=tuned)
    assert tuned.vae is whole.vae
    assert {alone.licence, tuned.licence} == {"CC-BY-NC-4.0"} and DiT.tiny().licence is None


class StockDiT(DiT):
    """diffusers' own network in its own conventions, for this project's loop."""

    def __init__(self, network, vae):
        super().__init__(small(num_classes=network.config.num_embeds_ada_norm), vae)
        self.network = network

    def denoise_with_variance(self, x_t, t, condition):
        return self.network(x_t, t, condition["label"]).sample.chunk(2, 1)


def stock(seed=0):
    """A network as diffusers makes it: frequencies shifted by 1, norms with 1e-5, one embedding for all blocks."""
    torch.manual_seed(seed)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "class_embedder" in name else 0.15)
    shared = network.transformer_blocks[0].norm1.emb.state_dict()
    network.transformer_blocks[1].norm1.emb.load_state_dict(shared)
    return network.eval()


def as_the_original(network):
    """The same network with the original's frequencies and norms."""
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return network


def by_the_pipeline(network, vae, labels, scale, steps):
    scheduler = DDIMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True
    )
    pipeline = DiTPipeline(network, vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipeline(
        labels, guidance_scale=scale, num_inference_steps=steps, generator=generator, output_type="pt"
    ).images


def by_our_loop(model, labels, scale, steps):
    noise = torch.randn(len(labels), *model.shape, generator=torch.Generator().manual_seed(5))
    condition = {"label": torch.tensor(labels)}
    scheduler = make_scheduler(model, "ddim", timestep_spacing="leading")
    options = {"scheduler": scheduler, "scales": [scale], "steps": steps, "noise": noise}
    return model.decode(sample(model, condition, range(len(labels)), **options))


@torch.no_grad()
def test_equals_the_stock_pipeline(tmp_path):
    """From the same noise, all four channels guided: the stock network in its own conventions through our loop, and
    ours once the stock one has the original's; as shipped, diffusers' conventions make another network."""
    vae, settings = autoencoder(), ([207, 3, 999], 4.0, 10)
    network = stock()
    pictures = by_the_pipeline(network, vae, *settings)
    assert pictures.std() > 0.05
    torch.testing.assert_close(by_our_loop(StockDiT(network, vae).eval(), *settings), pictures, rtol=0, atol=1e-4)
    network.save_pretrained(tmp_path)
    own = by_our_loop(DiT.from_pretrained(tmp_path, vae=vae).eval(), *settings)
    assert (own - pictures).abs().max() > 1e-2
    original = by_the_pipeline(as_the_original(network), vae, *settings)
    torch.testing.assert_close(own, original, rtol=0, atol=1e-4)


def test_latents_of_a_frozen_autoencoder(tmp_path):
    vae = autoencoder()
    model = DiT(small(), vae)
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    model.train()
    assert model.network.training and not vae.training
    batch = {"pixels": torch.rand(2, 3, 16, 16), "label": torch.tensor([0, 2])}
    drawn, again = model.encode(batch)[0], model.encode(batch)[0]
    assert drawn.shape == (2, 4, 8, 8) and not torch.equal(drawn, again)
    model.eval()
    x_0 = model.encode(batch)[0]
    with torch.no_grad():
        expected = vae.encode(batch["pixels"] * 2 - 1).latent_dist.mean * 0.18215
        pixels = vae.decode(x_0 / 0.18215).sample / 2 + 0.5
    torch.testing.assert_close(x_0, expected)
    torch.testing.assert_close(model.decode(x_0), pixels.clamp(0, 1))
    model.network.save_pretrained(tmp_path / "transformer")
    vae.save_pretrained(tmp_path / "vae")
    assert DiT.from_pretrained(tmp_path).space == model.space
    assert torch.equal(DiT.from_pretrained(tmp_path).eval().encode(batch)[0], x_0)
    assert DiT.from_base(model, 2).vae is vae


def test_space_names_the_encoder_and_its_scale():
    vae = autoencoder()
    space = latent_space(vae)
    assert space == latent_space(autoencoder()) == latent_space(autoencoder().half())
    vae.decoder.conv_out.weight.data += 1
    vae.post_quant_conv.weight.data += 1
    assert latent_space(vae) == space
    vae.quant_conv.weight.data += 1
    assert len({space, latent_space(vae), latent_space(autoencoder(seed=1))}) == 3
    assert latent_space(autoencoder(scaling_factor=0.5)) != space


def test_a_network_without_its_autoencoder_names_its_space():
    vae, network = autoencoder(), small()
    prior = DiT(network, space=latent_space(vae))
    unconditional(prior, onto=DiT(network, vae))
    assert DiT.from_components(network, **DiT(network, vae).config()).space == latent_space(vae)
    with pytest.raises(ValueError, match="came without its autoencoder"):
        prior.encode({"pixels": torch.rand(1, 3, 16, 16), "label": torch.tensor([0])})
    with pytest.raises(ValueError, match="came without its autoencoder"):
        prior.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="4 channels are no pixels"):
        DiT(network)
    with pytest.raises(
        ValueError, match="was trained on latents of another, the autoencoder given makes latents of Auto"
    ):
        DiT(network, vae, space="latents of another")
    with pytest.raises(ValueError, match="takes 3 channels, the autoencoder makes 4"):
        DiT(small(in_channels=3), vae)
    with pytest.raises(ValueError, match="same autoencoder"):
        unconditional(DiT(network, autoencoder(seed=1)), onto=DiT(network, vae))


def test_sizes_that_do_not_fit_are_refused():
    for sizes in ({"input_size": 9}, {"hidden_size": 30}, {"num_heads": 3}):
        with pytest.raises(ValueError, match="input_size must be a multiple of patch_size"):
            small(**sizes)
    with pytest.raises(ValueError, match=r"shape \(B, 4, 8, 8\), got \(1, 4, 8, 10\)"):
        small()(torch.zeros(1, 4, 8, 10), torch.zeros(1), torch.zeros(1).long())


def test_half_precision(model):
    full = predict(model, torch.tensor([0, 1, 2, 3]))
    model.network.to(torch.bfloat16)
    x_t = torch.randn(4, *model.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        half = model.denoise(x_t, torch.tensor([999.0, 600.5, 20.0, 0.0]), {"label": torch.tensor([0, 1, 2, 3])})
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max()
