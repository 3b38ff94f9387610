"""What every reader is given and yields, and the one way from bytes to text."""

from __future__ import annotations

import codecs
import gzip
import lzma
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from ctxcomp_rag.chunking import Document, Metadata
from ctxcomp_rag.errors import InputError

Item: TypeAlias = tuple[str, Document | InputError]
"""A place (`file` or `file#row`) and the document there, or why there is none."""

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """A file or standard input.

    Attributes:
        path: None for standard input.
        name: what ids and the metadata `source` say.
        place: what errors say: a path that can be opened from here.
        content: of standard input.
    """

    path: Path | None
    name: str
    place: str
    content: bytes = b""
    _opened: list[IO[bytes]] = field(default_factory=list, repr=False, compare=False)

    @property
    def size(self) -> int:
        """Bytes of the file, 0 for one that cannot be read."""
        try:
            return len(self.content) if self.path is None else self.path.stat().st_size
        except OSError:
            return 0

    @property
    def position(self) -> int:
        """Bytes of the file that were read so far, where that can be told: not in a compressed one."""
        file = self._opened[-1] if self._opened else None
        return file.tell() if file is not None and not file.closed else 0

    def open(self) -> IO[bytes]:
        """The bytes, decompressed."""
        assert self.path is not None, "standard input is not a file"
        suffix = self.path.suffix.lower()
        if suffix == ".gz":
            return cast(IO[bytes], gzip.open(self.path, "rb"))
        if suffix == ".xz":
            return lzma.open(self.path, "rb")
        self._opened[:] = [self.path.open("rb")]
        return self._opened[0]


@dataclass(frozen=True)
class Columns:
    """Which columns of a file with rows are wanted."""

    text: str
    id: str | None
    metadata: tuple[str, ...]

    @property
    def wanted(self) -> list[str]:
        return list(dict.fromkeys([self.text, *([self.id] if self.id is not None else []), *self.metadata]))

    def check(self, existing: list[str], where: str, wanted: list[str] | None = None) -> None:
        """
        Raises:
            InputError: a wanted column is not there, or is there twice.
        """
        for column in self.wanted if wanted is None else wanted:
            if column not in existing:
                raise InputError(f"{where} has no column {column!r}; its columns are: {', '.join(existing) or 'none'}")
            if existing.count(column) > 1:
                raise InputError(f"{where} has {existing.count(column)} columns {column!r}; rename all but one")

    def document(self, row: Mapping[str, Any], source: Source, number: int) -> Item:
        """The document of a row whose text and id columns exist."""
        place = f"{source.place}#{number}"
        text, name = row[self.text], f"{source.name}#{number}"
        if text is None or (isinstance(text, str) and not text.strip()):
            return place, InputError(f"{place} has no text in column {self.text!r}; fill it or leave the row out")
        if not isinstance(text, str):
            return place, InputError(f"{place}: expected text in column {self.text!r}, found {_kind(text)}")
        if self.id is not None:
            value = row[self.id]
            if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
                return place, InputError(
                    f"{place}: expected a string or whole number as id in column {self.id!r}, found {_kind(value)}"
                )
            name = str(value)
        metadata: dict[str, str | int | float | bool | None] = {"source": source.name}
        for column in self.metadata:
            value = row.get(column)
            if isinstance(value, datetime | date | time):
                value = value.isoformat()
            if value is not None and not isinstance(value, str | int | float | bool):
                return place, InputError(
                    f"{place}: expected a string, number, true, false or null in column {column!r}, "
                    f"found {_kind(value)}"
                )
            metadata[column] = value
        for string in (text, name, *(v for v in metadata.values() if isinstance(v, str))):
            try:
                string.encode()
            except UnicodeEncodeError as error:  # JSON can spell what no tokenizer can read
                half = string[error.start]
                return place, InputError(f"{place} holds half of a surrogate pair ({half!r}), which is not text")
        return place, document_or_error(name, text, metadata)


def decode(data: bytes, place: str) -> str:
    """UTF-8 text without a byte order mark, line ends as they are.

    Raises:
        InputError: the bytes are not text.
    """
    if (nul := data.find(0)) >= 0:
        raise _binary(place, f"byte {nul} is 0x00")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _binary(place, f"byte {error.start} is 0x{data[error.start]:02x}: {error.reason}") from error


def check_text(source: Source) -> None:
    """Read a file of rows once through, so that of one that is not text no row comes out.

    Raises:
        InputError: it is empty or not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with source.open() as file:
        while block := file.read(_BLOCK):
            if (nul := block.find(0)) >= 0:
                raise _binary(source.place, f"byte {offset + nul} is 0x00")
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                raise _binary(source.place, f"near byte {offset + error.start}: {error.reason}") from error
            offset += len(block)
    if offset == 0:
        raise InputError(f"{source.place} is empty; leave it out")
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _binary(source.place, f"it ends inside a character: {error.reason}") from error


def stdin_bytes() -> bytes:
    """All of standard input (also where a program has put a text stream in its place)."""
    buffer = getattr(sys.stdin, "buffer", None)
    data: bytes = buffer.read() if buffer is not None else sys.stdin.read().encode()
    return data


def _binary(place: str, why: str) -> InputError:
    return InputError(f"binary file {place}: expected UTF-8 text, but {why}; convert it to UTF-8 or leave it out")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", bytes: "bytes"}
    shown = names.get(type(value), type(value).__name__)
    return "an empty string" if value == "" else f"{shown} ({value!r})" if isinstance(value, int | float) else shown


def document_or_error(name: str, text: str, metadata: Metadata) -> Document | InputError:
    """The document, or what is wrong with it: the caller decides whether that stops the job."""
    try:
        return Document(name, text, metadata)
    except InputError as error:
        return error
