"""A thousand and more damaged and forged bundles: each is refused with one sentence, and nothing in it is run."""

import io
import json
import os
import pickle
import random
import shutil
import sys
import zipfile

import pytest
import torch
from test_bundle import flip, forge, refused
from test_bundle_forms import adapt, save, tiny

from priorguide.sample.bundle import Bundle, BundleError, verify
from priorguide.sample.candidates import with_network
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.manifest import canonical
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.models.stable_diffusion import StableDiffusion

RUNS = (
    *("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "ctypes.dlopen"),
    *("socket.connect", "socket.getaddrinfo"),
)
OUTSIDE = "outside-of-every-bundle"
"""In the name of a file that no bundle may open."""
seen: list[str] | None = None


def _watch(event, args):
    if seen is not None and (event in RUNS or (event == "open" and OUTSIDE in str(args[0]))):
        seen.append(f"{event} {args[:1]}")


sys.addaudithook(_watch)  # for good: no hook can be taken back


@pytest.fixture
def watched():
    """What is run, meanwhile, of the kinds that a bundle could ask for."""
    global seen
    seen = []
    yield seen
    seen = None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter, a prior in part, a recorded batch: every kind of file but a tokenizer's."""
    base = tiny(PixelUNet)
    adapter = adapt(base.network)
    model = with_network(base, adapter.merged())
    guidance = Guidance((2.0,), unconditional(base, onto=model), interval=(0, 900))
    return save(tmp_path_factory.mktemp("fuzz") / "bundle", model, guidance, adapter=adapter, evidence={"a": 1})


class Trap:
    def __reduce__(self):
        return os.system, ("true",)


def disguised(draw):
    """A pickle of one kind or another."""
    if draw.random() < 0.5:
        return pickle.dumps(Trap(), protocol=draw.randrange(2, 6))
    if draw.random() < 0.5:
        torch.save({"weight": Trap()}, file := io.BytesIO())
        return file.getvalue()
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap()))
    return file.getvalue()


def damages(draw, names):
    """What happens to files; each returns what it did, or nothing where the folder is as it was."""

    def pick(folder):
        return folder / draw.choice(names)

    def flip_a_bit(folder):
        file = pick(folder)
        flip(file, draw.randrange(file.stat().st_size), draw.randrange(8))

    def cut(folder):
        file = pick(folder)
        os.truncate(file, draw.randrange(file.stat().st_size))

    def swap(folder):
        first, second = draw.sample(names, 2)
        (folder / first).rename(folder / "held")
        (folder / second).rename(folder / first)
        (folder / "held").rename(folder / second)

    def edit(folder):
        file = folder / draw.choice([name for name in names if name.endswith(".json")])
        value = json.loads(file.read_text())
        value[draw.choice(sorted(value))] = draw.choice([None, 0, "x", [], {}, True, -1.5, "../x"])
        file.write_bytes(canonical(value))

    def link(folder):
        file = pick(folder)
        file.rename(elsewhere := folder.parent / f"{folder.name}.moved")
        file.symlink_to(
            draw.choice([elsewhere, "/etc/hostname", "nowhere", ".", os.path.relpath(elsewhere, file.parent)])
        )

    def link_folder(folder):
        place = draw.choice(sorted(path for path in folder.iterdir() if path.is_dir()))
        place.rename(elsewhere := folder.parent / f"{folder.name}.moved")
        place.symlink_to(elsewhere)

    def add(folder):
        name = draw.choice(["a.json", "b.pkl", "c", "d.safetensors", "e.py", "pipeline.py", "f.bin", "README.md", ".x"])
        (pick(folder).parent / name).write_bytes(draw.choice([b"{}", b"", disguised(draw)]))

    def disguise(folder):
        pick(folder).write_bytes(disguised(draw))

    def append(folder):
        file = pick(folder)
        file.write_bytes(file.read_bytes() + draw.choice([b"\n", b"\0", b" ", b"{}"]))

    def leave(folder):
        """A path that leaves the folder, listed in the manifest."""
        name = draw.choice(
            ["../out.json", "/etc/x.json", "unet/../../out.json", "..\\out.json", "C:/x.json", "a//b.json"]
        )
        forge(folder, lambda manifest: manifest["files"].update({name: "0" * 64}))

    def remove(folder):
        pick(folder).unlink()

    return [flip_a_bit, flip_a_bit, cut, swap, edit, link, link_folder, add, disguise, append, leave, remove]


def content(folder):
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("cases", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_whatever_is_damaged_is_refused(saved, tmp_path, watched, cases):
    draw = random.Random(0)
    names = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file())
    assert len(names) >= 8
    before, kinds = content(saved), damages(draw, names)
    verify(saved)
    done = 0
    while done < cases:
        folder = shutil.copytree(saved, tmp_path / "copy")
        draw.choice(kinds)(folder)
        if content(folder) != before:  # an edit may set what was there
            done += 1
            message = refused(verify, folder)
            if done % 20 == 0:
                assert refused(Bundle.load, folder) == message
        shutil.rmtree(folder)
        for moved in tmp_path.glob("copy.moved"):
            shutil.rmtree(moved) if moved.is_dir() else moved.unlink()
    assert not watched


