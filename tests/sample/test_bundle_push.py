"""Bundles to the Hub: what would be uploaded, the card, and what is refused; no Hub is asked."""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from test_bundle import forge
from test_bundle_forms import SYSTEMS, adapt, save, tiny

from priorguide.sample.bundle import Bundle, BundleError
from priorguide.sample.candidates import with_network
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.push import card, contents, push
from priorguide.train.cli import main

METRICS = {"kid": {"value": 0.0123456, "error": 0.002}, "psnr": {"value": 13.2, "error": 0.1}}
EVIDENCE = {
    "rows": [
        {"prior": "self", "scales": [1.5], "metrics": METRICS},
        {"prior": "base", "scales": [2], "metrics": {"kid": METRICS["kid"], "psnr": {"value": None, "error": None}}},
    ],
    "verdict": {"sentence": "Deploy base at scale 2."},
}


def guided(folder, **options) -> Path:
    model = tiny(PixelUNet)
    model.licence = "MIT"
    prior = tiny(PixelUNet, 1)
    prior.licence = options.pop("prior_licence", "Apache-2.0")
    return save(folder, model, Guidance((2.0,), unconditional(prior, onto=model)), **options)


class Hub:
    """As much of huggingface_hub.HfApi as a push needs."""

    def __init__(self, held=()):
        self.held, self.made, self.operations = list(held), [], []

    def create_repo(self, repository, *, private, exist_ok):
        self.made.append((repository, private, exist_ok))

    def list_repo_files(self, repository):
        return self.held

    def create_commit(self, repository, operations, *, commit_message):
        self.operations = operations
        return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/1")


def test_all_of_a_bundle_and_its_card_go_up_as_one_commit(tmp_path):
    folder = guided(tmp_path / "bundle", evidence=EVIDENCE)
    hub = Hub(held=[".gitattributes", "README.md", "priorguide.json"])
    assert push(folder, "owner/name", api=hub) == "https://hub/owner/name/commit/1"
    assert hub.made == [("owner/name", True, True)]
    sent = {operation.path_in_repo: operation.path_or_fileobj for operation in hub.operations}
    inside = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert sent.keys() == inside | {"README.md", "samples.png"}
    assert Path(sent["priorguide.json"]) == folder / "priorguide.json"
    with Image.open(io.BytesIO(sent["samples.png"])) as picture:
        assert picture.size == (32, 16)  # two pictures of 16 x 16
    Bundle.load(folder)  # nothing was written into it


def test_the_card(tmp_path):
    folder = guided(tmp_path / "bundle", evidence=EVIDENCE, provenance={"commits": {"owner/base": "1" * 40}})
    text = contents(folder, "owner/name")["README.md"].decode()
    _, front, body = text.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["license"] == "mit" and about["base_model"] == ["owner/base"] and "priorguide" in about["tags"]
    assert about["library_name"] == "priorguide" and about["pipeline_tag"] == "image-to-image"
    for expected in (
        "# name\n",
        "![recorded samples](samples.png)",
        "Deploy base at scale 2.",
        "| self | 1.5 | 0.01235 ± 0.002 | 13.2 ± 0.1 |",
        "| base | 2 | 0.01235 ± 0.002 |  |",
        'Bundle.from_pretrained("owner/name")',
        "- model: MIT\n- prior: Apache-2.0",
    ):
        assert expected in body
    assert str(tmp_path) not in text
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]
    compile(code, "card", "exec")


def test_the_card_of_an_adapter_says_how_diffusers_opens_it(tmp_path):
    base = tiny(InstructPix2Pix)
    adapter = adapt(base.network)
    model = with_network(base, adapter.merged())
    guidance = Guidance((1.5, 3.0), unconditional(base, onto=model))
    text = contents(save(tmp_path / "b", model, guidance, adapter=adapter), "a/b")["README.md"].decode()
    assert 'StableDiffusionInstructPix2PixPipeline.from_pretrained("a/b")`, then `load_lora_weights("a/b")`' in text
    assert "library_name: diffusers" in text and "of which only what differs is stored" in text


