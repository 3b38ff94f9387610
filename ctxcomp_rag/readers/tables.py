"""Files with one document per row: JSON lines, CSV, Parquet. All are streamed."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.readers.sources import Columns, Item, Source, check_text, decode

_ROWS_PER_BATCH = 1024
_LONGEST_FIELD = 2**31 - 1  # a C long on Windows


def read_jsonl(source: Source, columns: Columns) -> Iterator[Item]:
    check_text(source)
    with source.open() as file:
        yield from json_rows(file, source, columns)


def json_rows(lines: Iterable[bytes], source: Source, columns: Columns) -> Iterator[Item]:
    """Items of JSON lines. Lines end with a line feed only: JSON strings may hold U+2028 and its like as they are."""
    empty = first = True
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        empty, place, where = False, f"{source.place}#{number}", f"{source.place}:{number}"
        text = decode(line, source.place).rstrip("\r\n")
        try:
            row = parse_row(text)
        except json.JSONDecodeError as error:
            reason = error.msg.removesuffix(" at")
            yield place, InputError(f"{where} is not a line of JSON: {reason} at column {error.colno}")
            continue
        except (ValueError, RecursionError) as error:
            yield place, InputError(f"{where} is not a line of JSON that can be read: {error}")
            continue
        if not isinstance(row, dict):
            yield place, InputError(f"{where}: expected a JSON object per line, found {type(row).__name__}")
            continue
        if first:
            # Later rows may lack an optional field. One that the first row lacks is a typing error, and better found
            # now than after the last of a million rows.
            columns.check(list(row), where, list(columns.metadata))
            first = False
        try:
            columns.check(list(row), where, [c for c in (columns.text, columns.id) if c is not None])
        except InputError as error:
            yield place, error
            continue
        yield columns.document(row, source, number)
    if empty:
        raise InputError(f"{source.place} has no rows; leave it out")


def parse_row(line: str) -> Any:
    """A JSON value (ValueError where it is none)."""
    return json.loads(line, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; use null")


def read_csv(source: Source, columns: Columns) -> Iterator[Item]:
    check_text(source)
    if csv.field_size_limit() < _LONGEST_FIELD:
        # 128 KiB otherwise, and documents are longer than that. The limit is the process's: there is no other.
        csv.field_size_limit(_LONGEST_FIELD)
    # newline="": line ends inside quotes belong to the text
    with source.open() as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        # "strict": an unclosed quote is an error and does not swallow the rest of the file into one text
        rows = csv.reader(lines, strict=True)
        number = 0
        try:
            header = next((row for row in rows if row), [])
            if not header:
                raise InputError(f"{source.place} is empty; leave it out")
            columns.check(header, source.place)
            for row in rows:
                if not row:  # an empty line; an empty field is written ""
                    continue
                number += 1
                if len(row) != len(header):
                    yield (
                        f"{source.place}#{number}",
                        InputError(
                            f"{source.place}#{number} (line {rows.line_num}): expected {len(header)} fields as in the "
                            f"header, found {len(row)}; put fields with commas between double quotes"
                        ),
                    )
                    continue
                yield columns.document(dict(zip(header, row, strict=True)), source, number)
        except csv.Error as error:
            raise InputError(f"{source.place}: broken CSV before line {rows.line_num + 1}: {error}") from error
    if number == 0:
        raise InputError(f"{source.place} has a header but no rows; leave it out")


def read_parquet(source: Source, columns: Columns) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as file:
            schema = file.schema_arrow
            columns.check(schema.names, source.place)
            _check_types(schema, source, columns)
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=columns.wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield columns.document(row, source, number)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's reason; without a number it is Arrow's word for damaged data
        raise InputError(f"{source.place} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    if number == 0:
        raise InputError(f"{source.place} has no rows; leave it out")


def _check_types(schema: Any, source: Source, columns: Columns) -> None:
    """One error for the file, where each row would have the same one."""
    import pyarrow.types as t

    for column in columns.wanted:
        kind = schema.field(column).type
        value = kind.value_type if t.is_dictionary(kind) else kind
        text = t.is_string(value) or t.is_large_string(value) or t.is_string_view(value)
        if column == columns.text and not (text or t.is_null(value)):
            raise InputError(f"{source.place}: expected text in column {column!r}, found {kind}")
        if column == columns.id and not (text or t.is_integer(value)):
            raise InputError(f"{source.place}: expected strings or integers as ids in column {column!r}, found {kind}")
        if t.is_nested(value):
            raise InputError(f"{source.place}: expected flat values in column {column!r}, found {kind}")