def places(value, path=()):
    """Every place in a JSON value."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


NASTY = [{"../../x": ["os.system"]}, "__import__('os').system('true')", [["/etc/passwd"]], "../../etc/passwd"]
READ = ("model", "prior", "guidance", "sampler", "timesteps", "null", "recorded", "licences", "files", "format_version")
"""What loading reads of a manifest; the rest is told to people."""

TOLD = {("prior", "stored", "change"), ("recorded", "device"), ("licences", "model"), ("licences", "prior")}


def caught(folder) -> bool:
    """Whether the bundle is not loaded, or does not make its recorded pictures: what `priorguide verify` finds."""
    try:
        return not Bundle.load(folder).replay().identical
    except BundleError as error:
        return "\n" not in str(error)


@pytest.mark.parametrize("cases", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_a_manifest_of_nonsense_is_caught(saved, tmp_path, watched, cases):
    """With hashes that fit: whoever writes the folder can do that."""
    draw = random.Random(1)
    manifest = json.loads((saved / "priorguide.json").read_text())
    wanted = [path for path in places({name: manifest[name] for name in READ}) if path not in TOLD]
    folder = shutil.copytree(saved, tmp_path / "copy")
    original = (folder / "priorguide.json").read_bytes()
    for path in draw.sample(wanted * 10, cases):
        value = draw.choice(NASTY)

        def change(manifest, path=path, value=value):
            for key in path[:-1]:
                manifest = manifest[key]
            manifest[path[-1]] = value

        forge(folder, change)
        assert caught(folder), f"{path} as {value!r} was taken"
        (folder / "priorguide.json").write_bytes(original)
    assert not watched


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """With an autoencoder, a text encoder, a tokenizer and an index: all that diffusers and transformers read."""
    base = tiny(StableDiffusion)
    model = InstructPix2Pix.from_base(base, resolution=16).eval()
    return save(
        tmp_path_factory.mktemp("latent") / "bundle", model, Guidance((1.5, 3.0), unconditional(base, onto=model))
    )


def test_an_encoder_takes_its_weights_from_its_own_folder(latent, tmp_path):
    """safetensors opens files without Python's knowing, so that no watch would see it."""
    folder = shutil.copytree(latent, tmp_path / "copy")
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_weights": "../../outside.safetensors"}))
    forge(folder)
    assert "would take its weights from elsewhere" in refused(Bundle.load, folder)


LURES = ("transformers_weights", "auto_map", "quantization_config", "attn_implementation", "vocab_file", "weight_map")
"""Keys by which one of the two libraries would read another file, or other code."""


@pytest.mark.parametrize("cases", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_contents_of_nonsense_run_nothing_and_leave_no_folder(latent, tmp_path, watched, cases):
    """With hashes that fit, which whoever writes the folder can see to: what loads, loads what lies in the folder; what
    does not is refused with one sentence. A file beside the bundle, named in its JSON, is never opened."""
    draw = random.Random(2)
    (tmp_path / f"{OUTSIDE}.safetensors").write_bytes((latent / "null.safetensors").read_bytes())
    (tmp_path / f"{OUTSIDE}.json").write_text("{}")
    watched.clear()
    outside = [f"../../{OUTSIDE}.safetensors", f"../../{OUTSIDE}.json", str(tmp_path / f"{OUTSIDE}.json")]
    names = sorted(path.relative_to(latent).as_posix() for path in latent.rglob("*") if path.is_file())
    told = [name for name in names if name.endswith(".json") and name != "priorguide.json"]
    outcomes = []
    for case in range(cases):
        folder = shutil.copytree(latent, tmp_path / "copy")
        if case % 2:
            name = draw.choice(told)
            value = json.loads((folder / name).read_text())
            path = draw.choice([*places(value), *[(key,) for key in LURES] * 3])
            inner = value
            for key in path[:-1]:
                inner = inner[key]
            lure = draw.choice(outside)
            inner[path[-1]] = draw.choice([lure, {"w": lure}, *NASTY, None, -1, [], f"{OUTSIDE}/kernels"])
            (folder / name).write_bytes(canonical(value))
        else:
            name = draw.choice([name for name in names if name != "priorguide.json"])
            file = folder / name
            damage = draw.randrange(3)
            if damage == 0:
                flip(file, draw.randrange(file.stat().st_size), draw.randrange(8))
            elif damage == 1:
                os.truncate(file, draw.randrange(file.stat().st_size))
            else:
                file.write_bytes(disguised(draw))
        forge(folder)
        try:
            Bundle.load(folder)
            outcomes.append(True)
        except BundleError as error:
            assert "\n" not in str(error) and str(error).startswith(f"{folder} is refused: ")
            outcomes.append(False)
        assert not watched, f"{name}: {watched}"
        shutil.rmtree(folder)
    assert outcomes.count(False) > cases / 3


def test_a_component_of_nonsense_is_refused(tmp_path, watched):
    """Configs of networks, encoders and tokenizers that name other classes, code, or files elsewhere, with hashes
    that fit."""
    base = tiny(StableDiffusion)
    model = InstructPix2Pix.from_base(base, resolution=16).eval()
    folder = save(tmp_path / "bundle", model, Guidance((1.5, 3.0), unconditional(base, onto=model)))
    for name, key in (
        ("unet/config.json", "_class_name"),
        ("vae/config.json", "_class_name"),
        ("unconditional_unet/config.json", "_class_name"),
        ("text_encoder/config.json", "architectures"),
        ("tokenizer/tokenizer_config.json", "tokenizer_class"),
        ("scheduler/scheduler_config.json", "_class_name"),
        ("model_index.json", "vae"),
    ):
        original = (folder / name).read_bytes()
        for value in ("Popen", ["os", "system"]):
            changed = json.loads(original) | {key: [value] if key == "architectures" else value}
            changed["auto_map"] = {"AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]}
            if name == "model_index.json" and isinstance(value, str):
                continue
            (folder / name).write_bytes(canonical(changed))
            forge(folder)
            refused(Bundle.load, folder)
        (folder / name).write_bytes(original)
    forge(folder)
    Bundle.load(folder)
    assert not watched
