"""What the doctor says of files and folders, and what loads by one name."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from priorguide.sample import models
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dit_network import DiTNetwork
from priorguide.sample.recognise import recognise
from priorguide.train import load
from priorguide.train.cli import main

LDM = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(autouse=True)
def one_model(monkeypatch):
    """DiT alone, so that these tests do not depend on what else there is; a test may add to the dictionary."""
    known = {"DiT": DiT}
    for module in ("priorguide.sample.recognise", "priorguide.train.doctor"):
        monkeypatch.setattr(f"{module}.models", lambda: known)
    return known


@pytest.fixture(scope="module")
def network() -> DiTNetwork:
    """Of a published width, so that its file tells all, and otherwise tiny."""
    torch.manual_seed(0)
    network = DiTNetwork(
        input_size=4, in_channels=1, hidden_size=384, depth=1, num_heads=6, num_classes=2, learn_sigma=False
    )
    network.initialise(zero_std=0.2)
    return network


@pytest.fixture
def file(network, tmp_path):
    """An original checkpoint: {model, ema, ...}."""
    state = network.state_dict()
    torch.save({"model": {n: t.half() for n, t in state.items()}, "ema": state, "step": 3}, tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


@pytest.fixture
def say(capsys):
    """Runs the doctor; returns all that it prints, on one line."""

    def run(path, status: int) -> str:
        capsys.readouterr()
        assert main(["doctor", str(path)]) == status
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return " ".join((captured.out + captured.err).split())

    return run


def test_an_original_file_that_loads(say, file, network):
    said = say(file, 0)
    assert "model: blocks" in said and "ema: blocks" in said and "float16" in said and "float32" in said
    values = 2 * sum(tensor.numel() for tensor in network.state_dict().values())
    assert f"│ all │ {2 * len(network.state_dict())} │ {values:,} │" in said
    assert "recognised by DiT: DiT of width 384, 1 layers, 2 classes" in said
    assert "loads as DiT: a network of" in said and "x_0 of 1 x 4 x 4 in pixels in [-1, 1], conditions: label" in said


def test_a_folder_of_diffusers_layout(say, network, tmp_path):
    network.save_pretrained(tmp_path / "dit", max_shard_size="2MB")
    said = say(tmp_path / "dit", 0)
    assert "dit: DiTNetwork" in said and "loads as DiT: a network of" in said


def test_a_pipeline_is_listed_by_its_parts(say, network, tmp_path):
    network.save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    save_file({"spare": torch.zeros(1)}, tmp_path / "all-in-one.safetensors")
    said = say(tmp_path, 0)
    assert "transformer: blocks" in said and "spare" not in said and "loads as DiT" in said


def test_a_file_that_asks_for_an_argument(say, tmp_path):
    torch.save(DiT.tiny().network.state_dict(), tmp_path / "narrow.pt")
    said = say(tmp_path / "narrow.pt", 1)
    assert "recognised by DiT" in said and "asks: " in said and "num_heads" in said and "does not load" not in said


def test_a_file_that_is_recognised_and_does_not_fit(say, network, tmp_path):
    torch.save({**network.state_dict(), "extra.weight": torch.zeros(1)}, tmp_path / "more.pt")
    said = say(tmp_path / "more.pt", 1)
    assert "does not load: " in said and "it has besides extra.weight" in said and "asks" not in said


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", (1,), "Stable Diffusion XL"),
        (LDM, (320, 9, 3, 3), "Stable Diffusion for inpainting"),
        (LDM, (320, 6, 3, 3), "no model knows it; there are DiT"),
        ("lora_unet_down_blocks_0_attentions_0.lora_down.weight", (4, 320), "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", (4, 320), "a LoRA"),
        ("control_model.input_blocks.0.0.weight", (320, 4, 3, 3), "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", (16, 3, 3, 3), "a ControlNet"),
        ("down_blocks.0.resnets.0.conv1.weight", (320, 320, 3, 3), "give its folder, with config.json"),
        ("blocks.0.attn.qkv.weight", (3, 1), "no model knows it; there are DiT"),
    ],
)
def test_what_is_known_but_not_served(say, tmp_path, name, shape, expected):
    save_file({name: torch.zeros(shape)}, tmp_path / "file.safetensors")
    said = say(tmp_path / "file.safetensors", 1)
    assert "does not load: " in said and expected in said


def test_a_pipeline_that_is_not_served(say, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    said = say(tmp_path, 1)
    assert "it holds diffusers' StableDiffusionXLPipeline; the models here take DiTNetwork, DiTPipeline" in said


def test_what_cannot_be_read_is_one_sentence(say, file, tmp_path):
    file.write_bytes(file.read_bytes()[:1000])
    assert "priorguide: " in (said := say(file, 1)) and "is not a whole checkpoint" in said
    assert "is neither a file or folder here nor a Hub id" in say("nowhere", 1)
    (tmp_path / "config.json").write_text("[")
    assert "config.json must hold a JSON object" in say(tmp_path, 1)


def test_bundles(say, base, tmp_path):
    said = say(base, 0)
    assert "is a bundle: " in said and "every hash as recorded" in said and "a model alone" in said
    assert "loads as PixelUNet" in said
    (broken := tmp_path / "broken").mkdir()
    (broken / "priorguide.json").write_bytes((base / "priorguide.json").read_bytes())
    assert "is refused: " in say(broken, 1)


def test_a_run_its_checkpoint_and_its_bundle(say, run, tmp_path):
    checkpoint = run / "checkpoints" / "last.ckpt"
    for path in (run, checkpoint):
        said = say(path, 0)
        assert "state_dict: model.network" in said and "a checkpoint of a priorguide run, at step 2" in said
        assert f"loads with its run: priorguide export {run} --checkpoint {checkpoint} --model-only" in said
    (apart := tmp_path / "checkpoints").mkdir()
    (apart / "last.ckpt").write_bytes(checkpoint.read_bytes())
    assert "has no config.yaml, which says what model this is" in say(apart / "last.ckpt", 1)
    assert "guided by " in say(run / "bundle", 0)


def test_the_doctor_needs_no_training_libraries():
    code = """import sys, priorguide.train.doctor
