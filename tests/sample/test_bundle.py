"""Bundles: what is saved comes back bit for bit, and what was not saved is refused."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from functools import partialmethod

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from priorguide.sample import models
from priorguide.sample.bundle import Bundle, BundleError, Recorded, verify
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import Sampler
from priorguide.sample.manifest import canonical
from priorguide.sample.models.pixel import PixelUNet

SAMPLER = Sampler(steps=3, options={"timestep_spacing": "trailing"})


def make_model() -> PixelUNet:
    torch.manual_seed(0)
    return PixelUNet.tiny().eval()


def make_base() -> PixelUNet:
    torch.manual_seed(1)
    return PixelUNet.create(resolution=16, fold=2, block_out_channels=(16, 32)).eval()


def make_condition(batch: int = 2) -> dict[str, torch.Tensor]:
    image = torch.rand(batch, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"label": torch.arange(batch), "image": image}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A bundle with a base prior and a recorded batch; tests that change it work on a copy."""
    model = make_model()
    model.licence = "Apache-2.0"
    guidance = Guidance((2.0,), unconditional(make_base(), onto=model), interval=(0, 900), rescale=0.2, refresh=2)
    recorded = Recorded.draw(model, make_condition(), [5, 6], guidance, SAMPLER, max_batch=3)
    return Bundle.save(
        tmp_path_factory.mktemp("saved") / "bundle",
        model,
        guidance=guidance,
        sampler=SAMPLER,
        recorded=recorded,
        evidence={"winner": "base", "interval": [0.1, 0.2]},
        provenance={"base": "tiny"},
    )


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_a_prior_that_is_not_for_all_is_embedded_only_if_asked(tmp_path):
    model, base = make_model(), make_base()
    base.licence = "CC-BY-NC-4.0"
    arguments = {"guidance": Guidance((2.0,), unconditional(base, onto=model)), "sampler": SAMPLER}
    with pytest.raises(ValueError, match="published under CC-BY-NC-4.0, which not everybody may use"):
        Bundle.save(tmp_path / "bundle", model, **arguments)
    assert not (tmp_path / "bundle").exists()
    Bundle.save(tmp_path / "bundle", model, **arguments, restricted=True)
    assert Bundle.load(tmp_path / "bundle").guidance.prior.model.licence == "CC-BY-NC-4.0"


def read(folder):
    return json.loads((folder / "priorguide.json").read_text())


def forge(folder, edit=lambda manifest: None):
    """Rewrites the manifest with hashes that fit whatever is in the folder now."""
    manifest = read(folder)
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    edit(manifest)
    manifest.pop("manifest_sha256", None)
    manifest["manifest_sha256"] = hashlib.sha256(canonical(manifest)).hexdigest()
    (folder / "priorguide.json").write_bytes(canonical(manifest))


def refused(function, folder) -> str:
    with pytest.raises(BundleError) as caught:
        function(folder)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{folder} is refused: ")
    return message


def test_round_trip(saved):
    bundle = Bundle.load(saved)
    assert {path.name for path in saved.iterdir()} == {
        "unet",
        "unconditional_unet",
        "scheduler",
        "null.safetensors",
        "recorded.safetensors",
        "priorguide.json",
    }
    for network, made in ((bundle.model, make_model()), (bundle.guidance.prior.model, make_base())):
        loaded, expected = network.state_dict(), made.state_dict()
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)
        assert not any(module.training for module in network.modules())
    assert bundle.guidance.scales == (2.0,) and bundle.guidance.interval == (0, 900) and bundle.guidance.rescale == 0.2
    assert bundle.guidance.prior.onto is bundle.model
    assert bundle.sampler == SAMPLER
    assert bundle.manifest["evidence"] == {"winner": "base", "interval": [0.1, 0.2]}
    assert bundle.manifest["environment"]["torch"] == torch.__version__
    replay = bundle.replay()
    assert replay.identical and replay.max_abs_difference == 0 and replay.changes == {}
    assert replay.pictures.shape == (2, 1, 16, 16)
    assert torch.equal(load_file(saved / "recorded.safetensors")["pictures"], replay.pictures)


