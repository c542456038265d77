"""Runs of Weights & Biases: online with a key, offline without, quiet, and never in the way of the work itself."""

import netrc
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path as File
from typing import Any
from urllib.parse import urlsplit

import yaml
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from .redact import redact

SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "init_timeout": 30.0,
    "finish_timeout": 300.0,  # what is not uploaded by then stays on disk for `wandb sync`
    "disable_code": True,
}
"""W&B's own settings in our runs; an environment variable WANDB_<NAME> goes before them."""
STAGED = "wandb/staged"
"""Where in a run's folder tables wait for upload, rather than in the home folder, where nobody would find them."""
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Where W&B's public service is, for its keys in netrc."""


def has_key() -> bool:
    """Whether W&B would find a key: in the environment, or in netrc for its host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    base_url = os.environ.get("WANDB_BASE_URL")
    try:
        stored = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(stored.authenticators(host) for host in ([urlsplit(base_url).netloc] if base_url else HOSTS))


def mode() -> str:
    """WANDB_MODE where it is given, save that online needs a key; "online" or "offline" otherwise."""
    wanted = os.environ.get("WANDB_MODE") or "online"
    return "offline" if wanted == "dryrun" or (wanted == "online" and not has_key()) else wanted


@rank_zero_only
def start(loggers: Iterable[Logger], folder: str | File, config: Mapping[str, Any]) -> None:
    """Opens the runs of the loggers that are W&B's, with the config, less its secrets; tells where an online run is.

    A server that does not answer, or refuses the key, turns the run into an offline one, with a warning.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            run = _open(partial(getattr, logger, "experiment"), folder, "offline" if logger._offline else mode())
            run.log = forgiving()(run.log)  # Lightning logs through it too, and stops where it raises
            run.config.update(redact(dict(config)), allow_val_change=True)
            if run.url:
                print(f"W&B: {run.url}")


def _open(make: Callable[[], Any], folder: str | File, how: str) -> Any:
    import wandb

    if os.environ.get("WANDB_DATA_DIR", STAGED).endswith(STAGED):
        os.environ["WANDB_DATA_DIR"] = str(File(folder).absolute() / STAGED)
    settings = {name: value for name, value in SETTINGS.items() if f"WANDB_{name.upper()}" not in os.environ}
    wandb.setup(wandb.Settings(**{**settings, "mode": how}))
    try:
        return make()
    except wandb.errors.Error as error:
        if how != "online":
            raise
        warnings.warn(f"W&B did not start online, so this run is logged offline: {_sentence(error)}", stacklevel=2)
        wandb.setup(wandb.Settings(mode="offline"))
        return make()


def finish() -> str | None:
    """Ends this process's run, and says where it is; None where there is none, or W&B is disabled."""
    run = _current()
    return None if run is None else _finish(run)


def _finish(run: Any) -> str | None:
    url, folder = run.url, File(run.dir).parent
    with forgiving():
        run.finish()
    if run.disabled:
        return None
    return f"W&B: {url}" if url else f"W&B, offline: {folder} (`wandb sync` uploads it)"


@contextmanager
def follow_up(folder: str | File, job: str) -> Iterator[Any | None]:
    """The run to log what comes after a fit to; None where the fit in the folder had no WandbLogger.

    It is the fit's own run while that is open in this process, else a new one of type `job` in the same project and
    group, which ends with the block. What W&B raises in the block is told as a warning: the folder holds everything.
    """
    options = stored_logger(folder)
    if options is None:
        yield None
        return
    run = own = _run_in(File(folder))
    if own is None:
        told = {key: options.get(key) for key in ("project", "entity", "tags")}
        told |= {"group": options.get("group") or File(folder).name, "job_type": job, "reinit": "create_new"}
        name = f"{options.get('name') or File(folder).name}-{job}"
        with forgiving():
            import wandb

            how = "offline" if options.get("offline") else mode()
            run = _open(lambda: wandb.init(name=name, dir=str(folder), **told), folder, how)
    with forgiving():
        yield run
    if own is None and run is not None and (where := _finish(run)):
        print(where)


def _run_in(folder: File) -> Any | None:
    """This process's open run, if it writes to the folder."""
    run = _current()
    return run if run is not None and folder.resolve() in File(run.dir).resolve().parents else None


def _current() -> Any | None:
    return sys.modules["wandb"].run if "wandb" in sys.modules else None


def stored_logger(folder: str | File) -> dict[str, Any] | None:
    """The arguments of the WandbLogger in a run's config.yaml, or None."""
    loggers = yaml.safe_load((File(folder) / "config.yaml").read_text())["trainer"].get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, Mapping) and str(logger.get("class_path")).endswith("WandbLogger"):
            return {**logger.get("init_args", {}), **logger.get("dict_kwargs", {})}
    return None


@contextmanager
def forgiving() -> Iterator[None]:
    """Turns what W&B raises into a warning: training goes on, and the run's folder holds everything too."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"W&B did not take what was logged: {_sentence(error)}", stacklevel=3)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