print(sorted({"lightning", "wandb", "datasets", "jsonargparse"} & sys.modules.keys()))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# --- by one name


def test_pretrained_takes_what_one_model_takes(file, network, base, tmp_path, monkeypatch):
    loaded = load.pretrained(str(file))
    assert type(loaded) is DiT and all(map(torch.equal, loaded.network.parameters(), network.parameters()))
    network.save_pretrained(tmp_path / "folder")
    assert type(load.pretrained(str(tmp_path / "folder"))) is DiT
    assert load.pretrained(str(base)).num_classes == 0
    asked = {}
    monkeypatch.setattr(load, "locate", lambda name, revision: asked.update(name=name, revision=revision) or file)
    assert type(load.pretrained("owner/name/dit.pt", revision="v1")) is DiT
    assert asked == {"name": "owner/name/dit.pt", "revision": "v1"}


def test_pretrained_of_more_than_one_model_or_none(file, tmp_path, one_model):
    class Second(DiT):
        pass

    one_model["Second"] = Second
    assert recognise(file).keys() == {DiT, Second}
    with pytest.raises(ValueError, match=r"is no bundle, and more than one model takes it \(DiT, Second\): give"):
        load.pretrained(str(file))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"and no model here knows it: give the model's own loader, class_path: prio"):
        load.pretrained(str(tmp_path / "other.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"'nowhere' is neither .* ship with priorguide are \['fashion-base'\]"):
        load.pretrained("nowhere")


def test_a_model_of_ones_own_is_asked_too(file, monkeypatch):
    mine = type("Mine", (DiT,), {"recognise": classmethod(lambda cls, shapes: "mine")})
    monkeypatch.setattr("priorguide.sample.recognise.models", models.models)
    monkeypatch.setitem(models._registered, "Mine", mine)
    assert recognise(file)[mine] == "mine"
