"""A row of the span table: a span as bytes, the schema, the checksum."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import IndexDamagedError, InputError
from ctxcomp_rag.index.codecs import CODECS, Codec, Role, Tables, as_rows, codec_named
from ctxcomp_rag.index.tables import tables_digest
from ctxcomp_rag.spans import KVSpan, LatentSpan, MemorySpan, SoftSpan, SpanKind

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_COLUMNS = ["chunk_id", "document_id", "start", "end", "num_tokens", "text", "metadata"]

_STORED: dict[SpanKind, tuple[type[SoftSpan | KVSpan | LatentSpan], tuple[Role, ...]]] = {
    "soft": (SoftSpan, ("embeds",)), "kv": (KVSpan, ("keys", "values")), "latent": (LatentSpan, ("memory",)),
}
"""How a kind of span is stored: its class, and its tensors in the order of the class's fields."""


# ---- a span as bytes -------------------------------------------------------------------------------------------


EXACT = CODECS["exact"]


def latent_tensors(span: MemorySpan) -> dict[Role, Tensor]:
    """The tensors of a span that a codec stores, by role; raises InputError for a span that cannot be stored."""
    if not isinstance(span, SoftSpan | KVSpan | LatentSpan):
        raise InputError(f"expected a SoftSpan, a KVSpan or a LatentSpan, got {type(span).__name__}")
    return {role: getattr(span, role) for role in _STORED[span.kind][1]}


def codec_for(codec: Codec, spans: Sequence[MemorySpan]) -> Codec:
    """The codec with tables learned from these spans, where it learns; raises InputError where they are too few."""
    if not codec.learns:
        return codec
    if not spans:
        raise InputError(f"the codec {codec.name!r} learns from the first spans of an index, got none")
    tensors = [latent_tensors(span) for span in spans]
    return codec.learn({role: torch.cat([as_rows(t[role].cpu()) for t in tensors]) for role in tensors[0]})


def span_to_bytes(span: MemorySpan, codec: Codec = EXACT) -> bytes:
    """A safetensors file: the tensors as the codec leaves them, the rest as JSON in its header.

    Inverse: `span_from_bytes`; bit for bit with the codec "exact".
    """
    latent = latent_tensors(span)
    tensors = {"positions": span.positions.cpu().clone()}
    if isinstance(span, KVSpan) and span.kept is not None:
        tensors["kept"] = span.kept.cpu().clone()
    if isinstance(span, SoftSpan) and span.order is not None:
        tensors["order"] = span.order.cpu().to(torch.int32)
    for role, tensor in latent.items():
        if codec is not EXACT and not bool(tensor.isfinite().all()):
            raise InputError(f"expected finite {role} in the span {span.chunk_id!r} for codec {codec.name!r}, "
                             "got nan or inf")
        pieces = codec.encode(tensor.cpu(), role)
        tensors |= {f"{role}.{name}" if name else role: piece.contiguous() for name, piece in pieces.items()}
    about = {"kind": span.kind, "chunk_id": span.chunk_id, "num_source_tokens": span.num_source_tokens,
             "num_positions": span.num_positions, "codec": codec.name,
             "latent": {role: [list(t.shape), str(t.dtype).removeprefix("torch.")] for role, t in latent.items()}}
    if span.retention:
        about["retention"] = dict(span.retention)
    if codec.tables:
        about["tables"] = tables_digest(codec.tables)
    return safetensors.torch.save(tensors, metadata={"span": json.dumps(about)})


def _no_tables(digest: str) -> Tables:
    raise ValueError(f"it was stored with the tables {digest}")


def span_from_bytes(data: bytes, tables_of: Callable[[str], Tables] = _no_tables) -> MemorySpan:
    """
    Args:
        tables_of: digest -> tables, for spans of a codec that learns.

    Raises:
        ValueError: these are not the bytes of a span.
    """
    try:
        tensors = safetensors.torch.load(data)
        (length,) = struct.unpack_from("<Q", data)
        about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["span"])
        codec = codec_named(about.get("codec", EXACT.name))
        if "tables" in about:
            codec = codec.with_tables(tables_of(about["tables"]))
        latent = {role: _decoded(codec, tensors, about, role) for role in about.get("latent", {})} or tensors
        common = (about["chunk_id"], about["num_source_tokens"], tensors["positions"], about["num_positions"])
        cls, roles = _STORED[about["kind"]]
        extra: dict[str, Any] = {name: tensors[name] for name in ("kept", "order") if name in tensors}
        retention = {int(n): float(share) for n, share in about.get("retention", {}).items()}
        return cls(*common, *(latent[role] for role in roles), **extra, retention=retention)
    except (safetensors.SafetensorError, struct.error, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"not a memory span: {error}") from error


