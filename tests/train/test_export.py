"""`priorguide export`: aside, verified, then in place; adapters as base and adapter; how priors are stored."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace
from runs import SYSTEMS, configs
from safetensors.torch import load_file

from priorguide.callbacks.records import LOGGED, read_logged, write_logged
from priorguide.sample.bundle import Bundle, Recorded
from priorguide.sample.candidates import Candidate
from priorguide.sample.model import DiffusionModel
from priorguide.sample.models import stable_diffusion
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.train import export as exporting
from priorguide.train.adapters import Lora, adapter_of
from priorguide.train.cli import main
from priorguide.train.export import deployed, export
from priorguide.train.fine_tune import FineTune
from priorguide.train.fit import load_run
from priorguide.train.provenance import finite, portable, provenance
from priorguide.train.record import comparison_of, full_comparison


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory) -> Path:
    """The folder of two steps with an adapter."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    laid = configs("instruct_pix2pix", "instruct_pix2pix_offline", "lora")
    options = ["--trainer.max_steps", "2", "--checkpoint.every_n_train_steps", "2", "--threads", "1"]
    base = "{class_path: priorguide.sample.models.stable_diffusion.StableDiffusion.tiny}"
    options += ["--trainer.callbacks.init_args.priors", f"{{self: null, base: base, sd15: {base}}}"]
    assert main(["fit", *laid, *options, "--trainer.default_root_dir", str(run)]) == 0
    return run


def test_nothing_takes_its_place_before_it_is_verified(run, tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "out", []

    def fails(folder):
        seen.append((Path(folder), (Path(folder) / "priorguide.json").is_file(), out.exists()))
        raise RuntimeError("the bundle does not reproduce its pictures: no")

    monkeypatch.setattr(exporting, "verify_apart", fails)
    assert main(["export", str(run), "--out", str(out)]) == 1
    assert "does not reproduce its pictures" in capsys.readouterr().err
    ((aside, whole, there),) = seen
    assert whole and not there and aside.parent == tmp_path
    assert not list(tmp_path.iterdir())


BASE = ["--prior", "base", "--scale", "2"]


def test_the_bundles_pictures_are_the_logged_ones(run, tmp_path, monkeypatch, capsys):
    """Of the comparison during training, here: the same conditions and seeds, in another batch."""
    monkeypatch.setattr(exporting, "verify_apart", lambda folder: "not verified apart")
    logged = read_logged(run / "compare" / LOGGED, 2)
    assert logged.keys() == {("self", (2.0,)), ("base", (2.0,))} and len(logged["base", (2.0,)]) == 2
    assert read_logged(run / "compare" / LOGGED, 3) == read_logged(tmp_path / LOGGED, 2) == {}
    assert main(["export", str(run), *BASE, "--out", str(tmp_path / "a")]) == 0
    assert "the 2 pictures that the comparison logged of base, scale 2: the same, within" in capsys.readouterr().out
    made = Bundle.load(tmp_path / "a").recorded().pictures[:2]
    torch.testing.assert_close(made, logged["base", (2.0,)], atol=0.51 / 255, rtol=0)
    assert main(["export", str(run), "--prior", "base", "--scale", "3", "--out", str(tmp_path / "b")]) == 0
    assert "compared with none" in capsys.readouterr().out


def test_a_bundle_of_other_pictures_than_the_logged_ones_is_not_kept(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "verify_apart", lambda folder: "not verified apart")
    (copied := tmp_path / "run").mkdir()
    for name in ("config.yaml", "checkpoints", "compare"):
        copy = shutil.copytree if (run / name).is_dir() else shutil.copyfile
        copy(run / name, copied / name)
    logged = read_logged(copied / "compare" / LOGGED, 2)
    write_logged(copied / "compare" / LOGGED, 2, {("base", (2.0,)): logged["base", (2.0,)].flip(0)}, 2)
    assert main(["export", str(copied), *BASE]) == 1
    assert "does not make the pictures that the comparison logged of base, scale 2: one" in capsys.readouterr().err
    assert {path.name for path in copied.iterdir()} == {"config.yaml", "checkpoints", "compare"}


@pytest.mark.parametrize("prior", ["base", "sd15"])
def test_an_adapters_run_exports_its_base_and_the_adapter(adapted_run, tmp_path, prior):
    out = tmp_path / "bundle"
    assert main(["export", str(adapted_run), "--prior", prior, "--scale", "1.5:7.5", "--out", str(out)]) == 0
    bundle = Bundle.load(out)  # export has replayed it in a process of its own
    assert bundle.manifest["model"]["stored"] == {"form": "adapter"}
    assert bundle.manifest["prior"]["stored"]["form"] == "part"
    assert load_file(out / "unconditional_unet" / "part.safetensors").keys() == {"conv_in.weight", "conv_in.bias"}
    base = StableDiffusion.tiny().network.state_dict()
    unet = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {name for name in unet if not torch.equal(unet[name], base[name])} == {"conv_in.weight", "conv_in.bias"}
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(adapter_file(out)).items() if "lora_B" in name)
    told = bundle.manifest["provenance"]
    assert told["fine_tune"]["lora"]["rank"] == 16 and len(told["held_out_sha256"]) == 64
    assert str(adapted_run) not in (out / "priorguide.json").read_text()


