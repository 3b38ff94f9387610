"""Files, folders, tables and standard input as documents, one at a time; a broken file is named, never guessed at."""

from __future__ import annotations

import difflib
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.errors import CtxcompError, InputError
from ctxcomp_rag.readers.sources import Columns, Item, Source, stdin_bytes
from ctxcomp_rag.readers.tables import read_csv, read_jsonl, read_parquet
from ctxcomp_rag.readers.texts import read_html, read_pdf, read_stdin, read_text

__all__ = ["SUPPORTED_SUFFIXES", "read_documents"]

_READERS: dict[str, Callable[[Source, Columns], Iterator[Item]]] = {
    ".txt": read_text,
    ".md": read_text,
    ".html": read_html,
    ".htm": read_html,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".pdf": read_pdf,
}
_COMPRESSED = (".gz", ".xz")
_NOT_COMPRESSED = (".parquet", ".pdf")  # they are compressed inside, and are read from both ends

SUPPORTED_SUFFIXES = tuple(_READERS)
"""What can be read; the text formats also with `.gz` or `.xz` behind."""


def read_documents(
    paths: Sequence[str | Path] | str | Path,
    *,
    text_column: str = "text",
    id_column: str | None = None,
    metadata_columns: Sequence[str] = (),
    on_error: Literal["stop", "skip"] = "stop",
    on_skip: Callable[[str, CtxcompError], None] | None = None,
    on_position: Callable[[int, int], None] | None = None,
) -> Iterator[Document]:
    """Documents from files, folders and standard input, in the order given, folders sorted by path.

    `.txt`, `.md`, `.html`, `.htm` and `.pdf` are one document each; `.jsonl`, `.csv` and `.parquet` one per row.
    Folders are searched recursively for those suffixes, without hidden files and without following links to folders.
    "-" is standard input: JSON lines if its first line is a JSON object, else one text. Everything is UTF-8; text is
    passed on as it stands in the file (only HTML and PDF are turned into text), without a byte order mark.

    Ids: the path as given, or for a file of a folder its path from that folder on (`kb/faq/a.md`); rows are
    `path#row`, counted from 1 (JSON lines: the line number), unless `id_column` names them. Standard input is
    `stdin@` and 12 hex digits of its content's sha256.
    Metadata: `source` (the id without the row) and the `metadata_columns` of a row; dates become ISO 8601 strings.
    In JSON lines a metadata field must be in the first row and is None where later rows lack it.

    Args:
        text_column, id_column, metadata_columns: columns (JSON: fields) of files with rows; other files ignore them.
        on_error: "stop" raises the first error. "skip" leaves out the file or row, reports it and goes on.
        on_skip: called with the place (`file` or `file#row`) and the error for each that is left out.
        on_position: called before each document with the bytes read so far and the bytes of all files (on disk).

    Raises:
        InputError: at once for arguments and paths that cannot be right; while iterating for a file or row that
            cannot be read, has no text, lacks a column or repeats an id; at the end when there was no document.
            The rows before the fault have come through by then, except in a file that is not UTF-8 text, of which
            nothing comes through.
    """
    if isinstance(paths, str | Path):  # a string is a sequence of strings, too
        paths = [paths]
    if isinstance(metadata_columns, str):
        raise InputError(f"expected a list of metadata columns, got {metadata_columns!r}; put it into a list")
    if on_error not in ("stop", "skip"):
        raise InputError(f'expected on_error="stop" or "skip", got {on_error!r}')
    if not paths:
        raise InputError("no document found: no path was given")
    if sum(str(path) == "-" for path in paths) > 1:
        raise InputError('"-" (standard input) was given twice, but can be read only once')
    report = _Report(on_error == "skip", on_skip)
    sources: list[Source] = []
    for path in paths:
        for found in _expand(str(path)):
            if isinstance(found, Source):
                sources.append(found)
            else:
                report(str(path), found)
    columns = Columns(text_column, id_column, tuple(metadata_columns))
    return _documents(sources, columns, report, [str(path) for path in paths], on_position)


@dataclass
class _Report:
    skip: bool
    on_skip: Callable[[str, CtxcompError], None] | None
    count: int = 0
    first: InputError | None = None

    def __call__(self, place: str, error: InputError) -> None:
        if not self.skip:
            raise error
        self.count += 1
        self.first = self.first or error
        if self.on_skip is not None:
            self.on_skip(place, error)


