"""Retention: how much of a chunk's facts its span still holds, measured once, offline.

The decoder repeats the chunk from its span, greedily; the retention is the share of the chunk's numbers, dates and
names (`ctxcomp_rag.facts`) that stand in what it says. A nested span is measured at every number of slots that it can
be read with. This costs as much as generating every chunk once, for nested spans once for each factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import Compressor, possible_factors
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, reconstruction_prompt
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.facts import retained
from ctxcomp_rag.spans import MemorySpan, SpanSpec

_BATCH = 16
RUN_OVER_TOKENS = 8
"""Tokens that a reconstruction may have more than its text."""


class MeasuringCompressor(Compressor):
    """A compressor whose spans carry their retention, and which may choose how many slots a chunk needs.

    Args:
        compressor: makes the spans; it must bring a "reconstruct" delimiter.
        target: every chunk gets the fewest slots, among the factors of the compressor, that retain this share of its
            facts; a chunk that no factor retains so well gets the most slots. None leaves the factor as it is.

    Raises:
        InputError: a target outside 0 to 1, or spans that cannot be asked for their text.
    """

    name: ClassVar[str] = "measuring"

    def __init__(self, compressor: Compressor, target: float | None = None) -> None:
        if target is not None and not 0 < target <= 1:
            raise InputError(f"expected a target retention above 0 and at most 1, got {target:g}")
        self.compressor, self.backbone, self.target = compressor, compressor.backbone, target
        self._read_as = compressor.reading(compressor.spec)
        if "reconstruct" not in self._read_as.delimiters:
            raise InputError(f"the spans of {compressor.spec.compressor} cannot be asked for their text: the "
                             "compressor brings no 'reconstruct' delimiter; leave the retention out")
        self._decoder = FrozenDecoder(self.backbone, end_ids=self._read_as.end_ids)

    def compress(self, chunks: Sequence[Chunk], *, compression_factor: float | None = None) -> list[MemorySpan]:
        if self.target is None:
            return self._measured(self.compressor.compress(chunks, compression_factor=compression_factor), chunks)
        self._require_one_size(compression_factor)
        if self.compressor.spec.nested:
            return [self._fewest(s) for s in self._measured(self.compressor.compress(chunks), chunks)]
        found: dict[str, MemorySpan] = {}
        left = list(chunks)
        for factor in sorted(possible_factors(self.compressor), reverse=True):
            spans = self._measured(self.compressor.compress(left, compression_factor=factor), left) if left else []
            found |= {s.chunk_id: s for s in spans}  # of the last factor, if no other
            left = [c for c, s in zip(left, spans, strict=True) if s.retention[s.num_slots] < self.target]
        return [found[c.id] for c in chunks]

    def _require_one_size(self, compression_factor: float | None) -> None:
        if self.target is not None and compression_factor is not None:
            raise InputError(f"the factor {compression_factor:g} and the target retention {self.target:g} both say how "
                             "many slots a chunk gets; give one of them")

    def _fewest(self, span: MemorySpan) -> MemorySpan:
        assert self.target is not None
        enough = [n for n, share in span.retention.items() if share >= self.target]
        return span.first(min(enough)) if enough else span

    def _measured(self, spans: Sequence[MemorySpan], chunks: Sequence[Chunk]) -> list[MemorySpan]:
        spec = self.compressor.spec
        pieces = [(i, n) for i, s in enumerate(spans) for n in sorted({*spec.slot_counts(s).values(), s.num_slots})]
        read = [self.compressor.read(spans[i].first(n), chunks[i]) for i, n in pieces]
        found: list[dict[int, float]] = [{} for _ in spans]
        texts = reconstructions(self._decoder, read, self._read_as)
        for (i, n), text in zip(pieces, texts, strict=True):
            found[i][n] = round(retained(chunks[i].text, text), 4)
        return [replace(s, retention=r) for s, r in zip(spans, found, strict=True)]

    # -- everything else is the compressor's

    @property
    def spec(self) -> SpanSpec:
        return self.compressor.spec

    @property
    def max_chunk_tokens(self) -> int:
        return self.compressor.max_chunk_tokens

    @property
    def compression_factor(self) -> float:
        return self.compressor.compression_factor

    def num_slots(self, num_tokens: int, compression_factor: float | None = None) -> int:
        self._require_one_size(compression_factor)
        return self.compressor.num_slots(num_tokens, compression_factor)

    def chunk_slots(self, chunk: Chunk, compression_factor: float | None = None) -> int:
        return self.compressor.chunk_slots(chunk, compression_factor)

    @property
    def slot_bytes(self) -> int:
        return self.compressor.slot_bytes

    def writer(self, stored: SpanSpec) -> Compressor:
        return self

    def reading(self, stored: SpanSpec) -> SpanSpec:
        return self.compressor.reading(stored)

    def read(self, span: MemorySpan, chunk: Chunk) -> MemorySpan:
        return self.compressor.read(span, chunk)

    def save_pretrained(self, path: str | Path) -> None:
        self.compressor.save_pretrained(path)

    @classmethod
    def from_pretrained(cls, path: str | Path, backbone: Backbone) -> Self:
        raise InputError("a measuring compressor has no folder of its own; load the compressor and wrap it")


def with_retention(compressor: Compressor, *, measured: bool, target: float | None) -> Compressor:
    """The compressor, measuring where retention is to be measured or a target reached (one that measures: as it is)."""
    if isinstance(compressor, MeasuringCompressor) or not (measured or target is not None):
        return compressor
    return MeasuringCompressor(compressor, target)


def reconstructions(decoder: FrozenDecoder, spans: Sequence[MemorySpan], spec: SpanSpec) -> list[str]:
    """The texts that the decoder reads out of spans, greedily, in order."""
    order = sorted(range(len(spans)), key=lambda i: spans[i].num_source_tokens)
    texts: dict[int, str] = {}
    for begin in range(0, len(order), _BATCH):
        batch = order[begin : begin + _BATCH]
        limit = max(spans[i].num_source_tokens for i in batch) + RUN_OVER_TOKENS
        made = decoder.batch([reconstruction_prompt(spans[i], spec) for i in batch],
                             GenerationSettings(max_new_tokens=limit))
        texts.update(zip(batch, (g.text for g in made), strict=True))
    return [texts[i] for i in range(len(spans))]


__all__ = ["RUN_OVER_TOKENS", "MeasuringCompressor", "reconstructions", "with_retention"]
