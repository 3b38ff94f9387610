"""What may be added to an index, or asked of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.spans import MemorySpan, SpanSpec


def places_of_chunks(chunks: Sequence[Chunk], spans: Sequence[MemorySpan], vectors: NDArray[Any], spec: SpanSpec,
                     vector_size: int) -> dict[str, int]:
    """Chunk id -> its first place in the three lists, which have to fit together.

    Raises:
        InputError, SpanShapeError: see `MemoryIndex.add`.
    """
    if not len(chunks) == len(spans) == len(vectors):
        raise InputError(f"expected one span and one vector per chunk, got {len(chunks)} chunks, {len(spans)} spans "
                         f"and {len(vectors)} vectors")
    places: dict[str, int] = {}
    if not chunks:
        return places
    checked_vectors(vectors, vector_size, lambda i: f"chunk {chunks[i].id!r} of document {chunks[i].document_id!r}")
    for i, (chunk, span) in enumerate(zip(chunks, spans, strict=True)):
        if span.chunk_id != chunk.id:
            raise InputError(f"expected the span of chunk {chunk.id!r} at place {i}, got the one of "
                             f"{span.chunk_id!r}; keep chunks and spans in the same order")
        try:
            (chunk.text + chunk.document_id).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"document {chunk.document_id!r}: expected text that can be stored as UTF-8, got "
                             f"{error.object[error.start]!r}; clean it with "
                             f"text.encode('utf-8', 'replace').decode()") from None
        spec.require_span(span)
        places.setdefault(chunk.id, i)
    return places


def checked_vectors(vectors: NDArray[Any], vector_size: int, name: Callable[[int], str]) -> NDArray[Any]:
    """(n, vector_size) as an array. `name` says whose the i-th vector is.

    Raises:
        InputError: another shape, numbers that are not finite in float32, or a zero vector.
    """
    try:
        array = np.asarray(vectors)
        right = array.ndim == 2 and array.shape[1] == vector_size and np.issubdtype(array.dtype, np.number)
    except ValueError:  # rows of different lengths
        raise InputError(f"expected vectors of shape (n, {vector_size}), got rows of different lengths") from None
    if not right:
        raise InputError(f"expected vectors of shape (n, {vector_size}), got {array.shape} of {array.dtype}; use the "
                         f"retrieval encoder that the index was made with")
    with np.errstate(over="ignore"):
        stored = array.astype(np.float32)
    for bad, what in ((~np.isfinite(stored).all(axis=1), "NaN or infinite numbers"),
                      (~stored.any(axis=1), "only zeros, which have no direction")):
        if bad.any():
            raise InputError(f"expected finite vectors other than zero, but the one of {name(int(bad.argmax()))} "
                             f"holds {what}; check the retrieval encoder's output")
    return array
