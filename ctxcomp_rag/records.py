"""JSON and JSON lines, plain or xz-compressed, with errors that name the line."""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctxcomp_rag.errors import InputError


def read_text(path: Path) -> str:
    """Raises InputError for a file that is not text, or not xz although it is called so."""
    try:
        data = path.read_bytes()
        return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}); expected UTF-8 JSON, plain or .xz") from error


def read_json(path: Path) -> Any:
    """Raises InputError for a file that is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}") from error


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of every line; the place is for error messages."""
    # not splitlines(): it also ends a line at U+2028 and its like, which may stand in a string of JSON
    for number, line in enumerate(io.StringIO(read_text(path), newline=None), 1):
        if not line.strip():
            continue
        place = f"{path.name} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{place} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise InputError(f"{place}: expected an object, got {type(record).__name__}")
        yield place, record


def open_dataset(name: str, subset: str | None, split: str, otherwise: str) -> Any:
    """A stream of the records of a data set of the Hugging Face hub, or of a folder in its form.

    Args:
        otherwise: what can be given instead, for the message.

    Raises:
        InputError: the package `datasets` is not installed, or the data set cannot be read, with the reason.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError("reading a data set takes the package datasets, which is not installed; "
                         f"pip install 'ctxcomp-rag[datasets]', or {otherwise}") from error
    with readable_dataset(name, otherwise):
        return datasets.load_dataset(name, subset, split=split, streaming=True)


@contextmanager
def readable_dataset(name: str, otherwise: str) -> Iterator[None]:
    """Within, what a stream of `open_dataset` raises becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"the data set {name!r} cannot be read ({str(error).splitlines()[0]}); {otherwise}, or check "
                         "the id, the subset, the split and the network") from error


def field(record: dict[str, Any], name: str, kind: type | tuple[type, ...], place: str) -> Any:
    """A field of the expected type; raises InputError that names what is there instead."""
    if not isinstance(record, dict):  # records of a record come as the file has them
        raise InputError(f"{place}: expected an object, got {type(record).__name__}")
    if name not in record:
        raise InputError(f"{place}: expected a field {name!r}, found {', '.join(map(repr, record)) or 'none'}")
    if not isinstance(record[name], kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{place}: expected {wanted} in {name!r}, got {type(record[name]).__name__}")
    return record[name]
