"""Filters over document ids and metadata: equality, or membership in a list."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index.table_reader import FilterColumns

Value = str | int | float | bool | None
Where = Mapping[str, Value | Collection[Value]]


def matching_rows(columns: FilterColumns, where: Where) -> NDArray[np.int64]:
    """Row ids (n,) of the chunks that match every condition. A chunk without the key does not match.

    Raises:
        InputError: a value is neither a str, int, float, bool or None nor a list of those.
    """
    keep = np.ones(len(columns.row_ids), dtype=bool)
    for key, wanted in where.items():
        values = _values(key, wanted)
        if key == "document_id":
            rows = [columns.by_document[v] for v in values if isinstance(v, str) and v in columns.by_document]
            mask = np.zeros_like(keep)
            mask[np.concatenate(rows) if rows else np.empty(0, np.int64)] = True
            keep &= mask
        else:
            # chunks of a document share their metadata: each distinct one is looked at once
            verdicts = [key in m and any(_same(m[key], v) for v in values) for m in columns.distinct]
            keep &= np.array(verdicts, dtype=bool)[columns.metadata]
    return columns.row_ids[keep]


def _values(key: str, wanted: Any) -> list[Value]:
    values = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
    for value in values:
        if not (value is None or isinstance(value, str | int | float | bool)):
            raise InputError(f"where[{key!r}]: expected a str, int, float, bool or None, or a list of them, "
                             f"got {type(value).__name__}")
    return values


def _same(stored: Any, wanted: Value) -> bool:
    """Python says True == 1; in metadata they are different values."""
    return isinstance(stored, bool) == isinstance(wanted, bool) and bool(stored == wanted)
