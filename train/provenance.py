"""Where weights and figures come from: what may be passed on of a run's config, of its data, and of the code."""

import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any

from huggingface_hub import constants

from ..callbacks.redact import redact
from ..sample.parts import fingerprint
from .fit import FitCLI

NAME = "pretrained_model_name_or_path"


def provenance(
    cli: FitCLI, state: dict[str, Any], prior: str | None = None, examples: dict[str, Any] | None = None
) -> dict[str, Any]:
    """As JSON: the step and seed; what training started from ("base") and the prior called `prior`, each model by its
    name or Hub id, revision and commit; the resolved config; a fingerprint of the data, and of the held-out `examples`.

    Secrets are left out, and of local paths all but their last part.
    """
    config = cli.config
    told = portable({name: config[name].as_dict() for name in ("model", "data", "trainer")})
    trainer = {name: value for name, value in told["trainer"].items() if name not in ("logger", "default_root_dir")}
    base, of_prior = config.model.model.as_dict(), _candidate(config.trainer.as_dict(), prior)
    of_data = getattr(cli.datamodule, "fingerprint", None)
    return {
        "step": state.get("global_step"),
        "seed": config.seed_everything,
        "base": portable([*_models(base)]),
        "prior": portable([*_models(of_prior)]),
        "model": told["model"].pop("model"),
        "fine_tune": told["model"],
        "trainer": trainer,
        "data": told["data"],
        "data_fingerprint": of_data() if of_data and examples else None,
        "class_names": list(getattr(cli.datamodule, "class_names", ())),
        "commits": _commits(base) | _commits(of_prior),
        "held_out_sha256": fingerprint(examples) if examples else None,
    }


def _candidate(trainer: dict[str, Any], prior: str | None) -> Any:
    """The config of the prior of that name, under whichever callback compares it; None where it has none."""
    for callback in trainer.get("callbacks") or ():
        priors = callback.get("init_args", {}).get("priors", {})
        if prior in priors:
            return priors[prior]
    return None


def _models(config: Any) -> Iterator[dict[str, str | None]]:
    """Every model that a config names, at any depth: its name or Hub id, the revision asked for, and the commit."""
    if isinstance(config, dict):
        if isinstance(name := config.get(NAME), str):
            yield {"id": name, "revision": config.get("revision"), "commit": _commit(name, config.get("revision"))}
        for value in config.values():
            yield from _models(value)


def _commits(config: Any) -> dict[str, str]:
    """Of every repository on the Hub that a config names, its models' and others', the commit."""
    found: dict[str, str] = {}
    if isinstance(config, dict):
        for value in config.values():
            if isinstance(value, str) and (commit := _commit(value, config.get("revision"))):
                found[value] = commit
            found |= _commits(value)
    return found


def _commit(name: str, revision: Any) -> str | None:
    """What the Hub's cache holds for the revision of "owner/name" or "owner/name/file"; None where it holds none."""
    if File(name).exists() or not (parts := re.match(r"([\w.-]+)/([\w.-]+)", name)):
        return None
    kept = File(constants.HF_HUB_CACHE, f"models--{parts[1]}--{parts[2]}")
    if re.fullmatch(r"[0-9a-f]{40}", str(revision)) and kept.is_dir():
        return str(revision)
    ref = kept / "refs" / str(revision or "main")
    return ref.read_text().strip() if ref.is_file() else None


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _portable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if isinstance(value, str) and (found := re.fullmatch(r"(\w+:)?(?:/(?!/)|~/|[A-Za-z]:\\).*?([^/\\]*)[/\\]*", value)):
        return f"{found[1] or ''}{found[2]}"
    return value


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


def finite(value: Any) -> Any:
    """A record with null in place of NaN and infinities, for which JSON has no words."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
