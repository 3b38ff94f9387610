"""The systems that are compared on the same questions: full text, spans at several factors, truncated text, nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import Compressor, possible_factors
from ctxcomp_rag.decoding import (
    FrozenDecoder,
    Generation,
    GenerationSettings,
    Part,
    TokenIds,
    blend_rolled,
    enclosed,
    preroll,
    reconstruction_prompt,
)
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.tasks import Ask
from ctxcomp_rag.index.codecs import codec_named
from ctxcomp_rag.index.rows import span_from_bytes, span_to_bytes
from ctxcomp_rag.pipeline import prompt_parts, truncated_part
from ctxcomp_rag.retention import RUN_OVER_TOKENS
from ctxcomp_rag.spans import MemorySpan

_BATCH = 16
_LATENT = ("spans", "prerolled", "mixed")


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the chunks that a system is given for it, in prompt order.

    Attributes:
        ask: "repeat" asks for the text of the one chunk instead, "continue" for what follows the chunks, outside any
            chat; both have no question.
    """

    text: str
    answers: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    ask: Ask = "question"


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        kind: "text", "spans", "prerolled" (spans kept as keys and values), "truncated" (text cut to the positions of
            spans), "mixed" (the first chunk as text, the others as spans), "extractive" (text of which an extractor
            has kept words) or "none".
        factor: source tokens per slot; of what "truncated" and "extractive" imitate.
        compressor: of the spans; None for the comparison's own.
        codec: how the spans are stored before they are read.
        extractor: (text, factor) -> shorter text.
        blend: fraction of the slots of pre-rolled spans that is computed anew.
        quote: its answers are held to the words of the chunks, whatever it reads in their place.
    """

    name: str
    kind: str
    factor: float = 1.0
    compressor: Compressor | None = field(default=None, compare=False)
    codec: str = "exact"
    extractor: Callable[[str, float], str] | None = field(default=None, compare=False)
    blend: float = 0.0
    quote: bool = False


@dataclass
class Work:
    """What making the spans of a system took."""

    chunks: int = 0
    seconds: float = 0.0


def default_systems(factors: Sequence[float] = (4, 8, 16)) -> list[System]:
    """Full text, spans at each factor, text truncated to the positions of the first of them, no context."""
    spans = [System(f"{f:g}x", "spans", f) for f in factors]
    truncated = System(f"truncated_{factors[0]:g}x", "truncated", factors[0])
    return [System("full_text", "text"), *spans, truncated, System("no_context", "none")]


def further_systems(compressors: Mapping[str, Compressor], factors: Sequence[float], *, codecs: Sequence[str] = (),
                    mixed: bool = False, extractor: Callable[[str, float], str] | None = None,
                    quote: bool = False) -> list[System]:
    """Systems beside the default ones.

    Args:
        compressors: further ones, by the name that stands before their factors; those of `factors` that each can make.
        codecs: of the default spans at the first factor.
        mixed: the best chunk as text and the others as spans, at the first factor.
        extractor: gives the texts at every factor.
        quote: the default ones that read chunks, once more, their answers held to the chunks' words.

    Raises:
        InputError: there is no such codec, or it learns from an index.
    """
    for codec in codecs:
        if codec_named(codec).learns:
            raise InputError(f"the codec {codec!r} learns from the first spans of an index, and here is none; measure "
                             "it on one: ctxcomp codecs DIR")
    first = factors[0]
    return [*(System(f"{name}_{f:g}x", "spans", f, made) for name, made in compressors.items()
              for f in possible_factors(made, factors)),
            *(System(f"{first:g}x_{codec}", "spans", first, codec=codec) for codec in codecs),
            *([System(f"mixed_{first:g}x", "mixed", first)] if mixed else []),
            *(System(f"extractive_{f:g}x", "extractive", f, extractor=extractor) for f in factors if extractor),
            *(quoted_systems(default_systems(factors)) if quote else [])]


def quoted_systems(systems: Sequence[System]) -> list[System]:
    """The systems that read chunks, their answers held to the chunks' words."""
    return [replace(s, name=f"{s.name}_quoted", quote=True) for s in systems if s.kind != "none"]


