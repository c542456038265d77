"""`priorguide sample` and `priorguide verify`: inference alone, with neither lightning nor wandb."""

import argparse
from pathlib import Path as File

from ..sample.bundle import Bundle
from ..sample.manifest import new_folder
from ..sample.pictures import to_pil
from .cli import parse_scales


def sample(args: argparse.Namespace) -> int:
    """Pictures of one condition from every seed, or of the recorded conditions, as PNG files in a new folder."""
    out = File(args.out)
    if out.exists():
        raise ValueError(f"{out} exists already; choose a new --out, or remove it")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"steps must be at least 1, got {args.steps}")
    bundle = Bundle.load(args.bundle, device=args.device)
    if bundle.guidance is None:
        raise ValueError(f"{args.bundle} holds a model without guidance; export a bundle from a run")
    if args.recorded:
        recorded = bundle.recorded()
        condition, seeds = recorded.condition, list(recorded.seeds)
    else:
        seeds = parse_seeds(args.seeds)
        values = dict(pair.partition("=")[::2] for pair in args.condition)
        one = bundle.model.encode_condition(bundle.model.read_condition(**values))
        condition = {name: part.expand(len(seeds), *part.shape[1:]) for name, part in one.items()}
    scales = parse_scales(args.scale)
    pixels = bundle.sample(condition, seeds, scales=scales[0] if scales else None, steps=args.steps)
    with new_folder(out) as folder:
        for number, (seed, picture) in enumerate(zip(seeds, pixels, strict=True)):
            to_pil(picture).save(folder / f"{number:04d}-seed-{seed}.png")
    print(f"{len(seeds)} pictures in {out}")
    return 0


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
    """ "0:4" as [0, 1, 2, 3], "3,5" as [3, 5]. ValueError for anything else."""
    try:
        if ":" in text:
            first, last = text.split(":")
            seeds = list(range(int(first), int(last)))
        else:
            seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds:
        raise ValueError(f"seeds must look like 0:16 or 3,5,8, got {text!r}")
    return seeds
