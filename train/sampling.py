"""`priorguide sample` and `priorguide verify`: inference alone, with neither lightning nor wandb."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path as File

import torch
from torch import Tensor

from ..callbacks.panels import grid
from ..sample.bundle import Bundle
from ..sample.evaluate import to_device
from ..sample.manifest import new_folder
from ..sample.model import Condition, DiffusionModel
from ..sample.pictures import FPS, gif, to_pil, write_clip
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
    bundle = opened(args.bundle, args.device, args.compile)
    if bundle.guidance is None:
        raise ValueError(f"{args.bundle} holds a model without guidance; export a bundle from a run")
    if args.recorded:
        recorded = bundle.recorded()
        condition, seeds = recorded.condition, list(recorded.seeds)
    else:
        classes = (bundle.manifest["provenance"] or {}).get("class_names", ())
        condition, seeds = crossed(read_condition(bundle.model, args.condition, classes), given)
    pixels = bundle.sample(condition, seeds, scales=scales[0] if scales else None, steps=args.steps)
    with new_folder(out) as folder:
        write_pictures(folder, pixels, seeds, len(seeds) if args.recorded else len(given), condition.get("fps"))
        asked = {name: getattr(args, name) for name in ("condition", "recorded", "scale", "steps")}
        (folder / "asked.json").write_text(json.dumps({**asked, "seeds": seeds}, indent=1))
    print(f"{len(seeds)} pictures in {out}")
    return 0


def opened(name: str, device: str, compile: bool = False) -> Bundle:
    """The bundle in a folder, or on the Hub under owner/name or owner/name@revision."""
    if File(name).exists() or not (parts := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)):
        return Bundle.load(name, device, compile=compile)
    return Bundle.from_pretrained(parts[1], revision=parts[2], device=device, compile=compile)


def read_condition(model: DiffusionModel, given: Sequence[str], class_names: Sequence[str] = ()) -> Condition:
    """The encoded rows that `name=value` pairs describe; a label may be given by its class's name. UsageError for what
    the model cannot take."""
    values = [pair.partition("=")[::2] for pair in given]
    if len(named := dict(values)) < len(values):
        raise UsageError(f"each condition is given once, got {', '.join(given)}")
    if named.get("label") in class_names:
        named["label"] = str(class_names.index(named["label"]))
    elif class_names and "label" in named and not named["label"].isdigit():
        raise UsageError(f"label must be a class's number or name ({', '.join(class_names)}), got {named['label']!r}")
    try:
        batch = model.read_condition(**named)
        with torch.no_grad():
            return model.encode_condition(to_device(batch, next(model.network.parameters()).device))
    except ValueError as error:
        raise UsageError(str(error)) from error


def crossed(condition: Condition, seeds: Sequence[int]) -> tuple[Condition, list[int]]:
    """Every row of the condition with every seed: the rows of the first seed, then those of the second, and so on."""
    rows = len(next(iter(condition.values()))) if condition else 1
    parts = {name: part.repeat(len(seeds), *[1] * (part.ndim - 1)) for name, part in condition.items()}
    return parts, [seed for seed in seeds for _ in range(rows)]


def write_pictures(folder: File, pixels: Tensor, seeds: Sequence[int], lines: int, fps: Tensor | None = None) -> None:
    """Pictures (N, C, H, W) as PNG files, a grid of `lines` lines, and an animation of each line where it has several.

    Clips (N, C, F, H, W) as GIF files and, with PyAV, MP4 files, at `fps` (N,) or FPS, and the same grid as a GIF.
    """
    across = len(pixels) // lines
    if pixels.ndim == 5:
        rates = [FPS] * len(pixels) if fps is None else fps.tolist()
        for number, (seed, clip, rate) in enumerate(zip(seeds, pixels, rates, strict=True)):
            write_clip(folder / f"{number:04d}-seed-{seed}", clip, rate)
        if across > 1:
            frames = [grid(frame.unflatten(0, (lines, across)), zoom=1) for frame in pixels.unbind(2)]
            (folder / "grid.gif").write_bytes(gif(frames, rates[0]))
        return
    for number, (seed, picture) in enumerate(zip(seeds, pixels, strict=True)):
        to_pil(picture).save(folder / f"{number:04d}-seed-{seed}.png")
    if across > 1:
        grid(pixels.unflatten(0, (lines, across)), zoom=1).save(folder / "grid.png")
        for line, row in enumerate(pixels.split(across)):
            first, *rest = (to_pil(picture) for picture in row)
            first.save(folder / f"{line:04d}.gif", save_all=True, append_images=rest, duration=150, loop=0)


def verify(args: argparse.Namespace) -> int:
    """Every hash, then the recorded batch; exit status 1 where a picture differs."""
    bundle = opened(args.bundle, args.device)
    print(f"{args.bundle}: {len(bundle.manifest['files'])} files, every hash as recorded")
    if args.hashes_only or bundle.manifest["recorded"] is None:
        return 0
    replay = bundle.replay()
    if replay.identical:
        print(f"replayed {len(replay.pictures)} recorded pictures: bit for bit the same")
        return 0
    changes = ", ".join(f"{name} {then} then, {now} now" for name, (then, now) in replay.changes.items())
    difference = f"largest difference {replay.max_abs_difference:.2e} of 1"
    if replay.reproduced:
        print(f"replayed {len(replay.pictures)} recorded pictures: {difference} ({changes or 'on a GPU'})")
        return 0
    raise ValueError(f"the recorded pictures are not reproduced: {difference} ({changes or 'same environment'})")


def push(args: argparse.Namespace) -> int:
    """Uploads a bundle with its card; --dry-run prints the card, and what would be uploaded."""
    from ..sample.push import contents
    from ..sample.push import push as upload

    folder = File(args.bundle)
    if not args.dry_run:
        print(upload(folder, args.repository, private=not args.public, restricted=args.restricted))
        return 0
    files = contents(folder, args.repository, restricted=args.restricted)
    card = files["README.md"]
    assert isinstance(card, bytes)
    print(card.decode())
    for name, file in files.items():
        print(f"{file.stat().st_size if isinstance(file, File) else len(file):>14,} bytes  {name}")
    return 0


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
