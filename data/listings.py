"""Lists of pictures, nothing decoded, from a local folder or through `datasets`, with class numbers or texts."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from .images import EXTENSIONS


class BadRow(ValueError):
    """A row of a listing that cannot be used: `where` it is, a file and its line, and what is at `fault` there."""

    def __init__(self, where: str, fault: str):
        super().__init__(where, fault)
        self.where, self.fault = where, fault

    def __str__(self) -> str:
        return f"{self.where}, {self.fault}"


@dataclass(frozen=True)
class Listing:
    """One split. `pictures`: for each row a path, or a mapping from batch keys to paths or cells {"bytes", "path"} (a
    list, or a `datasets.Dataset` with undecoded columns); `labels`: a number or a name for each, or None; `texts`:
    captions or instructions, or None; `names`: the classes, where the source names them; `broken`: the rows that are
    never to be read, like unreadable pictures; the rest of them stands for nothing."""

    where: str
    pictures: Any
    labels: Sequence[int] | Sequence[str] | None
    texts: Sequence[str] | None = None
    names: tuple[str, ...] | None = None
    broken: Mapping[int, BadRow] = field(default_factory=dict)


def read_each(rows: Sequence[Any], read: Callable[[Any], Any], instead: Any) -> tuple[list[Any], dict[int, BadRow]]:
    """What `read` makes of each row, and the rows at which it raises `BadRow`, for which `instead` stands. ValueError
    where that is every row: then something is wrong as a whole."""
    found, broken = [], dict[int, BadRow]()
    for number, row in enumerate(rows):
        try:
            found.append(read(row))
        except BadRow as error:
            broken[number] = error
            found.append(instead)
    if broken and len(broken) == len(rows):
        raise ValueError(f"none of the {len(rows)} rows can be used: {broken[0]}" if len(rows) > 1 else str(broken[0]))
    return found, broken


def read_splits(
    source: str,
    plain: Callable[[File], bool],
    from_folder: Callable[[File], Listing],
    from_rows: Callable[[str, Any], Listing],
) -> list[Listing]:
    """The training listing and, where the source has one, that of another split: "test", else "validation" or "val".

    `source`: a local folder, which `from_folder` reads if it is `plain`, with or without folders of these names in it;
    otherwise a folder of files that `datasets` reads, or a data set on the Hub ("name" or "name:config"), whose splits
    `from_rows` reads, given what to call them. ValueError for a source that cannot be read.
    """
    folder = File(source).expanduser()
    if folder.is_dir() and plain(folder):
        return [from_folder(split) for split in split_folders(folder)]
    if folder.is_file():
        raise ValueError(f"source must be a folder, or a data set on the Hub, got the file {source}: give its folder")
    if folder.is_absolute() and not folder.is_dir():
        raise ValueError(f"source must be a folder that exists, got {source}")
    import datasets

    name, _, config = (str(folder), "", "") if folder.exists() else source.partition(":")
    try:
        data = datasets.load_dataset(name, config or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"source {source!r} must be a folder or a data set that can be loaded: {error}") from error
    if "train" not in data:
        raise ValueError(f"{source} must have a split train, found {', '.join(data)}")
    return [
        from_rows(f"{source}, split {split}", data[split])
        for split in ("train", *[name for name in HELD if name in data][:1])
    ]


HELD = ("test", "validation", "val")


def split_folders(folder: File) -> list[File]:
    """The folder's "train" and, where it has one, another split's folder; the folder itself where it has no "train"."""
    if not (folder / "train").is_dir():
        return [folder]
    return [folder / "train", *[folder / name for name in HELD if (folder / name).is_dir()][:1]]


def list_folder(folder: File) -> Listing:
    """A folder of class folders, or of pictures with a metadata.jsonl (file_name, and label or text or both)."""
    if (folder / METADATA).is_file():
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


METADATA = "metadata.jsonl"


def _metadata(folder: File) -> Listing:
    lines = read_metadata(folder)
    given = [name for name in ("label", "text") if any(line.row.get(name) is not None for line in lines)]

    def read(line: "Line") -> tuple[Any, Any, Any]:
        picture = picture_in(folder, line, "file_name")
        for name in given:
            if line.row.get(name) is None:
                raise BadRow(line.where, f"must have a {name}, as others have")
        return picture, line.row.get("label"), line.row.get("text")

    rows, broken = read_each(lines, read, ({}, None, None))
    pictures, labels, texts = map(list, zip(*rows, strict=True))
    return Listing(
        str(folder), pictures, labels if "label" in given else None, texts if "text" in given else None, broken=broken
    )


@dataclass(frozen=True)
class Line:
    """A line of metadata.jsonl: `where`, "FILE, line N", and the object that it is, or nothing and what it is."""

    where: str
    row: dict[str, Any]
    fault: str | None = None


def read_metadata(folder: File) -> list[Line]:
    """The lines of a folder's metadata.jsonl, without the empty ones. ValueError where there are none."""
    path, rows = folder / METADATA, []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # only \n: a text may hold other line ends
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            start = line[:80].decode(errors="replace")
            rows.append(Line(f"{path}, line {number}", {}, f"must be a JSON object, got {start!r}"))
        else:
            rows.append(Line(f"{path}, line {number}", row))
    if not rows:
        raise ValueError(f"{path} must have a line for each picture, found none")
    return rows


