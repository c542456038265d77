"""PixArt: its conditions, its files, its use as a prior. Its parity with the original is in test_pixart_parity.py."""

import copy
import json
import warnings

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from priorguide.sample.bundle import Bundle
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import Sampler, make_scheduler, sample
from priorguide.sample.model import keep_only
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dit_network import DiTNetwork
from priorguide.sample.models.pixart import WITHOUT_T5, PixArt, encode_captions
from priorguide.sample.models.pixart_network import network_from_state
from priorguide.sample.noise import DiscretePath


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PixArt.tiny().eval()


def original_shapes(width, depth, caption, tokens, side, multi_scale, patch=2, channels=4):
    """An original file's names and shapes, from the paper: a DiT with adaLN-single (section 2.3), cross-attention to
    captions projected by a two-layer perceptron, and, multi-scale, three thirds of the width for h, w and h / w."""
    shapes = {
        "pos_embed": (1, side**2, width),
        "y_embedder.y_embedding": (tokens, caption),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "final_layer.scale_shift_table": (2, width),
    }
    linear = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "t_block.1": (6 * width, width),
        "y_embedder.y_proj.fc1": (width, caption),
        "y_embedder.y_proj.fc2": (width, width),
        "final_layer.linear": (2 * channels * patch**2, width),
    }
    for name in ("csize_embedder", "ar_embedder") if multi_scale else ():
        linear |= {f"{name}.mlp.0": (width // 3, 256), f"{name}.mlp.2": (width // 3, width // 3)}
    for i in range(depth):
        shapes[f"blocks.{i}.scale_shift_table"] = (6, width)
        linear |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.cross_attn.q_linear": (width, width),
            f"blocks.{i}.cross_attn.kv_linear": (2 * width, width),
            f"blocks.{i}.cross_attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
        }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def position_table(side, width, scale):
    network = PixArtTransformer2DModel(1, width, num_layers=0, sample_size=2 * side, interpolation_scale=scale)
    return network.pos_embed.pos_embed


def original(seed=0, multi_scale=True, width=48, side=4, scale=2.0):
    """Random weights of an original file."""
    generator = torch.Generator().manual_seed(seed)
    shapes = original_shapes(width, 2, 8, 5, side, multi_scale)
    state = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    return {**state, "pos_embed": position_table(side, width, scale)}


@torch.no_grad()
def predict(model, condition, size=8, batch=2):
    x_t = torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(1))
    return model.denoise(x_t, torch.tensor([600.5, 20.0])[:batch], condition)


def captions(model, valid=(2, 5)):
    tokens, width = model.null_text.shape[1:]
    text = torch.randn(len(valid), tokens, width, generator=torch.Generator().manual_seed(2))
    return {"text": text, "mask": (torch.arange(tokens) < torch.tensor(valid)[:, None]).long()}


def autoencoder():
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def test_null_is_the_learned_text_with_all_tokens_valid(model):
    null = model.null(captions(model))
    assert torch.equal(null["text"], model.null_text.expand(2, -1, -1)) and null["mask"].tolist() == [[1] * 5] * 2
    authors = {**captions(model), "text": null["text"]}  # keep the caption's mask
    gap = (predict(model, null) - predict(model, authors)).abs().amax((1, 2, 3))
    assert gap[0] > 1e-3 and gap[1] < 1e-6  # the second caption fills all places


def test_masked_tokens_do_not_matter_and_others_do(model):
    condition = captions(model)
    changed = {**condition, "text": condition["text"].clone()}
    changed["text"][:, 3:] += 1
    gap = (predict(model, changed) - predict(model, condition)).abs().amax((1, 2, 3))
    assert gap[0] < 1e-6 and gap[1] > 1e-3


def test_conditions_come_encoded(model):
    condition = model.encode_condition(captions(model))
    assert condition["mask"].dtype == model.null({})["mask"].dtype == torch.float32
    with pytest.raises(ValueError, match="holds no T5: give text and mask encoded, as encode_captions makes them"):
        model.encode_condition({"text": ["a cat"], "mask": condition["mask"]})
    for part in ({"text": torch.zeros(2, 4, 8)}, {"text": torch.zeros(2, 5, 9)}, {"mask": torch.ones(2, 4)}):
        with pytest.raises(ValueError, match=r"text must have shape \(B, 5, 8\) and mask \(B, 5\), got"):
            model.encode_condition({**condition, **part})


