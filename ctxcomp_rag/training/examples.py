"""Training examples as text, the same for every method: its objectives turn them into ids in their own layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from ctxcomp_rag.chunking import Document, split_document
from ctxcomp_rag.tokenization import TextTokenizer


@dataclass(frozen=True)
class Example:
    """What is compressed, and what the decoder may be asked for.

    Attributes:
        context: the text that becomes slots.
        continuation: the text that follows it, for objectives that go on.
        question, answer: for objectives that ask about it.
    """

    context: str
    continuation: str = ""
    question: str = ""
    answer: str = ""


def passages(texts: Iterable[str], tokenizer: TextTokenizer, max_tokens: int) -> list[Example]:
    """Every piece of at most `max_tokens` tokens that another piece of its text follows, with that piece."""
    examples = []
    for i, text in enumerate(texts):
        if text.strip():
            pieces = [c.text for c in split_document(Document(str(i), text), tokenizer, max_tokens=max_tokens)]
            examples += [Example(piece, following) for piece, following in pairwise(pieces)]
    return examples


def examples_digest(examples: Sequence[Example]) -> str:
    """sha256 of the examples in order: what a run records, and what resuming it requires."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), sort_keys=True).encode())
    return digest.hexdigest()