def _documents(sources: list[Source], columns: Columns, report: _Report, given: list[str],
               on_position: Callable[[int, int], None] | None) -> Iterator[Document]:
    places: dict[str, str] = {}
    before, total = 0, sum(source.size for source in sources) if on_position else 0
    for source in sources:
        for place, item in _items(source, columns):
            if on_position:
                on_position(before + source.position, total)
            if isinstance(item, Document) and item.id in places:
                item = InputError(
                    f"the document id {item.id!r} occurs twice: in {places[item.id]} and in {place}; "
                    "give each document an id of its own"
                )
            if isinstance(item, Document):
                places[item.id] = place
                yield item
            else:
                report(place, item)
        before += source.size if on_position else 0
    if not places:
        reason = (
            f"all that was there was skipped ({report.count}), first because: {report.first}"
            if report.first
            else f"supported suffixes are {_suffix_list()}"
        )
        raise InputError(f"no document found in {', '.join(given)}; {reason}") from report.first


def _items(source: Source, columns: Columns) -> Iterator[Item]:
    """What the source's reader yields, and last the error that ended it."""
    suffix = _format(source.path) if source.path is not None else None
    reader = read_stdin if suffix is None else _READERS[suffix]
    try:
        yield from reader(source, columns)
    except InputError as error:
        yield source.place, error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        yield source.place, InputError(f"broken compressed file {source.place}: {error}; compress or download it again")
    except OSError as error:
        yield source.place, InputError(f"{source.place} cannot be read: {error.strerror or error}")


def _expand(given: str) -> Iterator[Source | InputError]:
    if given == "-":
        yield Source(None, "stdin", "stdin", stdin_bytes())
        return
    path = Path(given)
    if not given:  # an unset shell variable, perhaps; Path("") would be the current folder
        yield InputError('there is no file or folder ""; give "." for the current folder')
    elif path.is_dir():
        yield from _walk(path)
    elif not path.exists():
        yield InputError(f"there is no file or folder {given!r}{_suggestion(path)}")
    elif _format(path) is None:
        yield InputError(f"cannot read {given!r}: supported suffixes are {_suffix_list()}")
    else:
        yield Source(path, path.as_posix(), path.as_posix())


def _walk(folder: Path) -> Iterator[Source | InputError]:
    name = Path(os.path.abspath(folder)).name  # "." and "a/.." have a name, too
    errors: list[OSError] = []
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = [n for n in folders if not n.startswith(".")]
        for path in (Path(parent, n) for n in names if not n.startswith(".")):
            # a pipe would block for ever; a link to nothing is kept, so that it is reported
            if _format(path) is not None and (path.is_file() or not path.exists()):
                files.append(path)
    for error in errors:
        yield InputError(f"the folder {error.filename} cannot be read: {error.strerror}")
    for path in sorted(files, key=lambda p: p.parts):
        yield Source(path, (Path(name) / path.relative_to(folder)).as_posix(), path.as_posix())


def _format(path: Path) -> str | None:
    """The suffix that says how to read the file, or None for one that cannot be read."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in _READERS and suffixes[-1] not in _NOT_COMPRESSED else None
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def _suffix_list() -> str:
    return f"{', '.join(SUPPORTED_SUFFIXES)} (text formats also with {' or '.join(_COMPRESSED)})"


def _suggestion(path: Path) -> str:
    """What the first part of the path that does not exist may have been meant to be."""
    parent, rest = Path(path.anchor), list(path.relative_to(path.anchor).parts)
    while rest and (parent / rest[0]).exists():
        parent /= rest.pop(0)
    try:
        names = {name.casefold(): name for name in os.listdir(parent)}
    except OSError:  # a file where a folder was expected, or no permission to list it
        return f"; {parent.as_posix()} is not a folder that can be listed"
    nearest = difflib.get_close_matches(rest[0].casefold() if rest else "", names, n=1)
    if not nearest:
        return f"; nothing in {parent.as_posix()!r} has a name like {rest[0]!r}" if rest else ""
    corrected = parent / names[nearest[0]]
    whole = corrected.joinpath(*rest[1:])
    return f"; did you mean {(whole if whole.exists() else corrected).as_posix()!r}?"