def test_any_size_goes_and_the_network_is_told(model):
    seen = []
    model.network.adaln_single.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    null = keep_only(model, {}, frozenset(), 2)
    with torch.no_grad():
        assert model.denoise(torch.randn(2, 4, 6, 16), torch.zeros(2), null).shape == (2, 4, 6, 16)
    assert seen[0]["resolution"].tolist() == [[48, 128]] * 2
    assert seen[0]["aspect_ratio"].tolist() == [[0.375]] * 2
    # Height and width are told apart: a turned picture is not the turned answer, even with equal tokens.
    turned = model.denoise(torch.ones(2, 4, 16, 6), torch.zeros(2), null)
    assert (turned.mT - model.denoise(torch.ones(2, 4, 6, 16), torch.zeros(2), null)).abs().max() > 1e-3
    for shape in ((2, 4, 7, 8), (2, 4, 8, 7), (2, 3, 8, 8)):
        with pytest.raises(ValueError, match="4 channels and sides that are multiples of 2, got"):
            model.denoise(torch.randn(shape), torch.zeros(2), null)


def test_learned_range_is_apart_from_the_prediction(model):
    condition, x_t, t = captions(model), torch.randn(2, 4, 8, 8), torch.tensor([900.0, 3.0])
    with torch.no_grad():
        epsilon, learned = model.denoise_with_variance(x_t, t, condition)
        assert torch.equal(epsilon, model.denoise(x_t, t, condition)) and learned.shape == epsilon.shape
        weight, bias = model.network.proj_out.weight, model.network.proj_out.bias
        of_range = torch.arange(len(bias)) % 8 >= 4  # rows are (patch, patch, channel)
        weight[of_range], bias[of_range] = 0, 7
        again, sevens = model.denoise_with_variance(x_t, t, condition)
    assert torch.equal(again, epsilon) and (sevens == 7).all()


def test_shapes_that_do_not_fit_are_refused(model):
    for null in (torch.zeros(5, 8), torch.zeros(2, 5, 8), torch.zeros(1, 5, 9)):
        with pytest.raises(ValueError, match=r"null_text must have shape \(1, N, 8\), got"):
            PixArt(model.network, null, model.vae)
    with pytest.raises(ValueError, match="takes 4 channels, the autoencoder makes 3"):
        PixArt(model.network, model.null_text, AutoencoderKL(latent_channels=3))
    with pytest.raises(ValueError, match="autoencoder as vae, or name its space"):
        PixArt(model.network, model.null_text)
    alone = PixArt(model.network, model.null_text, space="latents")
    for use in (lambda: alone.decode(torch.zeros(1, 4, 8, 8)), lambda: alone.encode_pixels(torch.rand(1, 3, 16, 16))):
        with pytest.raises(ValueError, match=r"came without its autoencoder \(latents\): give it as vae"):
            use()


# Original files


def read(file, **options):
    return PixArt.from_pretrained(file, **{"num_heads": 2, "space": "latents", **options}).eval()


@pytest.mark.parametrize(("multi_scale", "scale"), [(False, 1.0), (True, 2.0), (False, 0.5)])
def test_reads_every_size_off_a_file(tmp_path, multi_scale, scale):
    state = original(multi_scale=multi_scale, scale=scale)
    torch.save({"state_dict": state}, tmp_path / "pixart.pth")
    model = read(tmp_path / "pixart.pth")
    config = model.network.config
    assert (config["sample_size"], config["patch_size"], config["num_layers"]) == (8, 2, 2)
    assert (config["in_channels"], config["out_channels"], config["caption_channels"]) == (4, 8, 8)
    assert config["interpolation_scale"] == scale and config["use_additional_conditions"] == multi_scale
    assert torch.equal(model.null_text[0], state["y_embedder.y_embedding"])
    assert torch.equal(model.network.pos_embed.pos_embed, state["pos_embed"])
    assert predict(model, captions(model)).std() > 0.01


