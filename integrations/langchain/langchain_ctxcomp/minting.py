"""Documents that carry references: minted for those whose text has a span in the index, never copied from input."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from langchain_core.documents import Document

from ctxcomp_rag import MemoryIndex, SpanChat
from langchain_ctxcomp.chunks import REFERENCE_KEY


class _Texts:
    """Chunk ids by text, so that documents of any retriever find their spans. Rebuilt when the index has changed."""

    def __init__(self) -> None:
        self._version = -1
        self._ids: dict[bytes, str] = {}
        self._lock = threading.Lock()

    def find(self, index: MemoryIndex, text: str) -> str | None:
        with self._lock:
            if self._version != index.version:
                self._version = index.version
                self._ids = {_digest(chunk.text): chunk.id for chunk in index.chunks()}
            return self._ids.get(_digest(text))


_TEXTS: WeakKeyDictionary[MemoryIndex, _Texts] = WeakKeyDictionary()
_LOCK = threading.Lock()


def with_references(documents: Sequence[Document], chat: SpanChat, scope: str) -> list[Document]:
    """Copies of the documents, in order; those whose text is in the index carry `metadata["ctxcomp_ref"]`.

    A span stands for a text: the same text is the same span, whichever store a document comes from.
    """
    with _LOCK:
        texts = _TEXTS.setdefault(chat.index, _Texts())
    made = []
    for document in documents:
        metadata = {k: v for k, v in document.metadata.items() if k != REFERENCE_KEY}
        found = texts.find(chat.index, document.page_content)
        if found is not None and not chat.index.missing([found]):
            metadata[REFERENCE_KEY] = chat.references.mint(found, scope)
        made.append(document.model_copy(update={"metadata": metadata}))
    return made


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


__all__ = ["with_references"]
