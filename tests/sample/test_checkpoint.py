"""Checkpoint files: read without running anything, in shards too, and with the weights found wherever they lie."""

import json
import os
import pickle
import sys
from collections import OrderedDict, defaultdict
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

from priorguide.sample.checkpoint import choose_weights, read_checkpoint, weight_sets

WEIGHTS = {"in.weight": torch.arange(6.0).reshape(2, 3), "out.weight": torch.arange(3).half()}


def same(found, expected=WEIGHTS):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def trainer_classes(monkeypatch):
    """Classes under the names of training libraries that need not be installed: {name: class}."""
    names = (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.nodes.AnyNode",
        "training.EverythingElse",
    )
    classes = {}
    for name in names:
        module, _, short = name.rpartition(".")
        parts = module.split(".")
        for i in range(len(parts)):
            dotted = ".".join(parts[: i + 1])
            if dotted not in sys.modules or i == len(parts) - 1:
                monkeypatch.setitem(sys.modules, dotted, ModuleType(dotted))
        bases = (dict,) if short == "AttributeDict" else ()
        classes[short] = type(short, bases, {"__module__": module})
        setattr(sys.modules[module], short, classes[short])
    return classes


def test_a_lightning_file_with_its_training_objects(tmp_path, trainer_classes, monkeypatch):
    config, metadata, node = (trainer_classes[name]() for name in ("DictConfig", "ContainerMetadata", "AnyNode"))
    metadata.__dict__ |= {"ref_type": Any, "object_type": dict, "resolver_cache": defaultdict(dict, a={})}
    config.__dict__ |= {"_metadata": metadata, "_content": {"width": node}}
    held = {
        "state_dict": OrderedDict(WEIGHTS),
        "callbacks": {trainer_classes["ModelCheckpoint"]: {"best_model_score": torch.ones(())}},
        "hyper_parameters": trainer_classes["AttributeDict"](rate=1e-4, config=config),
        "epoch": np.float64(0.5),
        "steps": np.int64(7),
    }
    torch.save(held, tmp_path / "last.ckpt")
    for name in [name for name in sys.modules if name.startswith(("pytorch_lightning", "omegaconf", "training"))]:
        monkeypatch.delitem(sys.modules, name)
    found = read_checkpoint(tmp_path / "last.ckpt")
    assert same(choose_weights(found, "state_dict", "last.ckpt"))
    assert found["hyper_parameters"]["rate"] == 1e-4 and found["epoch"] == 0.5 and found["steps"] == 7
    (callback,) = found["callbacks"]
    assert callback.__name__ == "Inert" and found["callbacks"][callback]["best_model_score"] == 1
    assert vars(found["hyper_parameters"]["config"]) == {}
    assert not any(name.startswith(("pytorch_lightning", "omegaconf")) for name in sys.modules)


