"""`priorguide sample` and `priorguide verify`: inference alone, with neither lightning nor wandb."""

import argparse
from collections.abc import Sequence
from pathlib import Path as File

import torch
from torch import Tensor

from ..callbacks.panels import grid
from ..sample.bundle import Bundle
from ..sample.evaluate import to_device
from ..sample.manifest import new_folder
from ..sample.model import Condition, DiffusionModel
from ..sample.pictures import to_pil
from .cli import parse_scales
from .errors import UsageError


def sample(args: argparse.Namespace) -> int:
    """Pictures of every given condition from every seed, or of the recorded conditions, in a new folder."""
    out = File(args.out)
    if out.exists():
        raise ValueError(f"{out} exists already; choose a new --out, or remove it")
    if args.steps is not None and args.steps < 1:
        raise UsageError(f"steps must be at least 1, got {args.steps}")
    scales = parse_scales(args.scale)
    if scales and len(scales) > 1:
        raise UsageError(f"sampling takes one scale per rung, such as 3 or 1.5:7.5, got {args.scale!r}")
    if args.recorded and (args.condition or args.seeds):
        raise UsageError("--recorded brings its own conditions and seeds: leave --condition and --seeds out")
    given = parse_seeds(args.seeds or "0:4")
    bundle = Bundle.load(args.bundle, device=args.device)
    if bundle.guidance is None:
        raise ValueError(f"{args.bundle} holds a model without guidance; export a bundle from a run")
    if args.recorded:
        recorded = bundle.recorded()
        condition, seeds = recorded.condition, list(recorded.seeds)
    else:
        condition, seeds = crossed(read_condition(bundle.model, args.condition), given)
    pixels = bundle.sample(condition, seeds, scales=scales[0] if scales else None, steps=args.steps)
    with new_folder(out) as folder:
        write_pictures(folder, pixels, seeds, len(seeds) if args.recorded else len(given))
    print(f"{len(seeds)} pictures in {out}")
    return 0


def read_condition(model: DiffusionModel, given: Sequence[str]) -> Condition:
    """The encoded rows that `name=value` pairs describe. UsageError for what the model cannot take."""
    try:
        batch = model.read_condition(**dict(pair.partition("=")[::2] for pair in given))
        with torch.no_grad():
            return model.encode_condition(to_device(batch, next(model.network.parameters()).device))
    except ValueError as error:
        raise UsageError(str(error)) from error


def crossed(condition: Condition, seeds: Sequence[int]) -> tuple[Condition, list[int]]:
    """Every row of the condition with every seed: the rows of the first seed, then those of the second, and so on."""
    rows = len(next(iter(condition.values()))) if condition else 1
    parts = {name: part.repeat(len(seeds), *[1] * (part.ndim - 1)) for name, part in condition.items()}
    return parts, [seed for seed in seeds for _ in range(rows)]


def write_pictures(folder: File, pixels: Tensor, seeds: Sequence[int], lines: int) -> None:
    """PNG files, a grid of `lines` lines, and an animation of each line where it has several pictures."""
    for number, (seed, picture) in enumerate(zip(seeds, pixels, strict=True)):
        to_pil(picture).save(folder / f"{number:04d}-seed-{seed}.png")
    across = len(pixels) // lines
    if across > 1:
        grid(pixels.unflatten(0, (lines, across)), zoom=1).save(folder / "grid.png")
        for line, row in enumerate(pixels.split(across)):
            first, *rest = (to_pil(picture) for picture in row)
            first.save(folder / f"{line:04d}.gif", save_all=True, append_images=rest, duration=150, loop=0)


def verify(args: argparse.Namespace) -> int:
    """Every hash, then the recorded batch; exit status 1 where a picture differs."""
    bundle = Bundle.load(args.bundle, device=args.device)
    print(f"{args.bundle}: {len(bundle.manifest['files'])} files, every hash as recorded")
    if args.hashes_only or bundle.manifest["recorded"] is None:
        return 0
    replay = bundle.replay()
    if replay.identical:
        print(f"replayed {len(replay.pictures)} recorded pictures: bit for bit the same")
        return 0
    changes = ", ".join(f"{name} {then} then, {now} now" for name, (then, now) in replay.changes.items())
    difference = f"largest difference {replay.max_abs_difference:.2e} of 1"
    if replay.max_abs_difference <= 1e-4 and changes:
        print(f"replayed {len(replay.pictures)} recorded pictures: {difference} ({changes})")
        return 0
    raise ValueError(f"the recorded pictures are not reproduced: {difference} ({changes or 'same environment'})")


def parse_seeds(text: str) -> list[int]:
    """ "0:4" as [0, 1, 2, 3], "3,5" as [3, 5]. UsageError for anything else."""
    try:
        if ":" in text:
            first, last = text.split(":")
            seeds = list(range(int(first), int(last)))
        else:
            seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds:
        raise UsageError(f"seeds must look like 0:16 or 3,5,8, got {text!r}")
    return seeds