def picture_in(folder: File, line: Line, column: str) -> File:
    """The picture that a line of metadata.jsonl names. BadRow where it names none, ValueError for one outside the
    folder."""
    name = line.row.get(column)
    if line.fault or not isinstance(name, str) or not name:
        told = f'must be an object with "{column}", the path of a picture, got {str(line.row)[:80]}'
        raise BadRow(line.where, line.fault or told)
    if File(name).is_absolute() or ".." in File(name).parts:  # links are followed: they are the user's own
        raise ValueError(f'{line.where}, must have a "{column}" inside the folder, got {name!r}')
    return folder / name


def list_rows(where: str, rows: Any, image_column: str | None = None, label_column: str | None = None) -> Listing:
    """A split of labelled pictures from `datasets`. The columns are found by their types unless named; a column "text"
    gives captions."""
    import datasets

    features = rows.features
    kinds = {name: type(feature) for name, feature in features.items()}
    image = choose_column(where, "image", image_column, list(kinds), lambda key: kinds[key] is datasets.Image)
    label = choose_column(
        where, "label", label_column, list(kinds), lambda key: kinds[key] is datasets.ClassLabel or key == "label"
    )
    if image is None:
        raise ValueError(f"{where} must have a column of pictures, found {', '.join(kinds)}")
    columns = {name: rows[name][:] for name in {label, "text"} & kinds.keys()}
    columns = {name: column for name, column in columns.items() if any(value is not None for value in column)}

    def read(row: int) -> None:
        for name, column in columns.items():
            if column[row] is None:
                raise BadRow(f"{where}, row {row}", f"must have a {name}, as others have")

    return Listing(
        where,
        undecoded(rows, {"pixels": image}),
        labels=columns.get(label) if label else None,
        texts=columns.get("text") if label != "text" else None,
        names=tuple(features[label].names) if label and kinds[label] is datasets.ClassLabel else None,
        broken=read_each(range(len(rows)), read, None)[1],
    )


def undecoded(rows: Any, columns: dict[str, str]) -> Any:
    """{batch key: column} of a `datasets.Dataset`: these columns alone, as cells {"bytes", "path"} by batch key."""
    import datasets

    rows = rows.select_columns(list(columns.values()))
    for column in columns.values():
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows.rename_columns({column: key for key, column in columns.items()})


def choose_column(
    source: str, what: str, given: str | None, columns: Sequence[str], fits: Callable[[str], object]
) -> str | None:
    """The column that is `given`, else the only one that `fits`, else None. ValueError where there are several."""
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
    usable: list[list[Any]] = [
        [label for row, label in enumerate(listing.labels or ()) if row not in listing.broken] for listing in listings
    ]
    kinds = {type(label) for labels in usable for label in labels}
    if kinds not in ({int}, {str}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"{first.where}: labels must be all whole numbers or all names, found {found}")
    if kinds == {str}:
        names = tuple(sorted(set(map(str, usable[0]))))
    else:
        count = num_classes or 1 + max(map(int, usable[0]))
        names = first.names or tuple(str(i) for i in range(count))
    if num_classes not in (None, len(names)):
        raise ValueError(f"{first.where} has {len(names)} classes, but num_classes is {num_classes}")
    numbers: dict[int | str, int] = (
        dict(zip(names, range(len(names)), strict=True)) if kinds == {str} else {i: i for i in range(len(names))}
    )
    for listing, labels in zip(listings, usable, strict=True):
        if unknown := [label for label in labels if label not in numbers]:
            known = ", ".join(names) if kinds == {str} else f"in [0, {len(names)})"
            raise ValueError(f"{listing.where}: labels must be {known}; found {unknown[0]!r}, {len(unknown)} time(s)")
    return [torch.tensor([numbers.get(label, 0) for label in listing.labels or ()]) for listing in listings], names
