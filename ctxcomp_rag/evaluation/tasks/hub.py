"""Records of a data set: JSON lines, a folder, or an id of the Hugging Face hub, read with `datasets`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.records import read_lines

_SHUFFLED = 10_000  # records that a draw from a stream looks ahead


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
    try:
        import datasets
    except ImportError as error:
        raise InputError("reading a data set takes the package datasets, which is not installed; "
                         "pip install 'ctxcomp-rag[datasets]', or pass --data with a .jsonl file") from error
    name = default if data is None else str(data)
    subset = config if data is None or not data.is_dir() else None
    try:
        stream = datasets.load_dataset(name, subset, split=split, streaming=True)
        drawn = list(islice(stream.shuffle(seed=seed, buffer_size=_SHUFFLED), count))
    except (OSError, ValueError) as error:
        raise InputError(f"the data set {name!r} cannot be read ({str(error).splitlines()[0]}); pass --data with a "
                         f".jsonl file or a folder with the split {split!r}, or check the id and the network"
                         ) from error
    return ((f"{name} record {i}", dict(record)) for i, record in enumerate(drawn))
