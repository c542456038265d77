"""A folder of safetensors and JSON with every file's hash in one manifest: written whole or not at all, and verified.

The hashes find damage and mix-ups, not forgery: who can write the folder can also write a new manifest.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

FORMAT_VERSION = 2
"""2 has networks stored in other forms than whole, and the timesteps; bundles of 1 are read as before."""
MANIFEST = "priorguide.json"
NULL, RECORDED = "null.safetensors", "recorded.safetensors"
SUFFIXES = (".safetensors", ".json", ".txt", ".md")
"""The only kinds of file in a bundle: none of them can hold code."""
BESIDE = ("README.md", "samples.png", ".gitattributes")
"""What a repository on the Hub has besides the bundle; in its cache these are left alone, and unread."""
FIELDS = {
    "format_version": int,
    "model": dict,
    "prior": dict | None,
    "guidance": dict | None,
    "sampler": dict | None,
    "null": dict,
    "recorded": dict | None,
    "evidence": object,
    "provenance": dict | None,
    "licences": dict | None,
    "environment": dict,
    "files": dict,
}
FIELDS_OF_2 = {"timesteps": dict | None}
FIELDS_OF_RECORDED = {"batch": int, "max_batch": int | None, "threads": int, "device": str}


class BundleError(ValueError):
    """A folder that is not a bundle, or no longer the one that was written; says why in one sentence."""


def canonical(value: Any) -> bytes:
    """The one way a JSON value is written: sorted keys, indented, UTF-8. ValueError, TypeError for what is no JSON."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256(file: File) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def new_folder(folder: File) -> Iterator[File]:
    """A temporary folder beside `folder`, which takes its name, on disk, once the block ends well.

    FileExistsError where `folder` exists. OSError from a disk that is full; no failure leaves anything behind.
    """
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already; choose another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError | OSError):
            raise OSError(f"{folder} could not be written: {error}") from error
        raise
    _sync(folder.parent)


def _sync(path: File) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: File, manifest: dict[str, Any]) -> None:
    """Writes the manifest of all files now in `folder`, with their hashes and its own."""
    names = _files(folder)
    manifest = {**manifest, "files": {name: sha256(folder / name) for name in names}}
    own = hashlib.sha256(canonical(manifest)).hexdigest()
    (folder / MANIFEST).write_bytes(canonical({**manifest, "manifest_sha256": own}))
    for name in names:  # safetensors writes for the owner's eyes only
        shutil.copymode(folder / MANIFEST, folder / name)


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a bundle whose every file is as it was written. BundleError, in one sentence, otherwise.

    Reads and hashes only: nothing in the folder is run or unpickled.
    """
    folder = File(folder)
    with refusing(folder):
        found = _files(folder)
        if MANIFEST not in found:
            raise BundleError(f"it has no {MANIFEST}, so it is not a bundle")
        manifest = _read(folder / MANIFEST)
        for name in (listed := manifest["files"]):
            _check_name(name)
        found.remove(MANIFEST)
        if missing := sorted(set(listed) - set(found)):
            raise BundleError(f"{missing[0]!r} is missing; get the bundle anew")
        if extra := sorted(set(found) - set(listed)):
            raise BundleError(f"{extra[0]!r} is not part of the bundle; remove it or get the bundle anew")
        needed = [NULL, *([RECORDED] if manifest["recorded"] else [])]
        if missing := sorted(set(needed) - set(listed)):
            raise BundleError(f"{MANIFEST} lists no {missing[0]}; write bundles with Bundle.save")
        for name, digest in listed.items():
            if sha256(folder / name) != digest:
                raise BundleError(f"{name!r} has changed since it was written; get the bundle anew")
            _check_contents(folder / name, name)
    return manifest


@contextmanager
def refusing(folder: File) -> Iterator[None]:
    """Whatever goes wrong inside, as one BundleError sentence about `folder`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        named = isinstance(error, BundleError)
        reason = str(error) if named else f"it cannot be read ({type(error).__name__}: {error})"
        raise BundleError(f"{folder} is refused: {textwrap.shorten(reason, 500)}") from error