def test_other_classes_are_refused_by_name(tmp_path, trainer_classes):
    torch.save({"state_dict": WEIGHTS, "extra": trainer_classes["EverythingElse"]()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"is refused, and nothing of it was run: .* training.EverythingElse$"):
        read_checkpoint(tmp_path / "last.ckpt")


class Planted:
    """Pickles as a call, which leaves a file behind."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("written", ["by torch", "as in torch's oldest format", "by pickle"])
@pytest.mark.parametrize("function", [os.mkdir, eval, Planted])
def test_a_planted_call_is_refused_and_not_made(tmp_path, written, function):
    trace = tmp_path / "trace"
    code = {os.mkdir: str(trace), eval: f"__import__('os').mkdir({str(trace)!r})", Planted: "x"}[function]
    held = {"state_dict": WEIGHTS, "planted": Planted(function, code)}
    if written == "by pickle":
        (tmp_path / "bad.ckpt").write_bytes(pickle.dumps(held))
    else:
        torch.save(held, tmp_path / "bad.ckpt", _use_new_zipfile_serialization=written == "by torch")
    with pytest.raises(
        ValueError, match=r"bad.ckpt is (refused, and nothing of it was run|not a whole checkpoint)"
    ) as e:
        read_checkpoint(tmp_path / "bad.ckpt")
    assert not trace.exists() and "\n" not in str(e.value)
    if function is not Planted and written != "by pickle":
        assert str(e.value).endswith(("asks for posix.mkdir", "asks for eval"))


def test_stand_ins_are_for_reading_alone(tmp_path):
    torch.save(WEIGHTS, tmp_path / "a.pt")
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(tmp_path / "a.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_the_note_that_git_lfs_leaves(tmp_path):
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="is Git LFS's note of a file, not the file: fetch it with `git lfs pull`"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_tensors_are_mapped_and_read_when_they_are_used(tmp_path):
    save_file({"big": torch.zeros(2**24)}, tmp_path / "a.safetensors")
    torch.save({"big": torch.zeros(2**24)}, tmp_path / "a.pt")

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for name in ("a.safetensors", "a.pt"):
        before = resident()
        held = read_checkpoint(tmp_path / name)
        after = resident()
        assert held["big"].shape == (2**24,) and after - before < 2**24, "a quarter of its bytes"


# --- shards


@pytest.fixture
def shards(tmp_path):
    """A folder of two shards and their index, as transformers lays it out."""
    for i, name in enumerate(WEIGHTS):
        save_file({name: WEIGHTS[name]}, tmp_path / f"model-{i}.safetensors")
    index = {"metadata": {"total_size": 30}, "weight_map": {n: f"model-{i}.safetensors" for i, n in enumerate(WEIGHTS)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def rewrite(folder, **places):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= places
    index.write_text(json.dumps(content))


def test_shards_by_folder_and_by_index(shards):
    assert same(read_checkpoint(shards)) and same(read_checkpoint(shards / "model.safetensors.index.json"))


def test_shards_as_diffusers_writes_them(tmp_path):
    torch.manual_seed(0)
    network = UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
                          down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    network.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(read_checkpoint(tmp_path), network.state_dict())


def test_a_folder_of_one_file(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert same(read_checkpoint(tmp_path))


def test_a_missing_shard_is_named(shards):
    (shards / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names the shard model-1.safetensors, which is not beside it"):
        read_checkpoint(shards)


def test_a_shard_that_lacks_a_tensor(shards):
    rewrite(shards, bias="model-1.safetensors")
    with pytest.raises(ValueError, match=r"model-1.safetensors lacks bias, which model.safetensors.index.json says"):
        read_checkpoint(shards)


@pytest.mark.parametrize("place", ["../a.safetensors", "/a.safetensors", "deep/a.safetensors", "a.bin", ""])
def test_an_index_that_leaves_its_folder(shards, place):
    save_file({"bias": torch.ones(1)}, shards.parent / "a.safetensors")
    rewrite(shards, bias=place)
    with pytest.raises(ValueError, match="must name .safetensors files beside it, found"):
        read_checkpoint(shards)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": []}}'])
def test_an_index_that_is_none(shards, content):
    (shards / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match='is no index of shards, which has a "weight_map"'):
        read_checkpoint(shards)


def test_folders_of_no_or_several_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no .safetensors file, nor an index of such"):
        read_checkpoint(tmp_path)
    for name in "ab":
        save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="holds more than one checkpoint, name one: a.safetensors, b.safetensors"):
        read_checkpoint(tmp_path)


# --- which weights


@pytest.mark.parametrize(
    "held",
    [
        WEIGHTS,
        {**WEIGHTS, "step": 3},
        {"state_dict": WEIGHTS, "optimizer_states": [{"state": {0: torch.ones(1)}}], "epoch": 1},
        {"state_dict": {**WEIGHTS, "version": "1"}, "loss": torch.ones(())},
        {"state_dict": WEIGHTS, "state_dict_ema": {"other": torch.ones(1)}},
    ],
)
def test_the_state_dict_is_found(held):
    assert same(choose_weights(held, "state_dict", "a.ckpt"))


def test_weights_of_another_name(tmp_path):
    held = {"model": WEIGHTS, "ema": {name: tensor + 1 for name, tensor in WEIGHTS.items()}, "args": {"lr": 1.0}}
    assert same(choose_weights(held, "ema", "a.pt"), held["ema"])
    with pytest.raises(ValueError, match=r"a.pt has no weights called 'state_dict'; it has \['ema', 'model'\]"):
        choose_weights(held, "state_dict", "a.pt")


def test_weight_sets():
    held = {"model": WEIGHTS, "opt": {"state": {0: torch.ones(1)}}, "scale": torch.ones(1), "epoch": 3}
    assert weight_sets(held).keys() == {"", "model"} and same(weight_sets(held)["model"])
