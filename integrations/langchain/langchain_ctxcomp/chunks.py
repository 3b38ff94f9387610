"""LangChain documents to chunks and back.

A document is one chunk, however long (a compressor cuts long texts into segments by itself), so ids, text and metadata
come back as they were given. A chunk that `ctxcomp precompress` made is a document by its own id.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from langchain_core.documents import Document

from ctxcomp_rag import Chunk, InputError

REFERENCE_KEY = "ctxcomp_ref"
_METADATA = "_langchain_metadata"
_STRIPPED = ("page_content", REFERENCE_KEY, _METADATA)
"""Keys that a document may not bring along: a prompt template would take the first for the text, and the second for a
reference of ours."""


def chunk_of(document: Document, name: str, count: Callable[[str], int]) -> Chunk:
    """The chunk of a document.

    Args:
        name: id of the document.
        count: decoder tokens of a text.

    Raises:
        InputError: the document has no text, or metadata that JSON cannot hold.
    """
    if not document.page_content.strip():
        raise InputError(f"expected documents with text, but {name!r} has none; leave it out")
    metadata = {k: v for k, v in document.metadata.items() if k not in _STRIPPED}
    try:
        whole = json.dumps(metadata, ensure_ascii=False)
        if json.loads(whole) != metadata:
            raise TypeError("it would not come back as it is")
    except (TypeError, ValueError) as error:
        raise InputError(f"the metadata of document {name!r} cannot be stored as JSON ({error}); turn the values into "
                         "text, numbers, lists or dicts with text keys") from error
    flat = {k: v for k, v in metadata.items() if v is None or isinstance(v, str | int | float | bool)}
    text = document.page_content
    return Chunk(name, text, 0, len(text), count(text), {**flat, _METADATA: whole})


def document_of(chunk: Chunk) -> Document:
    """The document that a chunk was made of, text and metadata as they were."""
    if is_document(chunk):
        return Document(chunk.text, id=chunk.document_id, metadata=json.loads(str(chunk.metadata[_METADATA])))
    metadata: dict[str, Any] = {k: v for k, v in chunk.metadata.items() if k not in _STRIPPED}
    return Document(chunk.text, id=chunk.id, metadata={**metadata, "document_id": chunk.document_id})


def is_document(chunk: Chunk) -> bool:
    """Whether the chunk is a whole LangChain document."""
    return _METADATA in chunk.metadata


__all__ = ["REFERENCE_KEY", "chunk_of", "document_of", "is_document"]
