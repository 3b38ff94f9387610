"""Pre-rolled spans: soft spans run through the decoder once and kept as keys and values.

A soft span saves positions, but its slots still go through every layer at each question. Rolled in advance, a span
costs the decoder nothing at query time, at any compression factor, and its keys are rotated to wherever it stands. Its
slots see each other and not what stands before them (mode `independent`, as chunks in TurboRAG, arXiv 2410.07590): the
price of being independent of the prompt. Mode `blend` computes a fraction of them anew (`decoding.blend`).
"""

from __future__ import annotations

import threading

import torch
from cachetools import LFUCache, LRUCache

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding.batching import prefill
from ctxcomp_rag.decoding.prompt import Blended, enclosed
from ctxcomp_rag.decoding.splice import EmbeddedRun, SplicedPrompt, splice
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.rope import require_full_attention
from ctxcomp_rag.spans import KVSpan, MemorySpan, SpanSpec

_REMEMBERED = 65536  # spans whose first request is remembered


@torch.inference_mode()
def preroll(span: MemorySpan, spec: SpanSpec, backbone: Backbone) -> KVSpan:
    """The span with its delimiters as one KV span; to be spliced as it is, without delimiters of its own.

    A KV span without delimiters comes back unchanged.

    Raises:
        UnsupportedModelError: the decoder has layers that do not keep all keys.
    """
    require_full_attention(backbone.config)
    if isinstance(span, KVSpan) and len(enclosed(span, spec)) == 1:
        return span
    prompt, run = _rolled_from(span, spec, backbone)
    layers = prefill([prompt], backbone).cache.layers
    keys = torch.stack([layer.keys[0] for layer in layers])  # type: ignore[union-attr, index]
    values = torch.stack([layer.values[0] for layer in layers])  # type: ignore[union-attr, index]
    return KVSpan(span.chunk_id, span.num_source_tokens, run.positions.cpu(), prompt.next_position, keys, values)


def blend_rolled(rolled: KVSpan, span: MemorySpan, spec: SpanSpec, backbone: Backbone, fraction: float) -> Blended:
    """A pre-rolled span of which a fraction is computed anew; 1 is the soft span `span` that it was rolled from."""
    return Blended(rolled, _rolled_from(span, spec, backbone)[1].embeds, fraction)


def _rolled_from(span: MemorySpan, spec: SpanSpec, backbone: Backbone) -> tuple[SplicedPrompt, EmbeddedRun]:
    """The prompt that is pre-rolled, and its rows."""
    prompt = splice(enclosed(span, spec), backbone)
    run, *rest = prompt.runs
    if rest or not isinstance(run, EmbeddedRun):
        raise InputError("expected a soft span, got a KV span with delimiters; it needs no pre-rolling")
    return prompt, run


class PrerolledSpans:
    """Pre-rolled spans in main memory: the most used ones, within a number of bytes. Thread-safe.

    Least frequently used goes first, and where room is short a span is let in at its second request only, so one pass
    over many rare spans washes nothing out.

    Attributes:
        hits, misses: lookups since the start.
    """

    def __init__(self, backbone: Backbone, spec: SpanSpec, max_bytes: int) -> None:
        if max_bytes < 1:
            raise InputError(f"expected at least 1 byte for pre-rolled spans, got {max_bytes}")
        require_full_attention(backbone.config)
        self.backbone, self.spec = backbone, spec
        self.hits = self.misses = 0
        self._kept: LFUCache[tuple[str, int], KVSpan] = LFUCache(max_bytes, getsizeof=lambda span: span.nbytes)
        self._asked: LRUCache[tuple[str, int], bool] = LRUCache(_REMEMBERED)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the spans that are kept."""
        return int(self._kept.currsize)

    def __contains__(self, span: MemorySpan) -> bool:
        """Whether `get` would find it in memory."""
        with self._lock:
            return _key(span) in self._kept

    def get(self, span: MemorySpan) -> KVSpan:
        """The span pre-rolled, from memory or made now."""
        key = _key(span)
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self.hits += 1
                return found
            self.misses += 1
            known = self._asked.pop(key, False)
            self._asked[key] = True
        made = preroll(span, self.spec, self.backbone)
        if made is span:  # nothing was computed that is worth keeping
            return span
        with self._lock:
            free = self._kept.maxsize - self._kept.currsize
            if made.nbytes <= (self._kept.maxsize if known else free):
                self._kept[key] = made
        return made

    def blended(self, span: MemorySpan, fraction: float) -> Blended:
        """The soft span pre-rolled as by `get`, to be blended with what stands before it."""
        return blend_rolled(self.get(span), span, self.spec, self.backbone, fraction)


def _key(span: MemorySpan) -> tuple[str, int]:
    return span.chunk_id, span.num_slots  # a chunk's id names its text; another factor has other slots


__all__ = ["PrerolledSpans", "blend_rolled", "preroll"]
