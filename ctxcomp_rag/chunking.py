"""Documents and chunks: text in, token-bounded pieces out, nothing lost and nothing twice."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from ctxcomp_rag.errors import InputError

Metadata = Mapping[str, str | int | float | bool | None]

# Where a chunk may end, best first. A chunk ends on the last character of a sentence; the white space that
# follows opens the next chunk, as byte-level tokenizers see it (" The" is one token).
_BOUNDARIES = (
    re.compile(r"(?=\n\s*\n)"),
    re.compile(r"""(?<=[.!?。！？])["'”’)\]]*(?=\s)|(?<=[。！？])|(?=\n)"""),
    re.compile(r"(?=\s)"),
)


class TextEncoder(Protocol):
    """Anything that turns plain text into token ids."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Document:
    """A text with an id and metadata (flat values; they can be filtered on)."""

    id: str
    text: str
    metadata: Metadata = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise InputError(f"expected a document id that is a non-empty string, got {self.id!r}")
        if not isinstance(self.text, str):
            raise InputError(f"document {self.id!r}: expected text, got {type(self.text).__name__}")
        for what, value in (("id", self.id), ("text", self.text)):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"document {self.id!a}: its {what} cannot be stored as UTF-8: character "
                                 f"{error.start} is {value[error.start]!a}") from None
        for key, entry in self.metadata.items():
            if not isinstance(key, str) or not isinstance(entry, str | int | float | bool | None):
                raise InputError(f"document {self.id!r}: expected flat metadata (text, numbers, true, false, none), "
                                 f"got {key!r}: {type(entry).__name__}")


@dataclass(frozen=True)
class Chunk:
    """A token-bounded piece of a document.

    Attributes:
        text: exactly `document.text[start:end]`.
        start, end: character range in the document.
        num_tokens: tokens of `text` for the decoder.
    """

    document_id: str
    text: str
    start: int
    end: int
    num_tokens: int
    metadata: Metadata = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """32 hex digits that name this text at this place of this document."""
        parts = "\0".join((self.document_id, str(self.start), self.text))
        return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def split_document(document: Document, encoder: TextEncoder, *, max_tokens: int,
                   overlap_tokens: int = 0) -> list[Chunk]:
    """Split a document into chunks of at most `max_tokens` tokens, ending at paragraphs or sentences where possible.

    With `overlap_tokens=0` the chunks' ranges partition the text: their texts joined are the document.
    With an overlap, each chunk but the first begins up to that many tokens before its predecessor's end.

    Raises:
        InputError: the document has no text, or a single character needs more than `max_tokens` tokens.
    """
    if max_tokens < 1 or not 0 <= overlap_tokens < max_tokens:
        raise InputError(
            f"expected max_tokens >= 1 and 0 <= overlap_tokens < max_tokens, got {max_tokens} and {overlap_tokens}"
        )
    text = document.text
    if not text.strip():
        raise InputError(f"document {document.id!r} has no text; give it text or leave it out")
    splitter = _Splitter(document, encoder, max_tokens)
    chunks: list[Chunk] = []
    start = 0
    while start < len(text):
        end, count = splitter.end_of_chunk(start, chunks[-1].end if chunks else start)
        chunks.append(Chunk(document.id, text[start:end], start, end, count, document.metadata))
        if end == len(text):
            break
        start = splitter.start_of_overlap(start, end, overlap_tokens) if overlap_tokens else end
    return chunks


class _Splitter:
    def __init__(self, document: Document, encoder: TextEncoder, max_tokens: int) -> None:
        self.text, self.name = document.text, document.id
        self.encoder, self.max_tokens = encoder, max_tokens
        self.characters_per_token = 4.0

    def count(self, start: int, end: int) -> int:
        return len(self.encoder.encode(self.text[start:end]))

    def end_of_chunk(self, start: int, covered: int) -> tuple[int, int]:
        """(end, tokens) of the longest chunk from `start` that ends at the best kind of boundary after `covered`."""
        limit, count = self._longest(start)
        if limit == len(self.text):
            return limit, count
        self.characters_per_token = max(0.1, (limit - start) / count)
        for pattern, least in zip(_BOUNDARIES, (0.5, 0.25, 0.0), strict=True):
            ends = [m.end() for m in pattern.finditer(self.text, start + 1, limit + 1) if m.end() <= limit]
            # a boundary is worth taking when it does not leave the chunk nearly empty
            for end in reversed([e for e in ends if e - start >= least * (limit - start) and e > covered]):
                tokens = self.count(start, end)
                if tokens <= self.max_tokens and self.text[start:end].strip():
                    return end, tokens
        return limit, count

    def _longest(self, start: int) -> tuple[int, int]:
        """The longest prefix found that fits (token counts are almost, not exactly, monotonic in length)."""
        remaining = len(self.text) - start
        low, low_count = 0, 0
        high = min(remaining, max(1, int(self.max_tokens * self.characters_per_token)))
        while True:
            count = self.count(start, start + high)
            if count > self.max_tokens:
                break
            low, low_count = high, count
            if high == remaining:
                return start + low, low_count
            high = min(remaining, 2 * high)
        while high - low > 1:
            middle = (low + high) // 2
            count = self.count(start, start + middle)
            if count <= self.max_tokens:
                low, low_count = middle, count
            else:
                high = middle
        if low == 0:
            raise InputError(
                f"document {self.name!r}: the character {self.text[start]!r} alone needs more than "
                f"{self.max_tokens} tokens; raise max_tokens"
            )
        return start + low, low_count

    def start_of_overlap(self, start: int, end: int, overlap_tokens: int) -> int:
        """The earliest word boundary after `start` from which the text up to `end` has at most that many tokens."""
        best = end
        earliest = max(start + 1, end - 16 * overlap_tokens)
        for match in reversed(list(_BOUNDARIES[2].finditer(self.text, earliest, end))):
            if self.count(match.start(), end) > overlap_tokens:
                break
            best = match.start()
        # a chunk that could not reach past `end` would only repeat what its predecessor holds
        return best if self._longest(best)[0] > end else end
