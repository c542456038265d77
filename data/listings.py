"""Lists of labelled pictures, nothing decoded, from a local folder or through `datasets`, and their class numbers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from .images import EXTENSIONS


@dataclass(frozen=True)
class Listing:
    """One split. `pictures`: paths, or rows of a `datasets.Dataset` with an undecoded column "image"; `labels`: a
    number or a name for each, or None; `texts`: captions or None; `names`: the classes, where the source names them."""

    where: str
    pictures: Any
    labels: Sequence[int] | Sequence[str] | None
    texts: Sequence[str] | None = None
    names: tuple[str, ...] | None = None


def read_folder(folder: File) -> list[Listing]:
    """A folder of class folders, or of pictures with a metadata.jsonl (file_name, and label or text or both).

    Where it holds "train", that is the training split, and "test", else "validation" or "val", the other one.
    """
    if not (folder / "train").is_dir():
        return [_list(folder)]
    held = [folder / name for name in ("test", "validation", "val") if (folder / name).is_dir()]
    return [_list(split) for split in (folder / "train", *held[:1])]


def _list(folder: File) -> Listing:
    if (folder / "metadata.jsonl").is_file():
        return _metadata(folder)
    kinds = sorted(kind for kind in folder.iterdir() if kind.is_dir() and not kind.name.startswith("."))
    found = {kind.name: _pictures(kind) for kind in kinds}
    if not any(found.values()):
        raise ValueError(f"{folder} must hold class folders with pictures, or metadata.jsonl; it has neither")
    if empty := [name for name, paths in found.items() if not paths]:
        raise ValueError(f"every class folder in {folder} must hold pictures, found none in {', '.join(empty)}")
    entries = [(path, name) for name, paths in found.items() for path in paths]
    return Listing(str(folder), [path for path, _ in entries], [name for _, name in entries])


def _pictures(folder: File) -> list[File]:
    return [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")]


def _metadata(folder: File) -> Listing:
    path, rows = folder / "metadata.jsonl", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({"file": folder / row["file_name"], "label": row.get("label"), "text": row.get("text")})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path}, line {number}, must be an object with "file_name", got {line[:80]!r}') from error
    if not rows:
        raise ValueError(f"{path} must have a line for each picture, found none")
    columns = {}
    for name in ("label", "text"):
        column = [row[name] for row in rows]
        if None in column and any(value is not None for value in column):
            raise ValueError(
                f"{path} must give all pictures a {name} or none, {rows[column.index(None)]['file']} has none"
            )
        columns[name] = None if None in column else column
    return Listing(str(folder), [row["file"] for row in rows], columns["label"], columns["text"])


def read_hub(source: str, image_column: str | None = None, label_column: str | None = None) -> list[Listing]:
    """A data set on the Hub ("name" or "name:config"), or a local folder of parquet files, through `datasets`.

    The columns are found by their types unless named; a column "text" gives captions.
    """
    import datasets

    name, _, config = (source, "", "") if File(source).exists() else source.partition(":")
    try:
        data = datasets.load_dataset(name, config or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"source {source!r} must be a folder or a data set that can be loaded: {error}") from error
    if "train" not in data:
        raise ValueError(f"{source} must have a split train, found {', '.join(data)}")
    features = data["train"].features
    kinds = {name: type(feature) for name, feature in features.items()}
    image = _column(source, "image", image_column, list(kinds), lambda key: kinds[key] is datasets.Image)
    label = _column(
        source, "label", label_column, list(kinds), lambda key: kinds[key] is datasets.ClassLabel or key == "label"
    )
    if image is None:
        raise ValueError(f"{source} must have a column of pictures, found {', '.join(kinds)}")
    listings = []
    for split in ("train", *[name for name in ("test", "validation") if name in data][:1]):
        rows = data[split]
        pictures = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        listings.append(
            Listing(
                where=f"{source}, split {split}",
                pictures=pictures if image == "image" else pictures.rename_column(image, "image"),
                labels=rows[label][:] if label else None,
                texts=rows["text"][:] if "text" in kinds and label != "text" else None,
                names=tuple(features[label].names) if label and kinds[label] is datasets.ClassLabel else None,
            )
        )
    return listings


def _column(source: str, what: str, given: str | None, columns: list[str], fits: Callable[[str], bool]) -> str | None:
    if given is not None and given not in columns:
        raise ValueError(f"{what}_column must be a column of {source} ({', '.join(columns)}), got {given!r}")
    found = [given] if given is not None else [key for key in columns if fits(key)]
    if len(found) > 1:
        raise ValueError(f"{source} has several columns for the {what} ({', '.join(found)}): choose by {what}_column")
    return found[0] if found else None


def number_classes(
    listings: Sequence[Listing], num_classes: int | None = None
) -> tuple[list[Tensor | None], tuple[str, ...]]:
    """Labels (N,) int64 of each listing, or None, and the class names, which the first listing settles.

    Names are numbered alphabetically. ValueError names a label outside [0, num_classes) or an unknown name.
    """
    first = listings[0]
    if any((listing.labels is None) != (first.labels is None) for listing in listings):
        raise ValueError(f"{first.where} and {listings[-1].where} must both have labels, or neither")
    if first.labels is None:
        return [None] * len(listings), ()
    kinds = {type(label) for listing in listings for label in listing.labels or ()}
    if kinds not in ({int}, {str}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"{first.where}: labels must be all whole numbers or all names, found {found}")
    if kinds == {str}:
        names = tuple(sorted(set(map(str, first.labels))))
    else:
        count = num_classes or 1 + max(map(int, first.labels))
        names = first.names or tuple(str(i) for i in range(count))
    if num_classes not in (None, len(names)):
        raise ValueError(f"{first.where} has {len(names)} classes, but num_classes is {num_classes}")
    numbers: dict[int | str, int] = (
        dict(zip(names, range(len(names)), strict=True)) if kinds == {str} else {i: i for i in range(len(names))}
    )
    for listing in listings:
        if unknown := [label for label in listing.labels or () if label not in numbers]:
            known = ", ".join(names) if kinds == {str} else f"in [0, {len(names)})"
            raise ValueError(f"{listing.where}: labels must be {known}; found {unknown[0]!r}, {len(unknown)} time(s)")
    return [torch.tensor([numbers[label] for label in listing.labels or ()]) for listing in listings], names