def test_reads_each_layout(tmp_path):
    live, averaged = original(1), original()
    file = tmp_path / "pixart.pth"
    expected = None
    for held in (
        averaged,
        {"state_dict": averaged},
        {"state_dict": live, "state_dict_ema": averaged, "epoch": 3, "optimizer": {"state": {}}},
        {"state_dict": {f"module.{name}": tensor for name, tensor in averaged.items()}},
        {"state_dict": {**averaged, "pos_embed": averaged["pos_embed"].half()}},
    ):
        torch.save(held, file)
        found = predict(read(file), captions(read(file)))
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
    save_file(averaged, tmp_path / "pixart.safetensors")
    assert torch.equal(predict(read(tmp_path / "pixart.safetensors"), captions(read(file))), expected)
    placed = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(averaged)}
    (tmp_path / "shards").mkdir()
    for part in set(placed.values()):
        save_file({name: averaged[name] for name in averaged if placed[name] == part}, tmp_path / "shards" / part)
    (tmp_path / "shards" / "pixart.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert torch.equal(predict(read(tmp_path / "shards"), captions(read(file))), expected)
    torch.save({"state_dict": live, "state_dict_ema": averaged}, file)
    model = read(file, weights="model")
    assert not torch.equal(predict(model, captions(model)), expected)
    torch.save({"state_dict": {name: tensor.half() for name, tensor in averaged.items()}}, file)
    assert {p.dtype for p in read(file).parameters()} == {torch.float32}


def test_loading_copies_nothing():
    state = original()
    network, null = network_from_state(state, "memory", 2)
    own = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert all(p.untyped_storage().data_ptr() in own and p.requires_grad for p in network.parameters())
    assert null.data_ptr() == state["y_embedder.y_embedding"].data_ptr()
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


def test_what_a_file_gave_is_saved_whole(tmp_path):
    torch.save({"state_dict": original()}, tmp_path / "pixart.pth")
    model = read(tmp_path / "pixart.pth")
    model.network.save_pretrained(tmp_path / "transformer")
    again = PixArt.from_pretrained(tmp_path / "transformer", space="latents", null_text=tmp_path / "pixart.pth").eval()
    assert torch.equal(predict(again, captions(model)), predict(model, captions(model)))
    assert torch.equal(again.null_text, model.null_text)


def test_bad_files_are_refused(tmp_path):
    state, file = original(), tmp_path / "pixart.pth"

    def refused(match, held, **options):
        torch.save({"state_dict": held}, file)
        with pytest.raises(ValueError, match=match):
            read(file, **options)

    with pytest.raises(FileNotFoundError, match="nothing.pth.* a Hub id"):
        read(tmp_path / "nothing.pth")
    refused("num_heads cannot be read off .*: give a divisor of its width 48, got None", state, num_heads=None)
    refused("give a divisor of its width 48, got 5", state, num_heads=5)
    name = "blocks.1.mlp.fc2.bias"
    refused(rf"it lacks {name}$", {key: value for key, value in state.items() if key != name})
    name = "blocks.1.attn.qkv.bias"
    refused(r"it lacks blocks.1.attn.qkv\[0\].bias, ", {key: value for key, value in state.items() if key != name})
    refused(r"it has besides blocks.0.attn.sr.weight$", {**state, "blocks.0.attn.sr.weight": torch.zeros(2, 2)})
    refused(r"it has t_block.1.bias \(3,\) in place of \(288,\)", {**state, "t_block.1.bias": torch.zeros(3)})
    for name in ("pos_embed", "y_embedder.y_embedding"):
        refused(rf"is no PixArt: it lacks {name}; it begins with", {k: v for k, v in state.items() if k != name})
    for table in (torch.zeros(1, 16, 48), position_table(4, 48, 2.0)[:, :15], torch.randn(1, 16, 48), torch.zeros(3)):
        refused("pos_embed that is not PixArt's fixed square table", {**state, "pos_embed": table})
    refused("no weights called 'state_dict_ema'", state, weights="ema")
    refused("autoencoder as vae, or name its space", state, space=None)


def test_the_published_networks_at_full_size():
    """610,856,096 parameters without size conditions, as is published of PixArt-sigma's transformer, the same network;
    multi-scale adds two perceptrons from 256 features to a third of the width. Table and null are no parameters."""
    thirds = 2 * (256 * 384 + 384 + 384**2 + 384)
    for side, scale, multi_scale, count in ((16, 1.0, False, 610_856_096), (64, 2.0, True, 610_856_096 + thirds)):
        shapes = original_shapes(1152, 28, 4096, 120, side, multi_scale)
        assert PixArt.recognise(shapes) == ("PixArt-alpha, multi-scale" if multi_scale else "PixArt-alpha")
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        network, null = network_from_state({**state, "pos_embed": position_table(side, 1152, scale)}, "published")
        assert sum(p.numel() for p in network.parameters()) == count
        with torch.device("meta"):  # the published sizes are diffusers' defaults, scale and size conditions by size
            other = PixArtTransformer2DModel(sample_size=2 * side, caption_channels=4096)
        assert network.use_additional_conditions == other.use_additional_conditions
        assert network.pos_embed.interpolation_scale == other.pos_embed.interpolation_scale
        inferred = {"use_additional_conditions", "interpolation_scale", "_use_default_values"}
        assert all(network.config[name] == value for name, value in other.config.items() if name not in inferred)
        assert null.shape == (1, 120, 4096)


def test_recognises_its_own_files_alone():
    shapes = original_shapes(48, 2, 8, 120, 4, True)
    assert PixArt.recognise({f"state_dict_ema.{name}": shape for name, shape in shapes.items()}) is not None
    assert PixArt.recognise({**shapes, "y_embedder.y_embedding": (300, 4096)}) is None  # PixArt-sigma
    assert PixArt.recognise({"y_embedder.embedding_table.weight": (1001, 1152)}) is None  # DiT


# Diffusers' folders


@pytest.fixture
def pipeline(tmp_path):
    """A pipeline's folder with a T5 of six tokens."""
    torch.manual_seed(0)
    folder = tmp_path / "pipeline"
    PixArt.tiny().network.save_pretrained(folder / "transformer")
    autoencoder().save_pretrained(folder / "vae")
    config = T5Config(vocab_size=6, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("b", -2.0)]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder / "tokenizer")
    return folder


