"""A bundle on the Hub: what is uploaded, and the model card that goes with it."""

import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .bundle import INDEX, Bundle
from .components import NOT_FOR_ALL
from .manifest import BESIDE, MANIFEST
from .model import DiffusionModel
from .pictures import to_pil

LICENCES = {
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
    "CC-BY-NC-4.0": "cc-by-nc-4.0",
    "CreativeML OpenRAIL-M": "creativeml-openrail-m",
    "CreativeML OpenRAIL++-M": "openrail++",
}
"""The Hub's words for licences; "other" for the rest, "unknown" where none is told."""
PRIVATE = re.compile(
    r"(?:file://|(?<![\w./-])(?:/(?:home|root|Users|mnt|tmp|work|data|scratch|var|opt|srv)/[\w.]|~/|[A-Za-z]:\\\\))"
    r"|\b(?:hf_[A-Za-z0-9]{16,}|wandb_v\d_\w{16,}|(?:sk|rk|pk)-[\w-]{20,}|gh[opsur]_\w{16,}|(?:AKIA|ASIA)[A-Z0-9]{16})"
)
"""What has no place on the Hub: paths of a machine, and keys."""
SECRET = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
SHOWN = 8
"""Recorded pictures on the card, at most."""


def push(folder: File, repository: str, *, private: bool = True, restricted: bool = False, api: Any = None) -> str:
    """Uploads a bundle, its card and its pictures as one commit, and returns the commit's address.

    The repository is made where it is not there. api: a huggingface_hub.HfApi, with the token of the environment by
    default. BundleError as `Bundle.load`; ValueError for weights that not everybody may pass on (unless `restricted`),
    for a path or a key in what would be uploaded, and for a repository that holds files of something else.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = contents(folder, repository, restricted=restricted)
    api = api or HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    if others := sorted(set(api.list_repo_files(repository)) - set(files) - set(BESIDE)):
        raise ValueError(
            f"{repository} holds {len(others)} other files, {others[0]} for one, which would make it no bundle: choose "
            "an empty repository"
        )
    operations = [
        CommitOperationAdd(name, str(file) if isinstance(file, File) else file) for name, file in files.items()
    ]
    return str(api.create_commit(repository, operations, commit_message="A bundle of priorguide").commit_url)


def contents(folder: File, repository: str, *, restricted: bool = False) -> dict[str, File | bytes]:
    """What `push` uploads, by its name in the repository: the bundle's files, README.md, and samples.png where there
    are recorded pictures. Errors as `push`."""
    bundle = Bundle.load(folder)
    for whose, licence in (bundle.manifest["licences"] or {}).items():
        held = whose == "model" or _form(bundle.manifest["prior"]) != "reference"
        if licence in NOT_FOR_ALL and held and not restricted:
            raise ValueError(
                f"the {whose}'s weights were published under {licence}: upload them with restricted=True "
                "(--restricted) if you may pass them on"
            )
    names = [MANIFEST, *bundle.manifest["files"]]
    files: dict[str, File | bytes] = {name: folder / name for name in sorted(names)}
    pictures = bundle.recorded().pictures if bundle.manifest["recorded"] else None
    if pictures is not None:
        files["samples.png"] = strip(pictures[:SHOWN])
    files["README.md"] = card(bundle, repository).encode()
    for name, file in files.items():
        if found := _private(_told(name, file)):
            raise ValueError(f"{name} holds a path of this machine or a key ({found[:8]}...): export it without")
    return files


def _told(name: str, file: File | bytes) -> str:
    """What a file says in words: the metadata alone of tensors, and nothing of vocabularies, which hold any text."""
    if name.endswith(".safetensors"):
        with safe_open(file, "pt") as tensors:
            return json.dumps(tensors.metadata())
    if name.endswith(("README.md", "config.json", MANIFEST, INDEX)):
        return file.read_text() if isinstance(file, File) else file.decode()
    return ""


def _private(text: str) -> str | None:
    """A path or a key in the text: by its form, or as the value of an environment variable called as keys are."""
    if found := PRIVATE.search(text):
        return found[0]
    own = [value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= 8]
    return next((value for value in own if value in text), None)


def strip(pixels: Tensor) -> bytes:
    """Pictures (N, C, H, W) in [0, 1] side by side, of clips (N, C, F, H, W) the first frames, as a PNG file."""
    frames = pixels[:, :, 0] if pixels.ndim == 5 else pixels
    to_pil(frames.movedim(0, 2).flatten(2, 3)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def _form(stored: Mapping[str, Any] | None) -> str:
    return str((stored or {}).get("stored", {}).get("form", "whole"))


def card(bundle: Bundle, repository: str) -> str:
    """The model card, in Markdown with the Hub's metadata on top."""
    manifest = bundle.manifest
    parts = [_metadata(bundle), f"# {repository.rpartition('/')[2]}", _about(bundle)]
    if manifest["recorded"]:
        parts.append("![recorded samples](samples.png)")
    parts += [_verdict(manifest["evidence"] or {}), _how_to_sample(bundle, repository), _licences(manifest)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(bundle: Bundle) -> str:
    licence = (bundle.manifest["licences"] or {}).get("model")
    bases = sorted((bundle.manifest["provenance"] or {}).get("commits") or {})
    known = LICENCES.get(licence, "other") if licence else "unknown"
    lines = [
        "---",
        f"license: {known}",
        *([f"license_name: {json.dumps(licence)}"] if known == "other" else []),
        f"library_name: {'diffusers' if INDEX in bundle.manifest['files'] else 'priorguide'}",
        *(["base_model:", *(f"- {base}" for base in bases)] if bases else []),
        f"pipeline_tag: {_task(bundle.model)}",
        "tags:",
        *(f"- {tag}" for tag in ("priorguide", "diffusion", type(bundle.model).__name__.lower())),
        "---",
    ]
    return "\n".join(lines)


def _task(model: DiffusionModel) -> str:
    """The Hub's word for what the model does."""
    given = model.ladder[-1] | model.always
    made = "video" if len(model.shape) == 4 else "image"
    taken = "image" if "image" in given else "text" if "text" in given else "unconditional"
    return f"{taken}-to-{made}" if taken != "unconditional" else "unconditional-image-generation"


def _named(model: DiffusionModel, an: str = "an", a: str = "a") -> str:
    """Its class with an article."""
    name = type(model).__name__
    return f"{an if name[0] in 'AEIO' else a} {name}"


def _about(bundle: Bundle) -> str:
    model, manifest = bundle.model, bundle.manifest
    if bundle.guidance is None or bundle.sampler is None:
        return f"{_named(model, 'An', 'A')}, without a recipe for guidance."
    scales, prior = bundle.guidance.scales, bundle.guidance.prior
    at = f"scale{'s' if len(scales) > 1 else ''} {', '.join(f'{scale:g}' for scale in scales)}"
    guided = "its own unconditional prediction" if prior is None else f"that of {_named(prior.model)}"
    how = {
        "whole": "",
        "part": ", of which only what differs is stored",
        "reference": f", which is not in here: {_at(manifest['prior'])}",
    }
    form = _form(manifest["prior"])
    change = ((manifest["prior"] or {}).get("stored") or {}).get("change")
    held = how.get(form, f", stored in {form}")
    if change:
        held += f", which moves the guided prediction by {change['mean_relative_rms']:.2g} of its size"
    sampler = bundle.sampler
    return (
        f"{_named(model, 'An', 'A')} for guidance by {guided}{held if prior else ''}; {at}; "
        f"{sampler.scheduler}, {sampler.steps} steps."
    )


def _at(prior: Mapping[str, Any] | None) -> str:
    stored = (prior or {}).get("stored") or {}
    return f"{stored.get('repository')} at {stored.get('revision')}"


def _verdict(evidence: Any) -> str:
    """The comparison's sentence, and a table of its rows."""
    rows = evidence.get("rows") if isinstance(evidence, dict) else None
    if not rows:
        return ""
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    sentence = (evidence.get("verdict") or {}).get("sentence", "")
    table = [f"| prior | scale | {' | '.join(metrics)} |", "|" + "---|" * (2 + len(metrics))]
    for row in rows:
        found = [row["metrics"].get(name) for name in metrics]
        cells = [f"{m['value']:.4g} ± {m['error']:.2g}" if m and None not in m.values() else "" for m in found]
        table.append(f"| {row['prior']} | {', '.join(f'{s:g}' for s in row['scales'])} | {' | '.join(cells)} |")
    return "\n".join(["## Which prior, and why", "", sentence, "", *table])


def _how_to_sample(bundle: Bundle, repository: str) -> str:
    code = [
        "## How to sample",
        "",
        "```python",
        "from priorguide.sample.bundle import Bundle",
        "",
        f'bundle = Bundle.from_pretrained("{repository}")',
    ]
    if bundle.guidance is not None:
        parts = ", ".join(f'"{name}": ...' for name in sorted(bundle.model.ladder[-1] | bundle.model.always))
        code += [
            f"condition = bundle.model.encode_condition({{{parts}}})",
            "pixels = bundle.sample(condition, seeds=[0])  # (B, C, H, W) in [0, 1]",
        ]
    code.append("```")
    if INDEX in bundle.manifest["files"]:
        name = json.loads((bundle.folder / INDEX).read_text())["_class_name"]
        adapter = f', then `load_lora_weights("{repository}")`' if _form(bundle.manifest["model"]) == "adapter" else ""
        code += [
            "",
            f'It opens with diffusers as well, without the prior: `{name}.from_pretrained("{repository}")`{adapter}.',
        ]
    return "\n".join(code)


def _licences(manifest: Mapping[str, Any]) -> str:
    lines = [f"- {whose}: {licence or 'not known'}" for whose, licence in (manifest["licences"] or {}).items()]
    return "\n".join(["## Licences", "", "What the weights were published under:", "", *lines]) if lines else ""
