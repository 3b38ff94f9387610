"""What a decoder still knows of single documents whose cache entries are mostly gone, by rule and budget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor, InfiniPotConfig
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.home_ground import chunk_with, split_corpus
from ctxcomp_rag.evaluation.metrics import exact_match, mean
from ctxcomp_rag.evaluation.systems import Comparison, Question, System
from ctxcomp_rag.kv.scores import H2O, CaP, KeyNorm, NuC, Random, SnapKV, StreamingLLM
from ctxcomp_rag.pipeline import prompt_parts

CONFIGS = {
    "infinipot": InfiniPotConfig().repeating(),
    "infinipot_generic": InfiniPotConfig(),
    "cap": InfiniPotConfig(rule=CaP()),
    "nuc": InfiniPotConfig(rule=NuC()),
    "snapkv": InfiniPotConfig(rule=SnapKV(window=8)),  # chunks of 100 tokens have no room for a window of 32
    "tova": InfiniPotConfig(rule=SnapKV(window=1, kernel=1)),
    "h2o": InfiniPotConfig(rule=H2O()),
    "streaming_llm": InfiniPotConfig(rule=StreamingLLM()),
    "key_norm": InfiniPotConfig(rule=KeyNorm()),
    "random": InfiniPotConfig(rule=Random()),
}
"""Settings of the table's rows. "infinipot" is what `--compressor infinipot` uses, "infinipot_generic" the paper's."""

QUESTION_AWARE = "infinipot_question"
"""The row whose spans are made for each question; the others are made before any question is known."""

_SETTINGS = GenerationSettings(max_new_tokens=24)
_BATCH = 16


@dataclass(frozen=True)
class Score:
    """Exact match in percent at one compression factor, and the positions that a document takes on average."""

    name: str
    factor: float
    exact_match: float
    positions: float


def single_document_questions(compressor: Compressor, documents: int, seed: int) -> list[Question]:
    """One question for each held-out document, with the chunk that answers it."""
    corpus = generate_corpus(documents, seed, "held_out")
    chunks = split_corpus(corpus, compressor)
    rng = random.Random(seed)
    asked = [rng.choice(d.questions) for d in corpus]
    return [Question(a.question, (a.answer,), (chunk_with(a.answer, d.id, chunks),))
            for a, d in zip(asked, corpus, strict=True)]


def score_text(backbone: Backbone, questions: Sequence[Question]) -> Score:
    """The full cache: every document as text."""
    comparison = Comparison(InfiniPotCompressor(backbone), FrozenDecoder(backbone), _SETTINGS)
    made = comparison.ask(System("full_cache", "text"), questions)
    return _score("full_cache", 1.0, questions, [g.text for g in made], [c for q in questions for c in q.chunks])


def score_spans(name: str, compressor: Compressor, questions: Sequence[Question], factor: float) -> Score:
    """Spans made before the questions are known."""
    comparison = Comparison(compressor, FrozenDecoder(compressor.backbone), _SETTINGS)
    made = comparison.ask(System(name, "spans", factor), questions)
    slots = mean([float(g.usage.slots) for g in made])
    return _score(name, factor, questions, [g.text for g in made], slots)


def score_question_aware(backbone: Backbone, questions: Sequence[Question], factor: float) -> Score:
    """InfiniPot's spans made for each question (CaP-Q)."""
    compressor, decoder = InfiniPotCompressor(backbone), FrozenDecoder(backbone)
    texts, slots = [], []
    for begin in range(0, len(questions), _BATCH):
        prompts = []
        for q in questions[begin : begin + _BATCH]:
            spans = compressor.for_question(q.text).compress(q.chunks, compression_factor=factor)
            slots.append(float(sum(s.num_slots for s in spans)))
            prompts.append(prompt_parts(backbone, q.text, [[s] for s in spans]))
        texts += [g.text for g in decoder.batch(prompts, _SETTINGS)]
    return _score(QUESTION_AWARE, factor, questions, texts, mean(slots))


def _score(name: str, factor: float, questions: Sequence[Question], texts: Sequence[str],
           positions: float | Sequence[Chunk]) -> Score:
    hits = [exact_match(t, q.answers) for t, q in zip(texts, questions, strict=True)]
    if not isinstance(positions, float):
        positions = sum(c.num_tokens for c in positions) / len(questions)
    return Score(name, factor, round(100 * mean(hits), 1), round(positions, 1))


__all__ = ["CONFIGS", "QUESTION_AWARE", "Score", "score_question_aware", "score_spans", "score_text",
           "single_document_questions"]
