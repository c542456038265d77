"""Encoding the training samples once: into the folder of `data.init_args.cache`, by all processes, each its share."""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ..callbacks.preemption import sigterm_noted, stopped
from ..data.cache import (
    SHARD_ROWS,
    Encoded,
    asides,
    differences,
    is_whole,
    read_manifest,
    remove_asides,
    shard_path,
    write_manifest,
    write_shard,
)
from ..data.fingerprint import contents, fingerprint, first_changed, marks
from ..data.loading import PictureData
from ..sample.model import DiffusionModel
from .errors import UsageError

FORMAT = 2
"""Goes up whenever the same model would encode the same data otherwise, or the manifest tells of it otherwise. Format 1
holds the same samples, and is read for as long as that is so."""


class Encoders:
    """A model's frozen modules, autoencoder and the like, which training on encoded samples does not need.

    They are taken off the model at once. `at_hand` puts them back on it and on a device, for validation, comparisons
    and encoding; afterwards the weights lie where they were loaded, which is their own file, mapped, as a rule.
    """

    def __init__(self, model: DiffusionModel):
        self.model, self.here = model, False
        self.modules = {name: module for name, module in model.named_children() if module is not model.network}
        for name in self.modules:
            setattr(model, name, None)

    @contextmanager
    def at_hand(self, device: torch.device) -> Iterator[None]:
        if self.here:
            yield
            return
        parts = [part for module in self.modules.values() for part in module.modules()]
        homes = [({**part._parameters}, {**part._buffers}) for part in parts]
        weights = [(p, p.data) for own, _ in homes for p in own.values() if p is not None]
        try:
            self.here = True
            for name, module in self.modules.items():
                setattr(self.model, name, module.to(device))
            yield
        finally:
            for weight, home in weights:
                weight.data = home
            for part, (_, buffers) in zip(parts, homes, strict=True):
                part._buffers.update(buffers)
            for name in self.modules:
                setattr(self.model, name, None)
            self.here = False


def fill(module: L.LightningModule, data: PictureData, encoders: Encoders) -> None:
    """Encodes what the data's cache lacks; nothing at random is drawn from the run's generators. A SIGTERM stops it
    on every process: at its next batch where it was sent to, elsewhere at the end of a shard.

    ValueError where the folder holds samples of other data, encoders or settings, or is not the same for all processes.
    """
    assert data.cache is not None
    trainer, folder, encoded = module.trainer, File(data.cache.folder), data.encoded()
    missing: list[int] = []
    if trainer.is_global_zero:
        _claim(folder, made_from(encoders, data, str(trainer.precision)), data)
        missing = encoded.missing()
    missing = trainer.strategy.broadcast(missing)
    if not missing:
        return
    count, start = sum(len(encoded.shards[number]) for number in missing), time.perf_counter()
    if trainer.is_global_zero:
        print(f"cache: encoding {count} of {sum(map(len, encoded.shards))} training samples into {folder}", flush=True)
    device, mine = trainer.strategy.root_device, missing[trainer.global_rank :: trainer.world_size]
    with (
        isolate_rng(),
        encoders.at_hand(device),
        trainer.precision_plugin.forward_context(),
        sigterm_noted(trainer) as asked,
        closing(_shards(encoders.model, data, encoded, mine, device, asked)) as shards,
    ):
        for _ in range(0, len(missing), trainer.world_size):  # as often on every process
            next(shards, None)
            if trainer.strategy.reduce_boolean_decision(bool(asked), all=False):
                if trainer.is_global_zero:
                    print("cache: stopped by a SIGTERM; the same command goes on from the shards there are", flush=True)
                raise stopped(trainer)
    if lost := [number for number in missing if not is_whole(shard_path(folder, number), len(encoded.shards[number]))]:
        raise ValueError(f"{shard_path(folder, lost[0])} is missing: cache.folder must be one folder for all machines")
    if trainer.is_global_zero:
        print(f"cache: encoded {count} training samples in {time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def _shards(
    model: DiffusionModel, data: PictureData, encoded: Encoded, numbers: list[int], device: Any, asked: list[int]
) -> Generator[int]:
    """Encodes the shards of these numbers, one each time that it is asked for the next, until a signal is in `asked`:
    then it leaves the one that it is at."""
    size, training = data.train_batch_size, model.training
    batches = [
        (number, keys[start : start + size])
        for number in numbers
        for keys in [encoded.shards[number]]
        for start in range(0, len(keys), size)
    ]
    model.training = False  # whoever draws in `encode_pixels` takes the mean
    try:
        parts: list[dict[str, Tensor]] = []
        for (number, keys), batch in zip(batches, data.to_encode([keys for _, keys in batches]), strict=True):
            if asked:
                return
            if isinstance(batch, Exception):
                raise batch
            batch = move_data_to_device(batch, device)
            samples = {"posterior": model.posterior(batch["pixels"]), **model.encode_condition(batch)}
            parts.append({name: part.expand(len(keys), *part.shape[1:]).cpu() for name, part in samples.items()})
            if sum(len(part["posterior"]) for part in parts) == len(encoded.shards[number]):
                whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                write_shard(shard_path(encoded.folder, number), whole)
                parts = []
                yield number
    finally:
        model.training = training


