"""Records of a data set: JSON lines, a folder, or an id of the Hugging Face hub, read with `datasets`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from ctxcomp_rag.evaluation.tasks.base import Task
from ctxcomp_rag.records import open_dataset, read_lines, readable_dataset

_SHUFFLED = 10_000  # records that a draw from a stream looks ahead


class HubTask(Task):
    """A task whose records come from the hub, or from a file or folder of the same form."""

    file: ClassVar[str] = ""
    hub_id: ClassVar[str]

    def files(self, data: Path | None) -> list[Path]:
        # of a folder all: which of them make up a split is for `datasets` to say
        if data is None or not data.is_dir():
            return [data] if data is not None and data.is_file() else []
        return sorted(path for path in data.rglob("*") if path.is_file())


def read_records(data: Path | None, default: str, *, config: str | None, split: str, count: int,
                 seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of at most `count` records, drawn by `seed`; the place is for error messages.

    Args:
        data: a file of JSON lines, plain or .xz; a folder that `datasets.load_dataset` reads; or a hub id.
        default: the hub id where `data` is None.
        config: the subset on the hub; a folder is read without.

    Raises:
        InputError: `datasets` is not installed, or what is named cannot be read, with the reason.
    """
    if data is not None and data.is_file():
        records = list(read_lines(data))
        return iter(random.Random(seed).sample(records, min(count, len(records))))
    name = default if data is None else str(data)
    subset = config if data is None or not data.is_dir() else None
    otherwise = f"pass --data with a .jsonl file or a folder with the split {split!r}"
    stream = open_dataset(name, subset, split, otherwise)
    with readable_dataset(name, otherwise):
        drawn = list(islice(stream.shuffle(seed=seed, buffer_size=_SHUFFLED), count))
    return ((f"{name} record {i}", dict(record)) for i, record in enumerate(drawn))
