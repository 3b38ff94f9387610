"""The systems that are compared on the same questions: full text, spans at several factors, truncated text, nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import Compressor, possible_factors
from ctxcomp_rag.decoding import FrozenDecoder, Generation, GenerationSettings, Part, enclosed, preroll
from ctxcomp_rag.pipeline import prompt_parts, truncated_part
from ctxcomp_rag.spans import MemorySpan

_BATCH = 16


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the chunks that a system is given for it, in prompt order."""

    text: str
    answers: tuple[str, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class System:
    """One row of the table; `factor` is the spans' or, for "truncated", the factor whose positions are copied."""

    name: str
    kind: str  # "text", "spans", "prerolled" (spans kept as keys and values), "truncated" or "none"
    factor: float = 1.0


def default_systems(factors: Sequence[float] = (4, 8, 16)) -> list[System]:
    """Full text, spans at each factor, text truncated to the positions of the first of them, no context."""
    spans = [System(f"{f:g}x", "spans", f) for f in factors]
    truncated = System(f"truncated_{factors[0]:g}x", "truncated", factors[0])
    return [System("full_text", "text"), *spans, truncated, System("no_context", "none")]


PREROLLED = System("4x_prerolled", "prerolled", 4.0)
"""Not among the default systems: benchmarks add it, to see what a span that cannot see its prompt loses."""


class Comparison:
    """Asks every system the same questions; spans are compressed once for each factor."""

    def __init__(self, compressor: Compressor, decoder: FrozenDecoder,
                 settings: GenerationSettings | None = None) -> None:
        self.compressor, self.decoder = compressor, decoder
        self.settings = settings or GenerationSettings(max_new_tokens=24)
        self._spans: dict[tuple[str, float], MemorySpan] = {}

    def spans(self, chunks: Sequence[Chunk], factor: float) -> list[MemorySpan]:
        """Spans of the chunks at a factor, from memory where they were made before."""
        new = list({c.id: c for c in chunks if (c.id, factor) not in self._spans}.values())
        for chunk, span in zip(new, self.compressor.compress(new, compression_factor=factor) if new else [],
                               strict=True):
            self._spans[chunk.id, factor] = span
        return [self._spans[c.id, factor] for c in chunks]

    def replace_spans(self, factor: float, spans: Sequence[MemorySpan]) -> None:
        """Answer from these spans of their chunks at a factor from now on."""
        self._spans |= {(s.chunk_id, factor): s for s in spans}

    def prompt(self, system: System, question: Question) -> list[Part]:
        """The prompt that a system sees."""
        chunks = question.chunks
        contents: list[list[Part]] = []
        if system.kind == "text":
            contents = [[c.text] for c in chunks]
        elif system.kind == "spans":
            contents = [enclosed(s, self.compressor.spec) for s in self.spans(chunks, system.factor)]
        elif system.kind == "prerolled":
            spec, backbone = self.compressor.spec, self.decoder.backbone
            contents = [[preroll(s, spec, backbone)] for s in self.spans(chunks, system.factor)]
        elif system.kind == "truncated":
            slots = [s.num_slots for s in self.spans(chunks, system.factor)]
            contents = [[truncated_part(self.decoder.backbone, c, n)] for c, n in zip(chunks, slots, strict=True)]
        of_spans = self.compressor.spec if system.kind in ("spans", "prerolled") else None
        return prompt_parts(self.decoder.backbone, question.text, contents, of_spans)

    def ask(self, system: System, questions: Sequence[Question],
            progress: Callable[[int], None] | None = None) -> list[Generation]:
        """Answers of one system, in the questions' order."""
        if system.kind not in ("text", "none"):
            self.spans([c for q in questions for c in q.chunks], system.factor)
        order = sorted(range(len(questions)), key=lambda i: sum(c.num_tokens for c in questions[i].chunks))
        answers: dict[int, Generation] = {}
        for begin in range(0, len(order), _BATCH):
            batch = order[begin : begin + _BATCH]
            made = self.decoder.batch([self.prompt(system, questions[i]) for i in batch], self.settings)
            answers.update(zip(batch, made, strict=True))
            if progress:
                progress(len(batch))
        return [answers[i] for i in range(len(questions))]


__all__ = ["PREROLLED", "Comparison", "Question", "System", "default_systems", "possible_factors"]
