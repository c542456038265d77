"""A prior that a bundle names and does not hold: a network in a repository on the Hub, at one commit, with hashes."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from .hub import locate
from .manifest import BundleError, sha256

_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)@(?P<revision>\w[\w./-]*)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLAIN = re.compile(r"(\w[\w-]*/)?\w[\w.-]*\.(json|safetensors)", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """`repository` ("owner/name") at `revision`, a commit once it is stored; a diffusers folder or a network's."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """ "owner/name@revision". ValueError for anything else."""
        if not (parts := _NAME.fullmatch(text)):
            raise ValueError(f"a prior on the Hub is named owner/name@revision, got {text!r}")
        return cls(parts["repository"], parts["revision"])

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Reference":
        reference = cls.parse(f"{stored['repository']}@{stored['revision']}")
        if not _COMMIT.fullmatch(reference.revision):
            raise BundleError(f"a prior on the Hub is stored by its commit, got {reference.revision!r}")
        return reference


@dataclass(frozen=True)
class Referenced:
    """The files of a reference that lie here: its config and its weights, with the hashes of all by their names."""

    reference: Reference
    config: File
    files: list[File]
    hashes: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        at = self.reference
        return {"repository": at.repository, "revision": at.revision, "files": self.hashes}


def referenced(reference: Reference, folder: str, hashes: Mapping[str, str] | None = None) -> Referenced:
    """The network of that name (its `folder`, or the repository's own root) from the Hub's cache.

    hashes: as stored, SHA-256 by file; then nothing is fetched. BundleError where a file is not in the cache, or is
    another; without hashes, ValueError where the repository holds no network as safetensors, FileNotFoundError as
    `locate`.
    """
    if hashes is not None:
        return _from_cache(reference, hashes)
    wanted = [f"{folder}/*.json", f"{folder}/*.safetensors", "config.json", "diffusion_pytorch_model*"]
    root = locate(reference.repository, revision=reference.revision, allow_patterns=wanted)
    if not _COMMIT.fullmatch(root.name):
        raise ValueError(f"{reference} is a folder here: a prior on the Hub is named owner/name@revision")
    place = root / folder if (root / folder / "config.json").is_file() else root
    files = _weights(place)
    if not files or not (place / "config.json").is_file():
        raise ValueError(f"{reference} has no config.json with safetensors in {folder}/: store the prior itself")
    named = {file.relative_to(root).as_posix(): sha256(file) for file in [place / "config.json", *files]}
    return Referenced(Reference(reference.repository, root.name), place / "config.json", files, named)


def _weights(place: File) -> list[File]:
    """diffusers' one file, or the shards of its index."""
    name = "diffusion_pytorch_model.safetensors"
    if (index := place / f"{name}.index.json").is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        return sorted(place / shard for shard in shards if File(shard).name == shard)
    return [place / name] if (place / name).is_file() else []


def _from_cache(reference: Reference, hashes: Mapping[str, str]) -> Referenced:
    from huggingface_hub import constants, try_to_load_from_cache

    found = {}
    for name, digest in hashes.items():
        if not _PLAIN.fullmatch(name):
            raise BundleError(f"a prior on the Hub is made of JSON and safetensors, got {name!r}")
        path = try_to_load_from_cache(reference.repository, name, revision=reference.revision)
        if not isinstance(path, str):
            raise BundleError(
                f"its prior is {reference}, whose {name} is not in the Hub's cache {constants.HF_HUB_CACHE}: fetch it "
                f"with `hf download {reference.repository} {name} --revision {reference.revision}`"
            )
        if sha256(File(path)) != digest:
            raise BundleError(f"{name} of its prior {reference} has changed in the Hub's cache; fetch it anew")
        found[name] = File(path)
    configs = [file for name, file in found.items() if name.endswith("config.json")]
    if len(configs) != 1 or len(found) < 2:
        raise BundleError(f"its prior {reference} must have one config.json and its weights, got {sorted(found)}")
    return Referenced(reference, configs[0], [f for f in found.values() if f != configs[0]], dict(hashes))