PREROLLED = (System("4x_prerolled", "prerolled", 4.0), *(
    System(f"4x_prerolled_blend_{blend:.0%}", "prerolled", 4.0, blend=blend) for blend in (0.15, 0.5, 1.0)))
"""Not among the default systems: benchmarks add them, to see what a span that cannot see its prompt loses, and how
much of it a blend gives back."""


class Comparison:
    """Asks every system the same questions; spans are compressed once for each compressor and factor.

    Attributes:
        work: what each system's spans, or extracted texts, took to make, by the system's name.
    """

    def __init__(self, compressor: Compressor, decoder: FrozenDecoder,
                 settings: GenerationSettings | None = None) -> None:
        self.compressor, self.decoder = compressor, decoder
        self.settings = settings or GenerationSettings(max_new_tokens=24)
        self.work: dict[str, Work] = {}
        self._spans: dict[tuple[int, str, float, str], MemorySpan] = {}
        self._texts: dict[tuple[str, str], str] = {}
        self._contents: dict[str, Callable[[System, Sequence[Chunk]], list[list[Part]]]] = {
            "text": lambda _, chunks: [[c.text] for c in chunks],
            "spans": self._as_spans, "prerolled": self._as_prerolled, "mixed": self._as_mixed,
            "truncated": self._as_truncated, "extractive": self._as_extracts, "none": lambda _, chunks: [],
        }

    def spans(self, chunks: Sequence[Chunk], factor: float) -> list[MemorySpan]:
        """Spans of the comparison's compressor at a factor, from memory where they were made before."""
        return self._made(System(f"{factor:g}x", "spans", factor), chunks)

    def prepare(self, system: System, questions: Sequence[Question]) -> None:
        """Make all the spans that a system needs, in batches."""
        if system.kind in (*_LATENT, "truncated"):
            self._made(system, [c for q in questions for c in q.chunks])

    def _made(self, system: System, chunks: Sequence[Chunk]) -> list[MemorySpan]:
        maker = system.compressor or self.compressor
        known = self._spans

        def key(chunk: Chunk, codec: str) -> tuple[int, str, float, str]:
            return id(maker), chunk.id, system.factor, codec

        new = list({c.id: c for c in chunks if key(c, "exact") not in known}.values())
        begin = time.perf_counter()
        for chunk, span in zip(new, maker.compress(new, compression_factor=system.factor) if new else [], strict=True):
            known[key(chunk, "exact")] = span
        seconds = time.perf_counter() - begin
        for chunk in {c.id: c for c in chunks if key(c, system.codec) not in known}.values():
            stored = span_to_bytes(known[key(chunk, "exact")], codec_named(system.codec))
            known[key(chunk, system.codec)] = span_from_bytes(stored)
        if new:
            work = self.work.setdefault(system.name, Work())
            work.chunks += len(new)
            work.seconds += seconds
        return [known[key(c, system.codec)] for c in chunks]

    def index_bytes(self, system: System, chunks: Sequence[Chunk]) -> float | None:
        """Bytes per source token that an index keeps for a system to read; None where it reads nothing of its own."""
        tokens = sum(c.num_tokens for c in chunks)
        if system.kind in ("text", "extractive"):
            texts = [self._extract(system, c) if system.kind == "extractive" else c.text for c in chunks]
            return sum(len(t.encode()) for t in texts) / tokens
        if system.kind not in ("spans", "mixed"):
            return None
        exact = self._made(replace(system, codec="exact"), chunks)
        return sum(len(span_to_bytes(s, codec_named(system.codec))) for s in exact) / tokens

    def replace_spans(self, factor: float, spans: Sequence[MemorySpan]) -> None:
        """Answer from these spans of their chunks at a factor from now on."""
        self._spans |= {(id(self.compressor), s.chunk_id, factor, "exact"): s for s in spans}

    def prompt(self, system: System, question: Question) -> list[Part]:
        """The prompt that a system sees."""
        spec = (system.compressor or self.compressor).spec if system.kind in _LATENT else None
        if question.ask == "repeat":
            assert spec is not None
            return reconstruction_prompt(self._made(system, question.chunks)[0], spec)
        contents = self._contents[system.kind](system, question.chunks)
        if question.ask == "continue":
            return [part for content in contents for part in content]
        return prompt_parts(self.decoder.backbone, question.text, contents, spec)

    def _as_spans(self, system: System, chunks: Sequence[Chunk]) -> list[list[Part]]:
        spec = (system.compressor or self.compressor).spec
        return [enclosed(s, spec) for s in self._made(system, chunks)]

    def _as_prerolled(self, system: System, chunks: Sequence[Chunk]) -> list[list[Part]]:
        around = self.compressor.spec, self.decoder.backbone
        rolled = [(preroll(s, *around), s) for s in self._made(system, chunks)]
        return [[blend_rolled(r, s, *around, system.blend) if system.blend else r] for r, s in rolled]

    def _as_mixed(self, system: System, chunks: Sequence[Chunk]) -> list[list[Part]]:
        first: list[list[Part]] = [[c.text] for c in chunks[:1]]
        return first + self._as_spans(system, chunks[1:])

    def _as_truncated(self, system: System, chunks: Sequence[Chunk]) -> list[list[Part]]:
        slots = [s.num_slots for s in self._made(system, chunks)]
        return [[truncated_part(self.decoder.backbone, c, n)] for c, n in zip(chunks, slots, strict=True)]

    def _as_extracts(self, system: System, chunks: Sequence[Chunk]) -> list[list[Part]]:
        return [[self._extract(system, c)] for c in chunks]

    def _extract(self, system: System, chunk: Chunk) -> str:
        if system.extractor is None:
            raise InputError(f"the system {system.name!r} has no extractor; pass one, such as LLMLingua2")
        key = system.name, chunk.id
        if key not in self._texts:
            begin = time.perf_counter()
            self._texts[key] = system.extractor(chunk.text, system.factor)
            work = self.work.setdefault(system.name, Work())
            work.chunks += 1
            work.seconds += time.perf_counter() - begin
        return self._texts[key]

    def ask(self, system: System, questions: Sequence[Question],
            progress: Callable[[int], None] | None = None) -> list[Generation]:
        """Answers of one system, in the questions' order; a text is repeated to its length."""
        self.prepare(system, questions)
        order = sorted(range(len(questions)), key=lambda i: sum(c.num_tokens for c in questions[i].chunks))
        answers: dict[int, Generation] = {}
        for begin in range(0, len(order), _BATCH):
            batch = order[begin : begin + _BATCH]
            repeated = [c.num_tokens for i in batch for c in questions[i].chunks if questions[i].ask == "repeat"]
            settings = None
            if repeated:
                settings = replace(self.settings, max_new_tokens=max(repeated) + RUN_OVER_TOKENS)
            made = self.decoder.batch([self.prompt(system, questions[i]) for i in batch],
                                      [self.settings_of(system, questions[i], settings) for i in batch])
            answers.update(zip(batch, made, strict=True))
            if progress:
                progress(len(batch))
        return [answers[i] for i in range(len(questions))]

    def settings_of(self, system: System, question: Question,
                    settings: GenerationSettings | None = None) -> GenerationSettings:
        """How a system answers a question: the settings [default: the comparison's], quoting if it quotes."""
        quoted = tuple(c.text for c in question.chunks) if system.quote else ()
        return replace(settings or self.settings, quote_from=quoted)

    def loss(self, system: System, question: Question) -> tuple[float, int]:
        """(nats of the first answer after the prompt, its tokens)."""
        ids = self.decoder.backbone.tokenizer.encode(question.answers[0])
        logits = self.decoder.logits([*self.prompt(system, question), TokenIds(tuple(ids))])[-len(ids) - 1 : -1]
        # without anything before it, the first token is given
        told = torch.tensor(ids[len(ids) - len(logits) :], device=logits.device)
        return float(torch.nn.functional.cross_entropy(logits.float(), told, reduction="sum")), len(told)
