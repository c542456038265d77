"""Lists of edit pairs, nothing decoded: pictures {"pixels": edited, "image": original} and an instruction for each."""

import re
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any, NamedTuple

from .listings import (
    METADATA,
    BadRow,
    Line,
    Listing,
    choose_column,
    picture_in,
    read_each,
    read_metadata,
    read_splits,
    undecoded,
)

PICTURE = r"(_?(image|img|picture))?(_file_name)?(\.\w+)?"
ORIGINAL = re.compile(rf"(original|input|source|src|before){PICTURE}", re.IGNORECASE)
EDITED = re.compile(rf"(edited|output|target|after){PICTURE}", re.IGNORECASE)
PROMPTS = ("edit_prompt", "instruction", "edit_instruction", "edit", "text", "txt")
"""Columns that hold the instruction, the surest first; in WebDataset shards also `json.edit` and `edit.txt`."""


class Columns(NamedTuple):
    """The columns of a pair; None: found by its name."""

    original_image: str | None = None
    edited_image: str | None = None
    edit_prompt: str | None = None


def read_pairs(source: str, columns: Columns) -> list[Listing]:
    """The splits of a source as `EditPairs` describes it. ValueError, one sentence, for a bad source."""
    return read_splits(
        source,
        plain=lambda folder: any((split / METADATA).is_file() for split in (folder, folder / "train")),
        from_folder=lambda folder: list_folder(folder, columns),
        from_rows=lambda where, rows: list_rows(where, rows, columns),
    )


def list_folder(folder: File, columns: Columns) -> Listing:
    """A folder with metadata.jsonl: the paths of both pictures and the instruction on each line."""
    if not (folder / METADATA).is_file():
        raise ValueError(f"{folder} must hold {METADATA}, with two pictures and an instruction on each line")
    lines = read_metadata(folder)
    known = list(dict.fromkeys(key for line in lines for key in line.row))
    original, edited, prompt = choose(str(folder / METADATA), known, known, columns)

    def read(line: Line) -> tuple[dict[str, File], str]:
        pair = {key: picture_in(folder, line, column) for key, column in (("pixels", edited), ("image", original))}
        return pair, _instruction(line.where, prompt, line.row.get(prompt))

    rows, broken = read_each(lines, read, ({}, ""))
    return Listing(str(folder), [pair for pair, _ in rows], None, [text for _, text in rows], broken=broken)


def list_rows(where: str, rows: Any, columns: Columns) -> Listing:
    """A split of a data set that `datasets` reads: two columns of pictures, one of texts or of objects with a text."""
    import datasets

    kinds = rows.features
    cells = {key for key, kind in kinds.items() if isinstance(kind, dict) and "bytes" in kind}  # not yet a picture
    pictures = [
        key
        for key, kind in kinds.items()
        if isinstance(kind, datasets.Image) or key in cells or getattr(kind, "dtype", "").endswith("binary")
    ]
    texts = {key: (key, None) for key, kind in kinds.items() if getattr(kind, "dtype", "").endswith("string")}
    for key, kind in kinds.items():
        if isinstance(kind, dict) and key not in cells:
            texts |= {f"{key}.{part}": (key, part) for part in kind}
    original, edited, prompt = choose(where, pictures, list(texts), columns)
    pairs = undecoded(rows, {"pixels": edited, "image": original})
    lacking = {column: _empty(pairs.data.column(key)) for key, column in (("pixels", edited), ("image", original))}
    column, part = texts[prompt]
    found = [cell if part is None or cell is None else cell[part] for cell in rows[column][:]]

    def read(row: int) -> str:
        for name, empty in lacking.items():
            if row in empty:
                raise BadRow(f"{where}, row {row}", f"must have a picture in {name}, found none")
        return _instruction(f"{where}, row {row}", prompt, found[row])

    checked, broken = read_each(range(len(found)), read, "")
    return Listing(where, pairs, labels=None, texts=checked, broken=broken)


def _empty(cells: Any) -> set[int]:
    """The rows that have neither the bytes nor the path of a picture."""
    from pyarrow import compute

    empty = compute.and_(*(compute.is_null(compute.struct_field(cells, part)) for part in ("bytes", "path")))
    return set(compute.indices_nonzero(empty).to_pylist())


def _instruction(where: str, column: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise BadRow(where, f"must have an instruction in {column}, got {text!r}")
    return text


def choose(where: str, pictures: Sequence[str], texts: Sequence[str], given: Columns) -> tuple[str, str, str]:
    """(original, edited, instruction): the columns as given, or as their names tell. ValueError where they do not."""
    stems = {re.sub(r"^json\.|\.te?xt$", "", key.lower()): key for key in texts}
    prompt = next((stems[name] for name in PROMPTS if name in stems), None)
    found = Columns(
        choose_column(where, "original_image", given.original_image, pictures, ORIGINAL.fullmatch),
        choose_column(where, "edited_image", given.edited_image, pictures, EDITED.fullmatch),
        choose_column(where, "edit_prompt", given.edit_prompt, texts, lambda key: key == prompt),
    )
    for what, column in found._asdict().items():
        if column is None:
            names = ", ".join(dict.fromkeys([*pictures, *texts]))
            raise ValueError(f"{where} must have a column {what}, found {names}: name it by {what}_column")
    if len(set(found)) < 3:
        raise ValueError(f"{where}: the columns of a pair must be three, got {', '.join(map(str, found))}")
    return found  # type: ignore[return-value]
