"""Where the files of a named model lie: here already, or on the Hub."""

import re
from collections.abc import Sequence
from pathlib import Path as File

from huggingface_hub import constants, errors, hf_hub_download, snapshot_download

SAFE = ("*.json", "*.safetensors", "*.txt", "*.model")
"""The kinds of file that are fetched unasked: none of them can run code."""

_SPARE = ("*.fp16.*", "*.non_ema.*", "safety_checker/*")
"""Second copies of the same weights, and a classifier of finished pictures."""

_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?P<file>(/(?!\.{1,2}(/|$))[^/\\]+)*)", re.ASCII)
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def locate(name: str | File, *, revision: str | None = None, allow_patterns: str | Sequence[str] | None = None) -> File:
    """The local file or folder of that name as it is; else the Hub's, fetched into its cache unless it is there.

    name: a path; "owner/name", whose snapshot's folder is returned; or "owner/name/path/to/file.ckpt", one file.
    revision: a branch, a tag or a commit. allow_patterns: what to fetch of a whole repository. By default that is SAFE
    files alone, without fp16 copies, and of a pipeline (model_index.json) only what lies in its folders. The cache, the
    token and being offline follow huggingface_hub's environment variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, ...).

    FileNotFoundError, in one sentence: neither a path nor an id, not on the Hub, or not in the cache while the Hub is
    out of reach. PermissionError: its terms are to be accepted first.
    """
    if File(name).exists():
        return File(name)
    neither = f"{str(name)!r} is neither a file or folder here nor a Hub id (owner/name or owner/name/path/to/file)"
    parts = _ID.fullmatch(str(name))
    if not parts or (not parts["file"] and str(name).endswith(_WEIGHTS)):
        raise FileNotFoundError(neither)
    repository, file = parts["repository"], parts["file"].removeprefix("/")
    at = f" at revision {revision!r}" if revision else ""
    try:
        if file:
            return File(hf_hub_download(repository, file, revision=revision))
        if allow_patterns is not None:
            return File(snapshot_download(repository, revision=revision, allow_patterns=_listed(allow_patterns)))
        about = File(snapshot_download(repository, revision=revision, allow_patterns=["*.json"]))
        weights = "*/*.safetensors" if (about / "model_index.json").is_file() else "*.safetensors"
        wanted = [weights, *(pattern for pattern in SAFE if pattern != "*.safetensors")]
        return File(
            snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=list(_SPARE))
        )
    except errors.HFValidationError as error:
        raise FileNotFoundError(neither) from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"the Hub asks for terms to be accepted: do so at {constants.ENDPOINT}/{repository}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{str(name)!r} is no file or folder here, and the Hub shows no {repository} (if it is private, log in "
            "with `hf auth login` or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"the Hub's {repository} has no revision {revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{str(name)!r} is no file or folder here, the Hub is out of reach (or HF_HUB_OFFLINE is set), and its "
            f"cache {constants.HF_HUB_CACHE} does not hold all of {file or repository}{at}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"the Hub's {repository} has no file {file}{at}") from error


def _listed(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
