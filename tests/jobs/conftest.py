"""A compressor without a model's forward pass, that says what it was given; an index; documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self

import pytest
import torch

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.chunking import Chunk, Document
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.spans import SoftSpan, SpanSpec
from tests.tiny_models import tiny_backbone

POISON = "poison"


class HashCompressor(Compressor):
    """Slots are random rows, seeded by the text; a text with the word poison cannot be compressed.

    Attributes:
        texts: all texts that were compressed.
        calls: texts of each batch.
        before: called before each batch.
    """

    name: ClassVar[str] = "hash"
    max_chunk_tokens = 32
    compression_factor = 8.0

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.texts: list[str] = []
        self.calls: list[list[str]] = []
        self.before: Callable[[], None] = lambda: None

    @property
    def spec(self) -> SpanSpec:
        return SpanSpec("soft", self.backbone.fingerprint, "hash-1")

    def compress(self, chunks: Sequence[Chunk], *, compression_factor: float | None = None) -> list[SoftSpan]:  # type: ignore[override]
        self.before()
        if any(POISON in chunk.text for chunk in chunks):
            raise InputError(f"the text of one of {len(chunks)} chunks is poison")
        self.calls.append([c.text for c in chunks])
        self.texts += self.calls[-1]
        spans = []
        for chunk in chunks:
            slots = self.num_slots(chunk.num_tokens, compression_factor)
            seed = int.from_bytes(hashlib.sha256(chunk.text.encode()).digest()[:4], "big")
            rows = torch.randn(slots, self.backbone.hidden_size, generator=torch.Generator().manual_seed(seed))
            spans.append(SoftSpan(chunk.id, chunk.num_tokens, torch.arange(slots), slots, rows))
        return spans

    def save_pretrained(self, path: str | Path) -> None:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, path: str | Path, backbone: Backbone) -> Self:
        raise NotImplementedError


@pytest.fixture
def compressor() -> HashCompressor:
    return HashCompressor(tiny_backbone("llama"))


@pytest.fixture
def memory(tmp_path: Path, compressor: HashCompressor) -> Iterator[MemoryIndex]:
    with MemoryIndex.create(tmp_path / "kb", compressor.spec, vector_size=26, retrieval_encoder="letters",
                            codec="exact") as index:
        yield index


def documents(count: int, begin: int = 0) -> list[Document]:
    """Documents of 1 to 4 chunks, no two of them alike."""
    return [Document(f"d{i}", " ".join(f"Sentence {j} of text {i} says so." for j in range(1 + i % 4)), {"n": i})
            for i in range(begin, begin + count)]
