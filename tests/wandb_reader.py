"""Reads an offline W&B run back: a log of protobuf records, framed as LevelDB does, after a header of seven bytes."""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7  # in each block, every piece: checksum (4), length (2), type (1), then the bytes
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(run: Path) -> list[wandb_internal_pb2.Record]:
    """Every record of the run in the folder, in the order of logging. ValueError if the file is no such log."""
    data = next(run.glob("run-*.wandb")).read_bytes()
    if not data.startswith(b":W&B"):
        raise ValueError(f"{run} does not hold a W&B log")
    records, parts, at = [], b"", HEADER
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # what is left of a block too small for a header is padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts = (parts if kind in (MIDDLE, LAST) else b"") + data[at + HEADER : at + HEADER + length]
        if kind in (WHOLE, LAST):
            records.append(wandb_internal_pb2.Record.FromString(parts))
        at += HEADER + length
    return records


def read_log(folder: Path) -> SimpleNamespace:
    """What an offline run logged: history rows, summary, config, each key's axis, artifacts, the run's own record."""
    log = SimpleNamespace(history=[], summary={}, config={}, axes={}, artifacts=defaultdict(list), run=None)

    def put(into, items):
        for item in items:
            *path, last = list(item.nested_key) or [item.key]
            inner = into
            for part in path:
                inner = inner.setdefault(part, {})
            inner[last] = json.loads(item.value_json)
        return into

    for record in read_records(folder):
        kind = record.WhichOneof("record_type")
        content = getattr(record, kind)
        if kind == "history":
            log.history.append(put({}, content.item))
        elif kind == "summary":
            put(log.summary, content.update)
        elif kind == "config":
            put(log.config, content.update)
        elif kind == "metric":
            log.axes[content.name or content.glob_name] = content.step_metric
        elif kind == "artifact":
            log.artifacts[content.type].append(content)
        elif kind == "run":
            log.run = content
    return log
