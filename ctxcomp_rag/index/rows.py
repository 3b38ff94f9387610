"""A row of the span table: a span as bytes, the schema, the checksum."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from isal.isal_zlib import crc32
from numpy.typing import NDArray
from torch import Tensor

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.codes import Latent
from ctxcomp_rag.errors import IndexDamagedError, InputError
from ctxcomp_rag.index.codecs import CODECS, Codec, Role, Tables, as_rows, codec_named
from ctxcomp_rag.index.stored_tensors import stored_tensors
from ctxcomp_rag.index.tables import tables_digest
from ctxcomp_rag.spans import KVSpan, LatentSpan, MemorySpan, SoftSpan, SpanKind

if TYPE_CHECKING:
    import pyarrow as pa

REPAIR = "Compress it again from its text: ctxcomp repair DIR."
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
        tensors, metadata = stored_tensors(data)
        about = json.loads(metadata["span"])
        codec = codec_named(about.get("codec", EXACT.name))
        if "tables" in about:
            codec = codec.with_tables(tables_of(about["tables"]))
        latent = {role: _latent(codec, tensors, about, role) for role in about.get("latent", {})} or tensors
        common = (about["chunk_id"], about["num_source_tokens"], tensors["positions"], about["num_positions"])
        cls, roles = _STORED[about["kind"]]
        fields: dict[str, Any] = {role: latent[role] for role in roles}
        fields |= {name: tensors[name] for name in ("kept", "order") if name in tensors}
        retention = {int(n): float(share) for n, share in about.get("retention", {}).items()}
        return cls(*common, **fields, retention=retention)
    except (safetensors.SafetensorError, struct.error, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"not a memory span: {error}") from error


def _relabelled(data: bytes, chunk_id: str) -> bytes:
    """The bytes of the same span for another chunk; codes of a lossy codec are not coded a second time."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    about = {**json.loads(header["__metadata__"]["span"]), "chunk_id": chunk_id}
    header["__metadata__"]["span"] = json.dumps(about)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors behind it are aligned to 8 bytes
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _latent(codec: Codec, tensors: Mapping[str, Tensor], about: Mapping[str, Any], role: Role) -> Latent:
    shape, dtype = about["latent"][role]
    pieces = {name[len(role) :].removeprefix("."): t for name, t in tensors.items() if name.split(".")[0] == role}
    return codec.read(pieces, role, tuple(shape), getattr(torch, dtype))


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

    def copied_to(self, chunk: Chunk) -> Row:
        """The row of another chunk with the same text: the same vector and tensors, bit for bit."""
        if chunk.text != self.chunk.text:
            raise InputError(f"expected a chunk with the text of {self.chunk.id!r}, got another text in {chunk.id!r}")
        return replace(self, chunk=chunk, metadata=metadata_to_json(chunk.metadata, chunk.id),
                       span=_relabelled(bytes(memoryview(self.span)), chunk.id))

    @property
    def checksum(self) -> int:
        """crc32 over every stored field: a flipped bit in the text or the vector is found like one in the span."""
        vector = self.vector.astype("<f4").tobytes()
        return crc32(self.span, crc32(vector, self.text_crc))

    @cached_property
    def text_crc(self) -> int:
        """See `text_checksum`."""
        return text_checksum(self.chunk, self.metadata, (self.num_slots, self.num_source_tokens))


def text_checksum(chunk: Chunk, metadata: str, sizes: tuple[int, int]) -> int:
    """crc32 over what a span and a vector can be made from again: text, place, metadata, slots and source tokens."""
    numbers = (chunk.start, chunk.end, chunk.num_tokens, *sizes)
    return crc32(json.dumps([chunk.id, chunk.document_id, chunk.text, metadata, numbers]).encode())


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
            pa.field("text_crc", pa.uint32()),
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
        "text_crc": pa.array([r.text_crc for r in rows], pa.uint32()),
        "span": lance.blob_array([r.span for r in rows]),
    }
    return pa.table(columns, schema=arrow_schema(vector_size))


def row_to_chunk(row: Mapping[str, Any]) -> Chunk:
    return Chunk(row["document_id"], row["text"], row["start"], row["end"], row["num_tokens"],
                 json.loads(row["metadata"]))


def intact_text(row: Mapping[str, Any]) -> tuple[Chunk, int] | None:
    """Chunk and number of slots of a row whose text is as it was written, whatever its vector and span are."""
    try:
        chunk = row_to_chunk(row)
        crc = text_checksum(chunk, row["metadata"], (row["num_slots"], row["num_source_tokens"]))
    except (ValueError, TypeError):
        return None
    return (chunk, row["num_slots"]) if crc == row["text_crc"] else None


def checked_bytes(row: Mapping[str, Any], vector: NDArray[np.float32], remedy: str = REPAIR) -> Row:
    """A row as it was written; raises IndexDamagedError, which ends in `remedy`, where the stored bytes are others."""
    name = row["chunk_id"]
    try:
        chunk = row_to_chunk(row)
        stored = Row(chunk, row["metadata"], vector, row["span"], row["num_slots"], row["num_source_tokens"])
        if chunk.id != name or stored.checksum != row["crc"]:
            raise ValueError("the stored bytes do not match their checksum")
    except (ValueError, TypeError) as error:
        raise _damaged(row, error, remedy) from error
    return stored


def checked_row(row: Mapping[str, Any], vector: NDArray[np.float32],
                tables_of: Callable[[str], Tables] = _no_tables, remedy: str = REPAIR) -> tuple[Chunk, MemorySpan]:
    """Chunk and span of a row; raises as `checked_bytes` does."""
    stored = checked_bytes(row, vector, remedy)
    try:
        span = span_from_bytes(stored.span, tables_of)
        if span.chunk_id != stored.chunk.id:
            raise ValueError(f"the span stored with it belongs to chunk {span.chunk_id!r}")
    except (ValueError, TypeError) as error:
        raise _damaged(row, error, remedy) from error
    return stored.chunk, span


def _damaged(row: Mapping[str, Any], error: Exception, remedy: str) -> IndexDamagedError:
    return IndexDamagedError(f"chunk {row['chunk_id']!r} of document {row['document_id']!r} is damaged: {error}. "
                             + remedy)