def t5(folder):
    return T5EncoderModel.from_pretrained(folder / "text_encoder").eval(), T5Tokenizer.from_pretrained(
        folder / "tokenizer"
    )


def test_captions_are_encoded(pipeline):
    condition = encode_captions(["", "ab"], *t5(pipeline), tokens=5)
    assert condition["text"].shape == (2, 5, 8)
    assert condition["mask"].tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]


def test_without_the_learned_null_the_empty_caption_stands_in(pipeline):
    with pytest.warns(UserWarning, match='lacks PixArt\'s learned null.*the caption "".*give null_text'):
        model = PixArt.from_pretrained(pipeline).eval()
    assert model.null_text.shape == (1, 120, 8)
    assert {name for name, _ in model.named_children()} == {"network", "vae"}  # no T5 stays
    # It predicts what the pipeline does for its empty negative prompt: "", padded, with its own mask.
    empty = {name: part.expand(2, *part.shape[1:]) for name, part in encode_captions([""], *t5(pipeline)).items()}
    null = keep_only(model, {}, frozenset(), 2)
    torch.testing.assert_close(predict(model, null), predict(model, empty), rtol=0, atol=1e-5)
    padded = {**empty, "mask": torch.ones_like(empty["mask"])}
    assert (predict(model, padded) - predict(model, empty)).abs().max() > 1e-4
    text_encoder, tokenizer = t5(pipeline)
    with pytest.warns(UserWarning, match="stands in"):
        given = PixArt.from_pretrained(
            pipeline / "transformer", text_encoder=text_encoder, tokenizer=tokenizer, space="latents"
        )
    torch.testing.assert_close(given.null_text, model.null_text)


def test_a_null_that_is_given_is_taken(pipeline, tmp_path):
    null = torch.randn(6, 8)
    save_file({"null": null}, tmp_path / "null.safetensors")
    torch.save({"state_dict": {"y_embedder.y_embedding": null, "other": torch.zeros(1)}}, tmp_path / "original.pth")
    (pipeline / "text_encoder" / "model.safetensors").unlink()  # T5 is not read
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for given in (null, null[None], tmp_path / "null.safetensors", tmp_path / "original.pth"):
            assert torch.equal(PixArt.from_pretrained(pipeline, null_text=given).null_text, null[None])
    save_file({"a": null, "b": null + 1}, tmp_path / "null.safetensors")
    with pytest.raises(ValueError, match="must hold the null text alone, or be an original checkpoint"):
        PixArt.from_pretrained(pipeline, null_text=tmp_path / "null.safetensors")
    with pytest.raises(ValueError, match="lacks PixArt's learned null.*no T5 .* could be read there: give null_text"):
        PixArt.from_pretrained(pipeline)
    with pytest.raises(ValueError, match="no T5 .* could be read there: give null_text"):
        PixArt.from_pretrained(pipeline / "transformer", space="latents")


def test_a_prior_alone_keeps_the_name_of_its_space(pipeline):
    whole, alone = (PixArt.from_pretrained(pipeline, null_text=torch.ones(5, 8), prior_only=p) for p in (False, True))
    assert whole.vae is not None and alone.vae is None and alone.space == whole.space
    assert PixArt.from_pretrained(pipeline / "transformer", null_text=torch.ones(5, 8), vae=pipeline / "vae").space == (
        whole.space
    )


def test_folders_under_diffusers_older_name(pipeline):
    file = pipeline / "transformer" / "config.json"
    config = json.loads(file.read_text())
    older = {**config, "_class_name": "Transformer2DModel", "only_cross_attention": False, "num_vector_embeds": None}
    null = torch.ones(5, 8)
    expected = PixArt.from_pretrained(pipeline, null_text=null).eval()
    file.write_text(json.dumps(older))
    again = PixArt.from_pretrained(pipeline, null_text=null).eval()
    assert torch.equal(predict(again, captions(again)), predict(expected, captions(expected)))
    file.write_text(json.dumps({**older, "norm_type": "ada_norm_zero"}))  # a DiT
    with pytest.raises(ValueError, match="must name PixArtTransformer2DModel, got 'Transformer2DModel'"):
        PixArt.from_pretrained(pipeline, null_text=null)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="is no network's folder"):
        PixArt.from_pretrained(pipeline, null_text=null)