def made_from(encoders: Encoders, data: PictureData, precision: str) -> dict[str, Any]:
    """All that the encoded samples follow from, for the manifest."""
    assert data.cache is not None
    digest, files = contents(_shown(data))
    return {
        "format": FORMAT,
        "rows": len(data.splits.train),
        "variants": data.cache.variants,
        "shard_rows": SHARD_ROWS,
        "precision": precision,
        "data": digest,
        "files": marks(files),
        "encoders": _weights(encoders),
        "model": {"class": type(encoders.model).__name__, **encoders.model.config()},
        "settings": data.settings() | {"transform": _shown(data).transform},
    }


def _made_before(data: PictureData, made: dict[str, Any]) -> dict[str, Any]:
    """The same as format 1 has it, which knows files by their times."""
    digest, settings = fingerprint(_shown(data))
    same = {name: value for name, value in made.items() if name != "files"}
    before = {"format": 1, "data": digest, "settings": settings, "buckets": data.buckets and str(data.buckets)}
    return json.loads(json.dumps(same | before))


def _shown(data: PictureData) -> SimpleNamespace:
    name: Callable[[Any], str] = lambda f: name(f.func) if isinstance(f, functools.partial) else f.__qualname__  # noqa: E731
    return SimpleNamespace(pictures=data.training()[0], transform=name(data.transform))


def _weights(encoders: Encoders) -> str:
    digest, tokenizer = hashlib.sha256(), getattr(encoders.model, "tokenizer", None)
    for part, module in sorted(encoders.modules.items()):
        for name, weight in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    if tokenizer is not None:
        words = sorted(tokenizer.get_vocab().items())
        digest.update(repr((words, tokenizer.model_max_length, tokenizer.pad_token)).encode())
    return digest.hexdigest()


def _claim(folder: File, made: dict[str, Any], data: PictureData) -> None:
    """Makes the folder this cache's, or finds that it is: its manifest names the most variants that were ever asked
    for, of which any may be missing. ValueError says what is otherwise."""
    made = json.loads(json.dumps(made))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"data.init_args.cache.folder must be a folder, {folder} is a file: choose another")
    held, wanted = read_manifest(folder), made["variants"]
    there = held and held.get("variants")
    if held is None:
        if folder.exists() and {*folder.iterdir()} - {*asides(folder)}:
            raise ValueError(f"cache.folder must be new, empty or a cache, {folder} holds other files")
        try:
            write_manifest(folder, made)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"data.init_args.cache.folder must not lie below a file, got {folder}") from error
    elif reasons := _reasons(held, made, data):
        raise ValueError(
            f"{folder} was encoded from something else ({'; '.join(reasons)}): choose another cache.folder, or delete "
            "this one to encode anew"
        )
    elif wanted > there or held["format"] != FORMAT:
        write_manifest(folder, made | {"variants": max(wanted, there)})
    remove_asides(folder)


def _reasons(held: dict[str, Any], made: dict[str, Any], data: PictureData) -> list[str]:
    """Why the samples of a manifest are not those that would be encoded now, by the config's keys where these tell;
    other numbers of variants are no reason."""
    if not isinstance(held.get("variants"), int):
        return [f"variants {held.get('variants')!r}, which must be a number"]
    made = made | {"variants": held["variants"]}
    if held.get("format") == 1:
        alike = not differences(held, _made_before(data, made))
        return [] if alike else ["by an earlier version: other data, encoders or settings, or files of other times"]
    apart, reasons = {"data", "files", "rows", "settings"}, list[str]()
    if held.get("data") != made["data"]:
        known = held.get("settings", {}).keys() & made["settings"].keys()
        reasons = differences(*({name: each["settings"][name] for name in known} for each in (held, made)))
        reasons = reasons or differences({"rows": held.get("rows")}, {"rows": made["rows"]}) or ["other data"]
    elif held.get("files") != made["files"]:
        changed = first_changed(contents(_shown(data))[1], held.get("files", ""), made["files"])
        reasons = [f"{changed} has changed" if changed else "other data"]
    plain = ({name: value for name, value in each.items() if name not in apart} for each in (held, made))
    return reasons + differences(*plain)


def cache(args: list[str]) -> None:
    """Fills the cache of a config, as `priorguide fit` with the same arguments would before its first step."""
    from .fit import build

    cli = build(args, run=False)
    data, trainer = cli.datamodule, cli.trainer
    if not isinstance(data, PictureData) or data.cache is None:
        raise UsageError("the config names no cache: add --data.init_args.cache.folder FOLDER")
    trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
    trainer.fit_loop.epoch_loop.max_steps = 0
    trainer.fit(cli.model, datamodule=data)
    print(f"cache: {data.cache.folder} is whole, {len(data.encoded())} rows x {data.cache.variants}")
