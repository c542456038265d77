"""Where weights and figures come from: what may be passed on of a run's config, of its data, and of the code."""

import re
import subprocess
from pathlib import Path as File
from typing import Any

from huggingface_hub import constants

from ..callbacks.redact import redact
from ..sample.parts import fingerprint
from .fit import FitCLI


def provenance(cli: FitCLI, state: dict[str, Any], examples: dict[str, Any] | None = None) -> dict[str, Any]:
    """Where the weights come from: the step, the seed, what started and fed the training, with the commits of what
    came from the Hub, and a hash of the held-out `examples`. A bundle is made to be passed on: no secret, and of local
    paths their last part alone."""
    config = cli.config
    told = portable({"model": config.model.as_dict(), "data": config.data.as_dict()})
    return {
        "step": state.get("global_step"),
        "seed": config.seed_everything,
        "model": told["model"].pop("model"),
        "fine_tune": told["model"],
        "data": told["data"],
        "class_names": list(getattr(cli.datamodule, "class_names", ())),
        "commits": _commits(config.model.model.as_dict()),
        "held_out_sha256": fingerprint(examples) if examples else None,
    }


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _portable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if isinstance(value, str) and (found := re.fullmatch(r"(\w+:)?(?:/(?!/)|~/|[A-Za-z]:\\).*?([^/\\]*)[/\\]*", value)):
        return f"{found[1] or ''}{found[2]}"
    return value


def _commits(config: Any, found: dict[str, str] | None = None) -> dict[str, str]:
    """Of every repository on the Hub that a config names, the commit that its cache holds for the revision asked."""
    found = {} if found is None else found
    if isinstance(config, dict):
        for value in config.values():
            if isinstance(value, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", value):
                kept = File(constants.HF_HUB_CACHE, f"models--{value.replace('/', '--')}", "refs")
                ref = kept / str(config.get("revision") or "main")
                if ref.is_file():
                    found[value] = ref.read_text().strip()
            _commits(value, found)
    return found


def portable(config: Any) -> Any:
    """A config as it may be passed on: no secret, and of local paths their last part alone."""
    return _portable(redact(config))


def commit() -> str | None:
    """The commit of the working folder's repository, with "-dirty" where files differ from it; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