def _read(file: File) -> dict[str, Any]:
    """The manifest, if it is exactly what `seal` writes."""
    raw = file.read_bytes()
    try:
        manifest = json.loads(raw.decode())
        exact = canonical(manifest) == raw
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST} is not JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{MANIFEST} must be a JSON object, got a {type(manifest).__name__}")
    version = manifest.get("format_version")
    if type(version) is not int or version < 1:
        raise BundleError(f"{MANIFEST} must have a format_version of 1 or more, got {version!r}")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"its format_version is {version}, newer than {FORMAT_VERSION}, the newest known here; upgrade priorguide"
        )
    for name, kind in {**FIELDS, **(FIELDS_OF_2 if version >= 2 else {})}.items():
        if name not in manifest or not isinstance(manifest[name], kind):
            raise BundleError(f"{MANIFEST} lacks a proper {name!r}; write bundles with Bundle.save")
    for name, kind in FIELDS_OF_RECORDED.items():
        if (recorded := manifest["recorded"]) is not None and not isinstance(recorded.get(name, ()), kind):
            raise BundleError(
                f"{MANIFEST} lacks a proper {name!r} of the recorded batch; write bundles with Bundle.save"
            )
    own = manifest.pop("manifest_sha256", None)
    if not exact or own != hashlib.sha256(canonical(manifest)).hexdigest():
        raise BundleError(f"{MANIFEST} has changed since it was written; get the bundle anew")
    return manifest


def _files(folder: File) -> list[str]:
    """The POSIX paths of all files in the folder; a link or a special file is refused.

    In a snapshot of the Hub's cache, which is all links, those into the same repository's blobs are files.
    """
    if not folder.is_dir():
        raise BundleError("there is no such folder")
    blobs = _blobs(folder)
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if blobs and name in BESIDE:
            continue
        if path.is_symlink() and not (blobs and _lies_in(path, blobs)):
            raise BundleError(f"{name!r} is a link; a bundle holds its files itself")
        if path.is_dir():
            continue
        if not path.is_file():
            raise BundleError(f"{name!r} is not a regular file")
        _check_name(name)
        names.append(name)
    return names


def _blobs(folder: File) -> File | None:
    """Where the files of a snapshot in the Hub's cache lie: models--owner--name/blobs, beside its snapshots/<commit>;
    None for any other folder."""
    repository = folder.resolve().parent.parent
    cached = folder.resolve().parent.name == "snapshots" and repository.name.startswith("models--")
    return repository / "blobs" if cached and (repository / "blobs").is_dir() else None


def _lies_in(link: File, blobs: File) -> bool:
    """Whether the link leads straight to a regular file in the folder."""
    target = File(os.path.normpath(link.parent.resolve() / os.readlink(link)))
    return target.parent == blobs and target.is_file() and not target.is_symlink()


def _check_name(name: str) -> None:
    if set(name) & set("\\:\0") or any(part in ("", ".", "..") for part in name.split("/")):
        raise BundleError(f"the path {name!r} may leave the folder; paths are relative, with / between their parts")
    if not name.endswith(SUFFIXES):
        raise BundleError(f"{name!r} may hold code; a bundle holds only {', '.join(SUFFIXES)} files")


def _check_contents(file: File, name: str) -> None:
    """A file that is not what its name says, such as a pickle in disguise, is refused."""
    try:
        if name.endswith(".safetensors"):
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        elif name.endswith(".json"):
            value = json.loads(file.read_bytes().decode())
            if name.endswith(".index.json"):
                _check_shards(value["weight_map"].values(), name)
        else:
            file.read_bytes().decode()
    except (SafetensorError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{name!r} is not what its name says ({error})") from error


def _check_shards(shards: Any, name: str) -> None:
    """diffusers and transformers read the files that an index names, wherever they lie."""
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise BundleError(f"{name!r} takes weights from {shard!r}: they lie beside it, as safetensors")