def test_the_configs_own_base_is_no_second_network(adapted_run, monkeypatch):
    loaded, make = [], stable_diffusion.tiny_parts

    def counted(in_channels):
        loaded.append(weakref.ref((parts := make(in_channels)).network))
        return parts

    monkeypatch.setattr(stable_diffusion, "tiny_parts", counted)
    cli, _ = load_run(adapted_run)
    gc.collect()
    assert len(loaded) == 2 and not any(network() for network in loaded)  # what it starts from, and the prior
    record, _, _ = full_comparison(cli, {}, [(2.0, 4.0)])
    assert record["candidates"]["sd15"]["network"] == record["candidates"]["base"]["network"] == "base"
    bytes_by_prior = {row["prior"]: row["extra_bytes"] for row in record["rows"]}
    assert bytes_by_prior["sd15"] == bytes_by_prior["self"] == 0


def test_an_adapter_is_watched_for_saturation_against_its_base(adapted_run, tmp_path):
    cli, state = load_run(adapted_run)
    for parameter in (p for name, p in cli.model.average.named_parameters() if "lora_B" in name):
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    record, _, _ = full_comparison(cli, state, [(1.0, 1.0), (8.0, 8.0)])
    watched = {(one["prior"], one["scales"][0]): one for one in record["saturation"]}
    assert watched["base", 8.0]["energy"] > 1.5 and watched["base", 1.0]["energy"] == pytest.approx(1)
    assert "base at scale 8, 8 goes too far" in watched["base", 8.0]["sentence"]


def adapter_file(folder):
    return folder / "pytorch_lora_weights.safetensors"


def test_a_prior_from_an_adapters_checkpoint_is_merged_too(adapted_run, tmp_path):
    cli, state = load_run(adapted_run)
    cli.datamodule.setup("fit")
    last = str(adapted_run / "checkpoints" / "last.ckpt")
    comparison_of(cli).priors["earlier"] = Candidate(checkpoint=last, weights="model")
    export(cli, state, tmp_path / "bundle", None, None, "earlier", (1.5, 7.5))
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.replay().identical
    assert not any("lora" in name for name, _ in bundle.guidance.prior.model.named_parameters())