def test_a_model_alone_has_a_card(tmp_path):
    files = contents(Bundle.save(tmp_path / "model", tiny(PixelUNet)), "owner/name")
    assert "samples.png" not in files and b"without a recipe" in files["README.md"]


def test_weights_that_not_everybody_may_pass_on(tmp_path):
    folder = guided(tmp_path / "bundle", prior_licence="CC-BY-NC-4.0", restricted=True)
    with pytest.raises(ValueError, match="the prior's weights were published under CC-BY-NC-4.0"):
        contents(folder, "owner/name")
    assert "README.md" in contents(folder, "owner/name", restricted=True)


@pytest.mark.parametrize(
    "private", ["/home/me/data", "C:\\Users\\me", "~/pictures", "hf_" + "a" * 30, "idx:/data/me", "ghp_" + "b" * 36]
)
def test_paths_and_keys_stay_here(tmp_path, private):
    folder = guided(tmp_path / "bundle", provenance={"data": {"source": private}})
    hub = Hub()
    with pytest.raises(ValueError, match="priorguide.json holds a path of this machine or a key"):
        push(folder, "owner/name", api=hub)
    assert not hub.made and not hub.operations


@pytest.mark.parametrize("harmless", ["https://huggingface.co/data/x", "owner/name", "and/or", "1/2", "a" * 40])
def test_what_only_looks_like_a_path_goes_up(tmp_path, harmless):
    folder = guided(tmp_path / "bundle", provenance={"data": {"source": harmless}})
    assert contents(folder, "owner/name")


def test_keys_are_known_by_their_values_and_in_tensors_metadata_too(tmp_path, monkeypatch):
    folder = guided(tmp_path / "bundle", evidence={"note": "0123456789abcdef" * 2})
    assert contents(folder, "owner/name")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    with pytest.raises(ValueError, match="priorguide.json holds a path of this machine or a key"):
        contents(folder, "owner/name")
    monkeypatch.delenv("WANDB_API_KEY")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "from": "/home/me/last.ckpt"})
    forge(folder)
    with pytest.raises(ValueError, match="unet/diffusion_pytorch_model.safetensors holds a path of this machine"):
        contents(folder, "owner/name")


@pytest.mark.parametrize("kind", SYSTEMS.values(), ids=SYSTEMS.keys())
def test_every_system_has_a_card(kind, tmp_path):
    text = card(Bundle.load(Bundle.save(tmp_path / "bundle", tiny(kind))), "owner/name")
    about = yaml.safe_load(text.split("---\n", 2)[1])
    assert about["license"] == "unknown" and "license_name" not in about
    assert about["pipeline_tag"] in TASKS and re.search(r"^An? \w+, without", text, re.MULTILINE)
    assert not re.search(r"\b[Aa] [AEIO]\w+, without|\b[Aa]n [^AEIO]", text)


TASKS = {
    "image-to-image", "image-to-video", "text-to-image", "text-to-video", "unconditional-image-generation"
}  # fmt: skip


def test_a_repository_of_something_else_and_a_damaged_bundle(tmp_path):
    folder = guided(tmp_path / "bundle")
    hub = Hub(held=["model.bin", "README.md"])
    with pytest.raises(ValueError, match=r"owner/name holds 1 other files, model\.bin for one"):
        push(folder, "owner/name", api=hub)
    (folder / "unet" / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="has changed"):
        push(folder, "owner/name", api=hub)
    assert not hub.operations


def test_a_dry_run_shows_the_card_and_the_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    folder = guided(tmp_path / "bundle", evidence=EVIDENCE)
    assert main(["push", str(folder), "owner/name", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "license: mit" in shown and "Deploy base at scale 2." in shown
    assert re.search(r"[\d,]+ bytes  unet/diffusion_pytorch_model.safetensors", shown)
    forge(folder, lambda manifest: manifest.update(provenance={"data": "/home/me"}))
    assert main(["push", str(folder), "owner/name", "--dry-run"]) == 1
    assert json.loads((folder / "priorguide.json").read_text())["provenance"] == {"data": "/home/me"}