def _decoded(codec: Codec, tensors: Mapping[str, Tensor], about: Mapping[str, Any], role: Role) -> Tensor:
    shape, dtype = about["latent"][role]
    pieces = {name[len(role) :].removeprefix("."): t for name, t in tensors.items() if name.split(".")[0] == role}
    return codec.decode(pieces, role, tuple(shape), getattr(torch, dtype))


# ---- a row -----------------------------------------------------------------------------------------------------


def metadata_to_json(metadata: Mapping[str, Any], name: str) -> str:
    """Raises InputError unless all values are str, int, float, bool or None."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not (value is None or isinstance(value, str | int | float | bool)):
            raise InputError(
                f"chunk {name!r}: expected metadata of str keys and str, int, float, bool or None values, "
                f"got {key!r}: {type(value).__name__}. Turn it into text, or leave it out."
            )
    return json.dumps(dict(metadata), ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True, eq=False)
class Row:
    """One chunk as it is stored. `vector`: (vector_size,) float32."""

    chunk: Chunk
    metadata: str
    vector: NDArray[np.float32]
    span: bytes
    num_slots: int
    num_source_tokens: int

    @classmethod
    def make(cls, chunk: Chunk, span: MemorySpan, vector: NDArray[np.float32], codec: Codec = EXACT) -> Row:
        metadata = metadata_to_json(chunk.metadata, chunk.id)
        return cls(chunk, metadata, vector, span_to_bytes(span, codec), span.num_slots, span.num_source_tokens)

    @property
    def checksum(self) -> int:
        """crc32 over every stored field: a flipped bit in the text or the vector is found like one in the span."""
        c = self.chunk
        numbers = (c.start, c.end, c.num_tokens, self.num_slots, self.num_source_tokens)
        fields = json.dumps([c.id, c.document_id, c.text, self.metadata, numbers])
        crc = zlib.crc32(fields.encode())
        return zlib.crc32(self.span, zlib.crc32(self.vector.astype("<f4").tobytes(), crc))


def arrow_schema(vector_size: int) -> pa.Schema:
    import lance
    import pyarrow as pa

    # one row per chunk id; Lance checks that in merge_insert, we check it in MemoryIndex.add
    key = {b"lance-schema:unenforced-primary-key": b"true"}
    return pa.schema(
        [
            pa.field("chunk_id", pa.string(), nullable=False, metadata=key),
            pa.field("document_id", pa.string()),
            pa.field("start", pa.int64()),
            pa.field("end", pa.int64()),
            pa.field("num_tokens", pa.int64()),
            pa.field("text", pa.string()),
            pa.field("metadata", pa.string()),
            pa.field("num_slots", pa.int64()),
            pa.field("num_source_tokens", pa.int64()),
            pa.field("vector", pa.list_(pa.float32(), vector_size)),
            pa.field("crc", pa.uint32()),
            lance.blob_field("span"),
        ]
    )


def rows_to_arrow(rows: Sequence[Row], vector_size: int) -> pa.Table:
    import lance
    import pyarrow as pa

    flat = np.concatenate([row.vector for row in rows]).astype(np.float32)
    columns = {
        "chunk_id": [r.chunk.id for r in rows],
        "document_id": [r.chunk.document_id for r in rows],
        "start": [r.chunk.start for r in rows],
        "end": [r.chunk.end for r in rows],
        "num_tokens": [r.chunk.num_tokens for r in rows],
        "text": [r.chunk.text for r in rows],
        "metadata": [r.metadata for r in rows],
        "num_slots": [r.num_slots for r in rows],
        "num_source_tokens": [r.num_source_tokens for r in rows],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(flat), vector_size),
        "crc": pa.array([r.checksum for r in rows], pa.uint32()),
        "span": lance.blob_array([r.span for r in rows]),
    }
    return pa.table(columns, schema=arrow_schema(vector_size))


def row_to_chunk(row: Mapping[str, Any]) -> Chunk:
    return Chunk(row["document_id"], row["text"], row["start"], row["end"], row["num_tokens"],
                 json.loads(row["metadata"]))


def checked_row(row: Mapping[str, Any], vector: NDArray[np.float32],
                tables_of: Callable[[str], Tables] = _no_tables) -> tuple[Chunk, MemorySpan]:
    name, document = row["chunk_id"], row["document_id"]
    advice = "Run verify(), delete the damaged chunks, and compress their documents again."
    try:
        chunk = row_to_chunk(row)
        stored = Row(chunk, row["metadata"], vector, row["span"], row["num_slots"], row["num_source_tokens"])
        if chunk.id != name or stored.checksum != row["crc"]:
            raise ValueError("the stored bytes do not match their checksum")
        span = span_from_bytes(row["span"], tables_of)
        if span.chunk_id != name:
            raise ValueError(f"the span stored with it belongs to chunk {span.chunk_id!r}")
    except (ValueError, TypeError) as error:
        raise IndexDamagedError(f"chunk {name!r} of document {document!r} is damaged: {error}. {advice}") from error
    return chunk, span