def test_a_prior_in_fewer_bits(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "verify_apart", lambda folder: "not verified apart")
    choice = ["--prior", "base", "--scale", "2", "--prior-as"]
    sizes = {}
    for precision in ("float32", "bfloat16", "int8", "nf4"):
        out = tmp_path / precision
        assert main(["export", str(run), *choice, precision, "--out", str(out)]) == 0
        bundle = Bundle.load(out)
        assert bundle.replay().identical
        stored = bundle.manifest["prior"]["stored"]
        sizes[precision] = sum(file.stat().st_size for file in (out / "unconditional_unet").glob("*.safetensors"))
        if precision != "float32":
            assert stored["form"] == precision and 0 < stored["change"]["mean_relative_rms"] < 0.5
            assert f"the prior in {precision} moves the guided prediction by" in capsys.readouterr().out
    assert sizes["nf4"] < sizes["int8"] < sizes["bfloat16"] < sizes["float32"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--prior", "self", "--prior-as", "int8"], "leave --prior-as out"),
        (["--prior", "base", "--prior-as", "int4"], "is named owner/name@revision, got 'int4'"),
    ],
)
def test_priors_that_cannot_be_stored_so(run, tmp_path, capsys, given, sentence):
    assert main(["export", str(run), "--scale", "2", "--out", str(tmp_path / "out"), *given]) == 1
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_taken_apart_without_a_trace():
    torch.manual_seed(0)
    model: DiffusionModel = InstructPix2Pix.from_base(StableDiffusion.tiny(), resolution=16)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    tuning = FineTune(model, lora=Lora(rank=2, lora_alpha=6), ema_decay=0).eval()
    with torch.no_grad():
        for parameter in (p for name, p in model.network.named_parameters() if "lora_" in name):
            parameter += 0.1 * torch.randn_like(parameter)
    adapted = model.network
    x_t, t = torch.randn(2, *model.shape), torch.tensor([10.0, 900.0])
    condition = {"image": torch.randn(2, *model.shape), "text": model.null_text.expand(2, -1, -1)}
    with torch.no_grad(), deployed(tuning) as (plain, adapter):
        assert plain is model and model.network is not adapted and adapter is not None
        merged = model.denoise(x_t, t, condition)
        base = adapter.base.state_dict()
        assert base.keys() == before.keys() and all(torch.equal(base[name], before[name]) for name in base)
        assert model.network.state_dict().keys() == before.keys()
    assert model.network is adapted
    with torch.no_grad():
        expected = model.denoise(x_t, t, condition)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert adapter_of(adapted).factors.keys() == adapter.factors.keys()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_provenance_names_base_and_prior_with_their_commits(run, tmp_path, monkeypatch):
    cli, state = load_run(run)
    cli.datamodule.setup("fit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, branch in (("owner--base", "main"), ("owner--prior", "v2")):
        (refs := tmp_path / f"models--{name}" / "refs").mkdir(parents=True)
        (refs / branch).write_text(COMMIT)
    name = "pretrained_model_name_or_path"
    start = {"class_path": "x.from_base", "init_args": {"base": {"init_args": {name: "owner/base"}}, "other": 1}}
    prior = {"class_path": "y", "init_args": {name: "owner/prior/file.ckpt", "revision": "v2"}}
    monkeypatch.setattr(cli.config.model, "model", Namespace(**start))
    monkeypatch.setattr(comparison_config(cli).init_args, "priors", {"self": None, "base": prior})
    told = provenance(cli, state, "base", cli.datamodule.held_out(2))
    assert told["base"] == [{"id": "owner/base", "revision": None, "commit": COMMIT}]
    assert told["prior"] == [{"id": "owner/prior/file.ckpt", "revision": "v2", "commit": COMMIT}]
    assert told["commits"] == {"owner/base": COMMIT, "owner/prior/file.ckpt": COMMIT}
    assert provenance(cli, state, "self", None)["prior"] == []
    assert told["step"] == 2 and told["trainer"]["max_steps"] == 2 and told["fine_tune"]["ema_decay"] is not None
    data = told["data_fingerprint"]
    assert data == cli.datamodule.fingerprint() and data["held_out"] == len(cli.datamodule.splits.held)
    cli.datamodule.splits.train.pixels[0] += 1
    assert cli.datamodule.fingerprint() != data
    assert str(run.parent) not in json.dumps(told)


def comparison_config(cli):
    return next(c for c in cli.config.trainer.callbacks if c.class_path.endswith("PriorComparison"))


def test_provenance_has_no_path_of_the_machine():
    told = {
        "source": "/home/me/pictures/",
        "idx": "idx:/data/mine",
        "windows": "C:\\Users\\me\\x",
        "home": "~/a/b.ckpt",
        "hub": "owner/name",
        "list": ["/a/b", 3],
        "url": "https://host/a",
    }
    assert portable(told) == {
        "source": "pictures",
        "idx": "idx:mine",
        "windows": "x",
        "home": "b.ckpt",
        "hub": "owner/name",
        "list": ["b", 3],
        "url": "https://host/a",
    }
    assert json.dumps(portable(told))


def test_a_record_without_numbers_that_json_does_not_know():
    record = {
        "rows": [{"metrics": {"fd": {"value": float("nan"), "error": 1.0}}, "scales": (1.5, float("inf"))}],
        "n": 2,
    }
    told = finite(record)
    assert told == {"rows": [{"metrics": {"fd": {"value": None, "error": 1.0}}, "scales": [1.5, None]}], "n": 2}
    json.dumps(told, allow_nan=False)


def test_a_comparison_without_distances_needs_no_other_pictures(tmp_path):
    run, names = tmp_path / "run", ("instruct_pix2pix", "instruct_pix2pix_offline")
    few = ["--trainer.max_steps", "2", "--checkpoint.every_n_train_steps", "2", "--threads", "1"]
    few += ["--data.init_args.max_val_samples", "8", "--trainer.default_root_dir", str(run)]
    assert main(["fit", *configs(*names), *few]) == 0
    assert main(["compare", str(run)]) == 0
    record = json.loads((run / "comparison" / "record.json").read_text())
    assert record["conditions"] == 8 and record["reference"] == 0 and record["data"].keys() == {"held_out_sha256"}


@pytest.mark.parametrize(("system", "options"), [(name, []) for name in SYSTEMS] + [("versatile", ["channels_last"])])
def test_pictures_are_recorded_and_replayed_in_one_layout(system, options, tmp_path, monkeypatch):
    """By the layout of what it is given, and by whether weights ask for a gradient, torch chooses its kernels, which
    round in their own ways, on a GPU in the first place."""
    monkeypatch.setattr(exporting, "verify_apart", lambda folder: "not verified apart")
    run, seen = tmp_path / "run", {"export": [], "verify": []}
    laid = [*configs(system, f"{system}_offline"), "--threads", "1"]
    few = ["--trainer.max_steps", "2", "--checkpoint.every_n_train_steps", "2"]
    assert main(["fit", *laid, *few, "--trainer.default_root_dir", str(run), *layout(options)]) == 0
    comparison = comparison_of(cli := load_run(run)[0])
    (prior,) = comparison.priors.keys() - {"self"}
    scales = ":".join("2" for _ in cli.model.model.ladder)
    draw, replay = Recorded.draw.__func__, Bundle.replay
    monkeypatch.setattr(Recorded, "draw", classmethod(lambda *a, **k: watched(seen["export"], draw, *a, **k)))
    monkeypatch.setattr(Bundle, "replay", lambda *a: watched(seen["verify"], replay, *a))
    assert main(["export", str(run), "--prior", prior, "--scale", scales]) == 0
    assert main(["verify", str(run / "bundle")]) == 0
    assert len(seen["export"]) > 100 and seen["export"] == seen["verify"]


def layout(options):
    return [word for name in options for word in (f"--model.{name}", "true")]


def watched(seen, call, *args, **kwargs):
    """The call; what each module of it was given, and its weights, go to `seen`: shapes, strides, gradients."""

    def look(module, inputs):
        tensors = [*(i for i in inputs if isinstance(i, torch.Tensor)), *module.parameters(recurse=False)]
        seen.append((type(module).__name__, *((tuple(t.shape), t.stride(), t.requires_grad) for t in tensors)))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        return call(*args, **kwargs)
    finally:
        hook.remove()
