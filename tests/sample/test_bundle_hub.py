"""Bundles and priors in the Hub's cache, whose snapshots are links: laid out by hand, and never fetched."""

import hashlib
import json
import shutil

import pytest
from huggingface_hub import constants
from test_bundle import refused
from test_bundle_forms import save, tiny

from priorguide.sample.bundle import Bundle, BundleError
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.kept import same_tensors, save_network
from priorguide.sample.manifest import verify
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.reference import Reference
from priorguide.train.cli import main
from priorguide.train.load import pretrained

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def lay_out(cache, repository, folder):
    """The files of `folder` as owner/name's branch main; returns the snapshot's folder."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        link = home / "snapshots" / COMMIT / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link.symlink_to("../" * len(link.relative_to(home / "snapshots").parts[1:]) + f"../blobs/{blob.name}")
    return home / "snapshots" / COMMIT


@pytest.fixture
def snapshot(cache, tmp_path):
    model = tiny(PixelUNet)
    prior = unconditional(tiny(PixelUNet, 1), onto=model)
    folder = save(tmp_path / "bundle", model, Guidance((2.0,), prior))
    (folder / "README.md").write_text("a card")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    return lay_out(cache, "owner/name", folder)


def test_a_snapshot_of_the_hub_is_a_bundle(snapshot):
    assert (snapshot / "priorguide.json").is_symlink()
    bundle = Bundle.from_pretrained("owner/name")
    assert bundle.folder == snapshot and bundle.replay().identical
    assert same_tensors(pretrained("owner/name").network.state_dict(), bundle.model.network.state_dict())
    assert Bundle.from_pretrained(snapshot).manifest == bundle.manifest
    with pytest.raises(FileNotFoundError, match="does not hold all of owner/other"):
        Bundle.from_pretrained("owner/other")


def test_the_command_line_takes_a_name_on_the_hub(snapshot, tmp_path, capsys):
    assert main(["verify", f"owner/name@{COMMIT}"]) == 0
    assert "bit for bit the same" in capsys.readouterr().out
    assert main(["sample", "owner/name", "--recorded", "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert main(["verify", "owner/other"]) == 1
    assert "does not hold all of owner/other" in capsys.readouterr().err
    assert main(["verify", "runs/of/nothing"]) == 1
    assert "runs/of/nothing is refused: there is no such folder" in capsys.readouterr().err


def leads_to(target):
    def change(snapshot):
        link = snapshot / "unet" / "config.json"
        copy = target(snapshot)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(link, copy) if not copy.exists() else None
        link.unlink()
        link.symlink_to(copy)

    return change


def chain(snapshot):
    """A link in blobs that leads on."""
    link = snapshot / "unet" / "config.json"
    (outside := snapshot.parent / "outside.json").write_bytes(link.read_bytes())
    link.unlink()
    (between := snapshot.parent.parent / "blobs" / "between").symlink_to(outside)
    link.symlink_to(between)


def folder_link(snapshot):
    (snapshot / "unet").rename(elsewhere := snapshot.parent.parent / "blobs" / "unet")
    (snapshot / "unet").symlink_to(elsewhere)


LINKS = {
    "elsewhere": (leads_to(lambda snapshot: snapshot.parent / "outside.json"), "is a link"),
    "another repository": (leads_to(lambda s: s.parents[2] / "models--a--b" / "blobs" / "x"), "is a link"),
    "below blobs": (leads_to(lambda s: s.parents[1] / "blobs" / "deep" / "x"), "is a link"),
    "a chain": (chain, "is a link"),
    "a folder": (folder_link, "is a link"),
    "nowhere": (lambda s: (s.parents[1] / "blobs").rename(s.parents[1] / "gone"), "is a link"),
    "a changed blob": (lambda s: (s / "unet" / "config.json").resolve().write_text("{}"), "has changed"),
    "an extra file": (lambda s: (s / "extra.json").write_text("{}"), "is not part of the bundle"),
    "code": (lambda s: (s / "pipeline.py").write_text("print()"), "may hold code"),
}


@pytest.mark.parametrize("name", LINKS)
def test_links_that_leave_the_cache_are_refused(snapshot, name):
    verify(snapshot)
    change, sentence = LINKS[name]
    change(snapshot)
    assert sentence in refused(verify, snapshot)


def test_the_cards_name_excuses_nothing_elsewhere(tmp_path):
    folder = Bundle.save(tmp_path / "bundle", tiny(PixelUNet))
    (folder / "README.md").write_text("more")
    assert "'README.md' is not part of the bundle" in refused(verify, folder)


# --- a prior by reference


@pytest.fixture
def named(cache, tmp_path):
    """A bundle whose prior is owner/base@main in the cache, which it does not hold; (folder, model, base)."""
    model, base = tiny(PixelUNet), tiny(PixelUNet, 1)
    base.licence = "CC-BY-NC-4.0"  # nothing of it is passed on
    save_network(base.network, tmp_path / "repository" / "unet")
    lay_out(cache, "owner/base", tmp_path / "repository")
    guidance = Guidance((2.0,), unconditional(base, onto=model))
    reference = Reference.parse("owner/base@main")
    return save(tmp_path / "named", model, guidance, prior_held=reference), model, base


def test_a_prior_on_the_hub_is_named_and_not_stored(named):
    folder, _, base = named
    bundle = Bundle.load(folder)
    assert bundle.replay().identical and not (folder / "unconditional_unet").exists()
    assert same_tensors(bundle.guidance.prior.model.network.state_dict(), base.network.state_dict())
    stored = bundle.manifest["prior"]["stored"]
    assert (stored["repository"], stored["revision"]) == ("owner/base", COMMIT)
    assert set(stored["files"]) == {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}


def test_a_prior_that_is_not_in_the_cache(named, cache):
    folder, _, _ = named
    shutil.rmtree(cache / "models--owner--base")
    said = refused(Bundle.load, folder)
    assert f"its prior is owner/base@{COMMIT}, whose unet/config.json is not in the Hub's cache" in said
    assert "fetch it with `hf download owner/base unet/config.json --revision" in said
    verify(folder)  # the folder itself is whole


def test_a_prior_that_has_changed_in_the_cache(named, cache):
    folder, _, _ = named
    weights = cache / "models--owner--base" / "snapshots" / COMMIT / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.resolve().write_bytes(data)
    assert "diffusion_pytorch_model.safetensors of its prior owner/base@" in refused(Bundle.load, folder)


def test_a_reference_to_something_else_is_refused_before_anything_is_written(named, tmp_path):
    _, model, base = named
    other = tiny(PixelUNet, 2)
    with pytest.raises(ValueError, match="owner/base@main holds other weights than the prior"):
        reference = Reference.parse("owner/base@main")
        save(tmp_path / "new", model, Guidance((2.0,), unconditional(other, onto=model)), prior_held=reference)
    assert not (tmp_path / "new").exists()
    for text in ("owner/base", "base@main", "../x@main", "owner/base@"):
        with pytest.raises(ValueError, match="is named owner/name@revision"):
            Reference.parse(text)


def test_a_referenced_config_of_another_network_is_refused(cache, tmp_path):
    model, base = tiny(PixelUNet), tiny(PixelUNet, 1)
    save_network(base.network, tmp_path / "repository" / "unet")
    config = json.loads((tmp_path / "repository/unet/config.json").read_text())
    (tmp_path / "repository/unet/config.json").write_text(json.dumps(config | {"act_fn": "gelu"}))
    lay_out(cache, "owner/base", tmp_path / "repository")
    with pytest.raises(ValueError, match="describes another network than the prior's"):
        guidance = Guidance((2.0,), unconditional(base, onto=model))
        save(tmp_path / "new", model, guidance, prior_held=Reference.parse("owner/base@main"))


def test_errors_of_the_hub_are_bundle_errors_or_plain(tmp_path):
    with pytest.raises(BundleError, match="has no priorguide.json"):
        Bundle.from_pretrained(tmp_path)