def test_the_text_encoder_is_not_fetched_in_vain():
    """The files of a published pipeline."""
    heavy = [f"text_encoder/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    needed = ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
              "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip
    assert list(filter_repo_objects([*needed, *heavy], allow_patterns=WITHOUT_T5)) == needed
    assert list(filter_repo_objects(["diffusion_pytorch_model.safetensors"], allow_patterns=WITHOUT_T5))


# As a prior


def diffusing(space, channels=4):
    """A model on Stable Diffusion's path that guides with a PixArt."""
    torch.manual_seed(5)
    network = DiTNetwork(
        input_size=16, in_channels=channels, hidden_size=32, depth=1, num_heads=2, num_classes=3, learn_sigma=False
    )
    network.initialise(zero_std=0.2)
    model = DiT(network, space=space).eval()
    model.path = DiscretePath.scaled_linear()
    return model


def test_its_times_in_stable_diffusions_schedule(model):
    """SYSTEMS' table: t 250, 500, 700 on the linear path are 341, 708, 966 on the scaled linear one."""
    onto, own, theirs = diffusing(model.space), [250.0, 500.0, 700.0], [341.0, 708.0, 966.0]
    x_t = torch.ones(3, 4, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PixArt knows all of Stable Diffusion's noise levels
        located_x, located = unconditional(model, onto=onto).locate(x_t, torch.tensor(theirs))
    assert located.round().tolist() == own
    torch.testing.assert_close(located_x, x_t)  # both preserve the variance
    with pytest.warns(UserWarning, match="outside its range"):
        reverse = unconditional(onto, onto=model)
    _, located = reverse.locate(torch.ones(4, 4, 8, 8), torch.tensor([*own, 999.0]))
    assert located.round().tolist() == [*theirs, 999.0]


def test_it_guides_a_model_of_another_size_by_its_prediction_alone(model):
    onto = diffusing(model.space)
    prior, condition = unconditional(model, onto=onto), {"label": torch.tensor([0, 2])}
    settings = {"scheduler": make_scheduler(onto, "ddim"), "scales": [3.0], "steps": 2}
    guided = sample(onto, condition, [1, 2], prior=prior, **settings)
    assert guided.shape == (2, 4, 16, 16) and guided.isfinite().all()
    assert not torch.equal(guided, sample(onto, condition, [1, 2], **settings))
    ranged = copy.deepcopy(model)
    ranged.network.proj_out.bias.data[torch.arange(len(ranged.network.proj_out.bias)) % 8 >= 4] = 50
    again = sample(onto, condition, [1, 2], prior=unconditional(ranged, onto=onto), **settings)
    assert torch.equal(again, guided)
    # The unconditional prediction is that of the learned null, whatever the condition.
    x_t, t = torch.randn(2, 4, 16, 16), torch.tensor([341.0, 708.0])
    own = {"text": model.null_text.expand(2, -1, -1), "mask": torch.ones(2, 5)}
    with torch.no_grad():
        located_x, located = prior.locate(x_t, t)
        found = prior.express(model.denoise(located_x, located.float(), prior.condition(condition, 2)), x_t, t)
        torch.testing.assert_close(found, model.denoise(x_t, located.float(), own), rtol=0, atol=1e-5)


def test_other_latents_are_refused(model):
    with pytest.raises(ValueError, match="predictions mix only in one latent space"):
        unconditional(model, onto=diffusing("latents of another autoencoder"))
    with pytest.raises(ValueError, match="a prior must have the same channels"):
        unconditional(model, onto=diffusing(model.space, channels=3))


def test_a_bundle_gives_the_prior_its_null_back(model, tmp_path):
    onto = diffusing(model.space)
    onto.path = DiscretePath.linear()  # as DiT's from_components has it
    prior = unconditional(PixArt(model.network, model.null_text, space=model.space), onto=onto)
    Bundle.save(tmp_path / "bundle", onto, guidance=Guidance((2.0,), prior), sampler=Sampler(steps=2))
    loaded = Bundle.load(tmp_path / "bundle").guidance.prior.model
    assert isinstance(loaded, PixArt) and torch.equal(loaded.null_text, model.null_text)
    assert torch.equal(predict(loaded, captions(model)), predict(model, captions(model)))
