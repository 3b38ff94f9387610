"""Training examples as text, the same for every method: its objectives turn them into ids in their own layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ctxcomp_rag.chunking import Chunk, Document, split_document
from ctxcomp_rag.tokenization import TextTokenizer

_TEXTS = ("context", "continuation", "question", "answer")


@dataclass(frozen=True)
class Example:
    """What is compressed, and what the decoder may be asked for.

    Attributes:
        context: the text that becomes slots.
        continuation: the text that follows it, for objectives that go on.
        question, answer: for objectives that ask about it.
        cut_from: the digest of the text that the context is a piece of, and the character at which it begins there;
            tells which examples share text, and decides nothing else.
    """

    context: str
    continuation: str = ""
    question: str = ""
    answer: str = ""
    cut_from: tuple[str, int] | None = field(default=None, compare=False, repr=False)


def passages(texts: Iterable[str], tokenizer: TextTokenizer, max_tokens: int) -> list[Example]:
    """Every piece of at most `max_tokens` tokens, with the one that follows it in its text.

    The last piece, or the only one, has an empty continuation.
    """
    examples = []
    for i, text in enumerate(texts):
        if text.strip():
            digest, pieces = text_digest(text), pieces_of(Document(str(i), text), tokenizer, max_tokens)
            examples += [Example(piece.text, following, cut_from=(digest, piece.start))
                         for piece, following in zip(pieces, [*(p.text for p in pieces[1:]), ""], strict=True)]
    return examples


def pieces_of(document: Document, tokenizer: TextTokenizer, max_tokens: int) -> list[Chunk]:
    """The pieces of at most `max_tokens` tokens that a text is cut into; the white space that may end it is none."""
    return [c for c in split_document(document, tokenizer, max_tokens=max_tokens) if c.text.strip()]


def text_digest(text: str) -> str:
    """What `Example.cut_from` names a text by."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def examples_digest(examples: Sequence[Example]) -> str:
    """sha256 of the examples in order: what a run records, and what resuming it requires."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps({name: getattr(example, name) for name in _TEXTS}, sort_keys=True).encode())
    return digest.hexdigest()
