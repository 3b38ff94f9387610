"""The locator: rows without their spans, and where in an object store the bytes of each span lie.

    rows/<data file>.arrow      chunk id, text, metadata, vector, checksums, and (object, start, size) of the span

One file for each data file of the table, made by one scan through Lance, read by memory mapping. Data files never
change and their names are never given out twice, so a file that is there is right. With it a span is one ranged
read away; through Lance it takes several requests after one another.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxcomp_rag.index.folder import TABLE
from ctxcomp_rag.index.lance_reader import blob_file, data_files, panics_are_errors
from ctxcomp_rag.index.rows import arrow_schema
from ctxcomp_rag.index.span_cache import Place

if TYPE_CHECKING:
    import pyarrow as pa


def row_file(folder: Path, data_file: str) -> Path:
    """Where the rows of a data file (as "data/NAME.lance") are kept."""
    return folder / f"{Path(data_file).stem}.arrow"


def write_rows(dataset: Any, fragment: Any, to: Path) -> None:
    """Bring the rows of a fragment here; the file appears only when it is whole."""
    import pyarrow as pa

    (data_file,) = data_files(fragment)
    temporary = to.with_name(f"{to.name}.tmp-{os.getpid()}")
    try:
        with panics_are_errors():
            reader = dataset.scanner(columns=dataset.schema.names, fragments=[fragment], with_row_id=True,
                                     blob_handling="blobs_descriptions").to_reader()
            schema = _located_schema(reader.schema)
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                for batch in reader:
                    blobs = batch["span"].to_pylist()
                    spans = pa.array([_place(blob, data_file)._asdict() for blob in blobs], schema.field("span").type)
                    writer.write_batch(pa.RecordBatch.from_arrays(
                        [spans if name == "span" else batch[name] for name in schema.names], schema=schema))
        os.replace(temporary, to)
    finally:
        temporary.unlink(missing_ok=True)


def read_rows(files: Sequence[Path], vector_size: int) -> pa.Table:
    """The rows of these files, side by side; nothing is read before it is asked for."""
    import pyarrow as pa

    if not files:
        return _located_schema(arrow_schema(vector_size).append(pa.field("_rowid", pa.uint64()))).empty_table()
    return pa.concat_tables([pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files])


def places(rows: pa.Table) -> list[Place]:
    """Where the spans of these rows lie; without an object where only Lance can find it."""
    return [Place(p["object"], p["start"], p["size"]) for p in rows["span"].to_pylist()]


def _located_schema(schema: pa.Schema) -> pa.Schema:
    """The same columns, with a `Place` for the span."""
    import pyarrow as pa

    place = pa.struct({"object": pa.string(), "start": pa.int64(), "size": pa.int64()})
    return pa.schema([pa.field(f.name, place if f.name == "span" else f.type) for f in schema])


def _place(blob: dict[str, Any], data_file: str) -> Place:
    file = blob_file(data_file, blob["kind"], blob["blob_id"])
    return Place(f"{TABLE}/{file}" if file else "", blob["position"], blob["size"])
