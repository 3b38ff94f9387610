"""Documents that carry references: minted for those whose text has a span in the index, never copied from input."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from langchain_core.documents import Document

from ctxcomp_rag import CtxcompError, SpanChat, quoted
from langchain_ctxcomp.chunks import REFERENCE_KEY

logger = logging.getLogger(__name__)
OnError = Literal["text", "raise"]


def with_references(documents: Sequence[Document], chat: SpanChat, scope: str, on_error: OnError) -> list[Document]:
    """Copies of the documents, in order, with `metadata["ctxcomp_ref"]`: a reference to the span of the text, or, for
    a document without a span, its text, spelled so that it names no reference.

    A span stands for a text: the same text is the same span, whichever store a document comes from.

    Args:
        on_error: "text" where the index cannot be read: all documents show their text, and the error is logged.
    """
    try:
        found = chat.index.chunks_of_texts([d.page_content for d in documents])
    except CtxcompError as error:
        if on_error == "raise":
            raise
        logger.warning("documents stay text: %s", error)
        found = [None] * len(documents)
    return [_with(document, chat.references.mint(name, scope) if name else quoted(document.page_content))
            for document, name in zip(documents, found, strict=True)]


def without_span(documents: Sequence[Document], chat: SpanChat) -> list[int]:
    """Places of the documents that have text and no span."""
    found = chat.index.chunks_of_texts([d.page_content for d in documents])
    return [i for i, (d, name) in enumerate(zip(documents, found, strict=True))
            if name is None and d.page_content.strip()]


def _with(document: Document, shown: str) -> Document:
    return document.model_copy(update={"metadata": {**document.metadata, REFERENCE_KEY: shown}})


__all__ = ["OnError", "with_references", "without_span"]