def test_replays_in_a_fresh_process_without_the_training_libraries(saved):
    script = """
import sys
from priorguide.sample import models
from priorguide.sample.bundle import Bundle
replay = Bundle.load(sys.argv[1]).replay()
assert replay.identical and replay.pictures.std() > 0.01, replay
loaded = {"lightning", "pytorch_lightning", "wandb", "datasets"} & set(sys.modules)
assert not loaded, loaded
"""
    result = subprocess.run([sys.executable, "-c", script, str(saved)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_replay_uses_and_restores_the_thread_count(copy, monkeypatch):
    before, seen = torch.get_num_threads(), []
    forge(copy, lambda manifest: manifest["recorded"].update(threads=before + 1))

    def sample(bundle, condition, seeds, max_batch):
        seen.append((torch.get_num_threads(), seeds, max_batch))
        return torch.zeros(2, 1, 16, 16)

    monkeypatch.setattr(Bundle, "sample", sample)
    assert not Bundle.load(copy).replay().identical
    assert seen == [(before + 1, (5, 6), 3)] and torch.get_num_threads() == before


def test_replay_sees_other_pictures_and_another_environment(copy):
    tensors = load_file(copy / "recorded.safetensors")
    tensors["pictures"][0, 0, 0, 0] += 0.25
    save_file(tensors, copy / "recorded.safetensors")
    forge(copy, lambda manifest: manifest["environment"].update(torch="1.0"))
    replay = Bundle.load(copy).replay()
    assert not replay.identical and not replay.reproduced
    assert replay.max_abs_difference == pytest.approx(0.25, abs=1e-6)
    assert replay.changes == {"torch": ("1.0", torch.__version__)}


@pytest.mark.parametrize(
    ("shift", "changed", "reproduced"),
    [
        (0, {}, True),
        (5e-5, {}, False),  # on a CPU every bit is decided
        (5e-5, {"torch": "1.0"}, True),
        (5e-4, {"torch": "1.0"}, False),
        (5e-4, {"device": "NVIDIA H200"}, True),
        (2e-3, {"device": "NVIDIA H200"}, False),
    ],
)
def test_what_is_reproduced_depends_on_the_machine(copy, shift, changed, reproduced):
    tensors = load_file(copy / "recorded.safetensors")
    tensors["pictures"] += shift
    save_file(tensors, copy / "recorded.safetensors")
    forge(copy, lambda manifest: [manifest[name].update(changed) for name in ("environment", "recorded")])
    replay = Bundle.load(copy).replay()
    assert replay.identical == (shift == 0) and replay.reproduced == reproduced


def test_sample(saved):
    bundle = Bundle.load(saved)
    pictures = bundle.sample(make_condition(3), [7, 8, 9])
    assert pictures.shape == (3, 1, 16, 16) and pictures.dtype == torch.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert torch.equal(pictures, bundle.sample(make_condition(3), [7, 8, 9]))
    single = bundle.sample({name: part[1:2] for name, part in make_condition(3).items()}, [8])
    torch.testing.assert_close(single[0], pictures[1], atol=1e-4, rtol=0)
    assert not torch.equal(pictures, bundle.sample(make_condition(3), [7, 8, 9], steps=4))
    calls = []
    bundle.guidance.prior.model.network.register_forward_pre_hook(lambda module, args: calls.append(1))
    bundle.sample(make_condition(3), [7, 8, 9], scales=(1.0,))
    assert not calls  # scale 1 needs no prior
    with pytest.raises(ValueError, match="takes as many scales"):
        bundle.sample(make_condition(3), [7, 8, 9], scales=(1.0, 2.0))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_networks_make_the_pictures(saved, monkeypatch, backend):
    """Those of the seeds again and again, and near those as written; the recorded ones are replayed as written."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    bundle, plain = Bundle.load(saved, compile=True), Bundle.load(saved)
    assert bundle.replay().identical and not counters["stats"]["unique_graphs"]
    pictures = bundle.sample(make_condition(3), [7, 8, 9])
    assert counters["stats"]["unique_graphs"]
    assert torch.equal(pictures, bundle.sample(make_condition(3), [7, 8, 9]))
    torch.testing.assert_close(pictures, plain.sample(make_condition(3), [7, 8, 9]), atol=1e-4, rtol=0)


def test_a_model_alone(tmp_path):
    bundle = Bundle.load(Bundle.save(tmp_path / "base", make_base()))
    assert bundle.guidance is None and bundle.manifest["prior"] is None
    assert {path.name for path in bundle.folder.iterdir()} == {"unet", "null.safetensors", "priorguide.json"}
    with pytest.raises(ValueError, match="without guidance"):
        bundle.sample({}, [0])
    with pytest.raises(ValueError, match="no recorded batch"):
        bundle.replay()
    grown = PixelUNet.from_base(bundle.model, num_classes=3)  # a saved base can be fine-tuned
    assert all(parameter.requires_grad for parameter in grown.network.parameters())


@pytest.mark.parametrize("keep", [None, frozenset({"image"})])
def test_a_prior_on_the_models_own_network_is_not_stored_twice(tmp_path, keep):
    model = make_model()
    prior = None if keep is None else unconditional(model, onto=model, keep=keep)
    guidance = Guidance((3.0,), prior)
    recorded = Recorded.draw(model, make_condition(), [1, 2], guidance, SAMPLER)
    bundle = Bundle.load(Bundle.save(tmp_path / "self", model, guidance=guidance, sampler=SAMPLER, recorded=recorded))
    assert not (bundle.folder / "unconditional_unet").exists()
    assert bundle.replay().identical
    if keep:
        assert bundle.guidance.prior.model is bundle.model and bundle.guidance.prior.keep == keep
    else:
        assert bundle.guidance.prior is None


def test_guiders_and_schedulers_come_back(tmp_path):
    model = make_model()
    sampler = Sampler("euler_ancestral", 3)
    guidance = Guidance((2.0,), guider="apg", guider_options={"eta": 0.5})
    one = make_condition(1)
    condition = {"label": one["label"].expand(2), "image": one["image"].mT.expand(2, 1, 16, 16)}  # no plain storage
    recorded = Recorded.draw(model, condition, [1, 2], guidance, sampler)
    bundle = Bundle.load(Bundle.save(tmp_path / "apg", model, guidance=guidance, sampler=sampler, recorded=recorded))
    assert vars(bundle.guidance) == vars(guidance)
    assert type(bundle.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert bundle.replay().identical


def test_tied_strided_and_half_precision_weights(tmp_path):
    model = make_model()
    resnet = model.network.mid_block.resnets[0]
    resnet.conv2.weight = resnet.conv1.weight
    model.network.conv_in.weight.data = model.network.conv_in.weight.data.to(memory_format=torch.channels_last)
    model.network.conv_out.to(torch.bfloat16)
    strides = model.network.conv_in.weight.stride()
    bundle = Bundle.load(Bundle.save(tmp_path / "odd", model))
    loaded, expected = bundle.model.network.state_dict(), model.network.state_dict()
    assert loaded.keys() == expected.keys()
    for name in loaded:
        assert loaded[name].dtype == expected[name].dtype and torch.equal(loaded[name], expected[name])
    assert model.network.conv_in.weight.stride() == strides and resnet.conv2.weight is resnet.conv1.weight


class Decoded(PixelUNet):
    """A pixel model with a frozen companion, as an autoencoder is one."""

    def __init__(self, network, vae=None, **config):
        super().__init__(network, **config)
        self.vae = vae
        self.resize = torch.nn.Identity()

    def decode(self, x_0):
        return self.vae.encode(super().decode(x_0)).latent_dist.mode()


def test_frozen_companions_come_along(tmp_path, monkeypatch):
    monkeypatch.setitem(models._registered, "Decoded", Decoded)
    torch.manual_seed(3)
    vae = AutoencoderKL(1, 1, latent_channels=1, norm_num_groups=1, block_out_channels=(4,))
    tiny, base = make_model(), make_base()
    model = Decoded(tiny.network, vae, **tiny.config()).eval()
    guidance = Guidance((2.0,), unconditional(base, onto=model))
    recorded = Recorded.draw(model, make_condition(), [1, 2], guidance, SAMPLER)
    folder = Bundle.save(tmp_path / "a", model, guidance=guidance, sampler=SAMPLER, recorded=recorded)
    bundle = Bundle.load(folder)
    assert (folder / "vae/config.json").is_file() and bundle.manifest["model"]["components"] == ["vae"]
    assert bundle.replay().identical
    model.vae = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="a Linear has no save_pretrained"):
        Bundle.save(tmp_path / "b", model)
    assert not (tmp_path / "b").exists()


def test_saving_leaves_the_model_as_it_is(tmp_path):
    model = make_model().train()
    model.network.conv_in.eval()
    modes = [module.training for module in model.modules()]
    tensors = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    Bundle.save(tmp_path / "bundle", model)
    assert modes == [module.training for module in model.modules()]
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == tensors[name][0] and torch.equal(tensor, tensors[name][1])
    assert torch.equal(rng, torch.get_rng_state())


def test_no_path_of_the_machine_is_stored(saved, tmp_path):
    again = Bundle.save(tmp_path / "again", Bundle.load(saved).model)
    for file in again.rglob("*.json"):
        assert str(saved) not in file.read_text()
    assert (again / "unet/config.json").read_bytes() == (saved / "unet/config.json").read_bytes()


def test_every_file_is_as_readable_as_the_manifest(saved):
    assert {path.stat().st_mode for path in saved.rglob("*") if path.is_file()} == {
        (saved / "priorguide.json").stat().st_mode
    }


def test_save_refuses(saved, tmp_path):
    model = make_model()
    before = (saved / "priorguide.json").read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        Bundle.save(saved, model)
    assert (saved / "priorguide.json").read_bytes() == before
    with pytest.raises(ValueError, match="come together"):
        Bundle.save(tmp_path / "a", model, guidance=Guidance((2.0,)))
    with pytest.raises(ValueError, match="bound onto another model"):
        guidance = Guidance((2.0,), unconditional(make_base(), onto=make_model()))
        Bundle.save(tmp_path / "a", model, guidance=guidance, sampler=SAMPLER)
    with pytest.raises(ValueError, match="eval"):
        Recorded.draw(make_model().train(), make_condition(), [1, 2], Guidance((2.0,)), SAMPLER)
    with pytest.raises(ValueError, match="JSON"):
        Bundle.save(tmp_path / "a", model, evidence={"p": float("nan")})
    with pytest.raises(TypeError, match="JSON"):
        Bundle.save(tmp_path / "a", model, evidence={"p": object()})
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="could not be written"):
            Bundle.save(tmp_path / "bundle", make_model())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Bundle.save(tmp_path / "bundle", make_model())
    assert not any(tmp_path.iterdir())


def flip(file, position=-1, bit=0):
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
DAMAGE = {
    "weights changed": (lambda f: flip(f / WEIGHTS), "'unet/diffusion_pytorch_model.safetensors' has changed"),
    "manifest's white space changed": (
        lambda f: (f / "priorguide.json").write_text((f / "priorguide.json").read_text() + " "),
        "priorguide.json has changed",
    ),
    "manifest edited": (
        lambda f: (f / "priorguide.json").write_bytes(canonical({**read(f), "evidence": "mine"})),
        "priorguide.json has changed",
    ),
    "no folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "no manifest": (lambda f: (f / "priorguide.json").unlink(), "has no priorguide.json"),
    "missing": (lambda f: (f / WEIGHTS).unlink(), "is missing"),
    "extra": (lambda f: (f / "unet/more.json").write_text("{}"), "'unet/more.json' is not part of the bundle"),
    "linked file": (
        lambda f: ((f / WEIGHTS).rename(f.parent / "moved"), (f / WEIGHTS).symlink_to(f.parent / "moved")),
        "is a link",
    ),
    "linked folder": (lambda f: ((f / "unet").rename(f.parent / "u"), (f / "unet").symlink_to(f.parent / "u")), "link"),
    "dangling link": (lambda f: (f / "loose").symlink_to("nowhere"), "'loose' is a link"),
    "pipe": (lambda f: os.mkfifo(f / "pipe.json"), "not a regular file"),
    "not JSON": (lambda f: (f / "priorguide.json").write_text("{"), "not JSON"),
    "not UTF-8": (lambda f: (f / "priorguide.json").write_bytes(b"\xff\xfe"), "not JSON"),
    "NaN": (lambda f: (f / "priorguide.json").write_text('{"format_version": NaN}'), "not JSON"),
    "deep": (lambda f: (f / "priorguide.json").write_text("[" * 100_000), "not JSON"),
    "a list": (lambda f: (f / "priorguide.json").write_text("[]\n"), "must be a JSON object, got a list"),
    "no version": (lambda f: (f / "priorguide.json").write_text("{}"), "must have a format_version"),
    "false version": (lambda f: (f / "priorguide.json").write_text('{"format_version": true}'), "a format_version"),
    "only a version": (lambda f: (f / "priorguide.json").write_text('{"format_version": 1}'), "lacks a proper 'model'"),
    **{
        f"{suffix} file": (lambda f, suffix=suffix: (f / f"unet/m{suffix}").write_bytes(b""), "may hold code")
        for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py")
    },
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(copy, name):
    damage, sentence = DAMAGE[name]
    verify(copy)
    damage(copy)
    message = refused(verify, copy)
    assert sentence in message
    assert refused(Bundle.load, copy) == message


def list_file(name):
    return lambda manifest: manifest["files"].update({name: "0" * 64})


def change(*path, to):
    def edit(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = to

    return edit


FORGERIES = {
    "newer format": (change("format_version", to=3), "upgrade priorguide"),
    "parent": (list_file("../outside.json"), "may leave the folder"),
    "absolute": (list_file("/etc/outside.json"), "may leave the folder"),
    "backslash": (list_file("..\\outside.json"), "may leave the folder"),
    "drive": (list_file("C:/outside.json"), "may leave the folder"),
    "dots inside": (list_file("unet/../../outside.json"), "may leave the folder"),
    "pickle listed": (list_file("unet/weights.pkl"), "may hold code"),
    "itself listed": (list_file("priorguide.json"), "'priorguide.json' is missing"),
    "files of another kind": (change("files", to=[]), "lacks a proper 'files'"),
    "unknown class": (change("model", "class", to="Popen"), "no model is called 'Popen'"),
    "class of another kind": (change("model", "class", to=["PixelUNet"]), "cannot be read"),
    "component elsewhere": (change("model", "components", to=["../unet"]), "must be a plain word"),
    "component of no use": (change("model", "components", to=["unconditional_unet"]), "cannot be read"),
    "another folder": (change("model", "folder", to="unconditional_unet"), "the manifest's folder"),
    "prior elsewhere": (change("prior", "folder", to="../elsewhere"), "the manifest's folder"),
    "unknown config": (change("model", "config", "depth", to=3), "cannot be read"),
    "other config": (change("model", "config", "num_classes", to=4), "cannot be read"),
    "other prediction": (change("model", "prediction", to="epsilon"), "the manifest's prediction is 'epsilon'"),
    "other path": (change("model", "path", "beta_schedule", to="linear"), "the manifest's path"),
    "other ladder": (change("model", "ladder", to=[["label"]]), "the manifest's ladder"),
    "other space": (change("prior", "space", to="latents"), "the manifest's space"),
    "kept part that is not there": (change("prior", "keep", to=["text"]), "keep names ['text']"),
    "scales as text": (change("guidance", "scales", to=["x"]), "could not convert"),
    "too many scales": (change("guidance", "scales", to=[1, 2]), "takes as many scales"),
    "unknown guider": (change("guidance", "guider", to="os.system"), "guider must be one of"),
    "unknown scheduler": (change("sampler", "scheduler", to="euler"), "its scheduler is a DDIMScheduler"),
    "steps as text": (change("sampler", "steps", to="many"), "invalid literal"),
    "no steps": (change("sampler", "steps", to=0), "cannot be read"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_manifest_written_by_hand_is_refused(copy, name):
    edit, sentence = FORGERIES[name]
    forge(copy)
    Bundle.load(copy)  # the forgery itself is good
    forge(copy, edit)
    assert sentence in refused(Bundle.load, copy)


def test_a_pickle_in_disguise_is_refused_unread(copy, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    for name in (WEIGHTS, "null.safetensors", "unet/config.json", "scheduler/scheduler_config.json"):
        shutil.copytree(copy, trapped := tmp_path / name.replace("/", "-"))
        (trapped / name).write_bytes(pickle.dumps(Trap()))
        forge(trapped)
        assert "is not what its name says" in refused(Bundle.load, trapped)
    torch.save({"weight": Trap()}, copy / WEIGHTS)
    forge(copy)
    assert "is not what its name says" in refused(Bundle.load, copy)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("shard", ["../../outside.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", 3])
def test_an_index_of_shards_that_leads_elsewhere_is_refused(copy, shard):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
    forge(copy, list_file("unet/diffusion_pytorch_model.safetensors.index.json"))
    forge(copy)
    assert "takes weights from" in refused(Bundle.load, copy)


def test_weights_and_nulls_must_be_the_models_own(copy, tmp_path):
    other = shutil.copytree(copy, tmp_path / "other")
    tensors = load_file(copy / "null.safetensors")
    tensors["model.label"] += 1
    save_file(tensors, copy / "null.safetensors")
    forge(copy)
    assert "another null" in refused(Bundle.load, copy)
    tensors = load_file(other / WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, other / WEIGHTS, {"format": "pt"})
    forge(other)
    assert "conv_in.weight" in refused(Bundle.load, other)
