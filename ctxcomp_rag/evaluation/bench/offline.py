"""Spans of the workload's chunks, made once before anything is timed; how long making them took.

What a span holds does not change how fast it is read, so one chunk is compressed and its span stands for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import compressor_class
from ctxcomp_rag.compressors.icae import ICAEConfig
from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor, InfiniPotConfig
from ctxcomp_rag.decoding import preroll
from ctxcomp_rag.evaluation.bench.clock import cpu_seconds
from ctxcomp_rag.evaluation.bench.workload import Workload
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.spans import KVSpan, MemorySpan, SoftSpan, SpanSpec

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Stored:
    """Spans of all chunks in an index on disk.

    Attributes:
        tokens_per_second: source tokens compressed in a CPU second.
        of_floor: CPU seconds of compressing over those of the bare forward pass with as many rows; None where there is
            no such pass.
    """

    index: MemoryIndex
    chunk_ids: tuple[str, ...]
    tokens_per_second: float
    of_floor: float | None = None

    def spans(self) -> list[MemorySpan]:
        """Read from the disk; what else their rows hold is in memory after the first time."""
        return [found.span for found in self.index.get(self.chunk_ids)]

    @property
    def bytes_per_chunk(self) -> float:
        return self.index.stats()["span_bytes"] / len(self.chunk_ids)


class Offline:
    """Makes and stores spans below a folder."""

    def __init__(self, backbone: Backbone, workload: Workload, folder: Path) -> None:
        self.backbone, self.workload, self.folder = backbone, workload, folder
        self.ids = workload.chunk_ids(int(backbone.config.vocab_size))[0]

    def soft(self, factor: int) -> Stored:
        """ICAE slots."""
        icae = self._icae
        icae.config = replace(icae.config, compression_factor=factor)
        rows, seconds = timed(lambda: icae.encode([self.ids])[0])
        places, length = icae.span_positions(len(self.ids))
        span = SoftSpan("", len(self.ids), torch.tensor(places), length, rows.clone())
        body = self.backbone.model.base_model
        embeds = torch.cat([self.backbone.embed(torch.tensor(self.ids)), rows])[None]
        _, floor = timed(lambda: body(inputs_embeds=embeds, use_cache=False))
        spec = SpanSpec("soft", self.backbone.fingerprint, f"bench-icae-{factor}")
        return self._store(span, spec, seconds, seconds / floor)

    @cached_property
    def _icae(self) -> Any:
        config = ICAEConfig(slots="proportional", slot_positions="spread", segment_tokens=len(self.ids), delimiters=())
        method: Any = compressor_class("icae")
        return method(self.backbone, config)

    def infinipot(self, factor: int) -> Stored:
        """KV spans by InfiniPot with its default catalyst, which reads the text twice."""
        compressor = InfiniPotCompressor(self.backbone, InfiniPotConfig(chunk_tokens=len(self.ids)).repeating())
        pot, seconds = timed(lambda: compressor.distilled(self.ids, -(-len(self.ids) // factor)))
        span = KVSpan("", len(self.ids), torch.arange(pot.size), pot.size, torch.stack(list(pot.keys)),
                      torch.stack(list(pot.values)))
        return self._store(span, SpanSpec("kv", self.backbone.fingerprint, f"bench-infinipot-{factor}"), seconds)

    def full(self) -> Stored:
        """KV spans of every token."""
        embeds = self.backbone.embed(torch.tensor(self.ids))
        text = SoftSpan("", len(self.ids), torch.arange(len(self.ids)), len(self.ids), embeds)
        span, seconds = timed(lambda: preroll(text, SpanSpec("soft", self.backbone.fingerprint, "text"), self.backbone))
        return self._store(span, SpanSpec("kv", self.backbone.fingerprint, "bench-full"), seconds)

    def _store(self, span: MemorySpan, spec: SpanSpec, seconds: float, of_floor: float | None = None) -> Stored:
        # KV spans as they are: these are read without a copy
        index = MemoryIndex.create(self.folder / spec.compressor, spec, vector_size=1, retrieval_encoder="none",
                                   codec="exact" if spec.kind == "kv" else None)
        tokens = self.workload.chunk_tokens
        chunks = [Chunk("bench", f"chunk {n}", 8 * n, 8 * n + 7, tokens) for n in range(self.workload.chunks)]
        index.add(chunks, [replace(span, chunk_id=c.id) for c in chunks], np.ones((len(chunks), 1), np.float32),
                  spec=spec)
        return Stored(index, tuple(c.id for c in chunks), tokens / seconds, of_floor)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result and the CPU seconds of a piece of work."""
    with torch.inference_mode():
        began = cpu_seconds()
        made = work()
        return made, cpu_seconds() - began
