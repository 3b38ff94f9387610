"""The embedded model on its home ground: held-out documents of the fictional knowledge base, names never trained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ctxcomp_rag.chunking import Chunk, Document, split_document
from ctxcomp_rag.compressors import Compressor, possible_factors
from ctxcomp_rag.decoding import FrozenDecoder
from ctxcomp_rag.evaluation.fictional import NOT_STATED, FictionalDocument, generate_corpus
from ctxcomp_rag.evaluation.metrics import bleu, exact_match, mean
from ctxcomp_rag.evaluation.systems import Comparison, Question, System, default_systems
from ctxcomp_rag.retention import reconstructions
from ctxcomp_rag.retrieval import RetrievalEncoder, embed_texts


@dataclass(frozen=True)
class HomeGroundReport:
    """Percentages. `exact_match` with the single right chunk, `exact_match_retrieved` with `top_k` retrieved ones.

    `false_answers` counts unanswerable questions that got anything but "not stated" from text or spans.
    """

    exact_match: dict[str, float]
    exact_match_retrieved: dict[str, float]
    false_answers: dict[str, float]
    retrieval_recall: float
    reconstruction_bleu: float | None
    questions: int
    documents: int
    top_k: int


def split_corpus(corpus: Sequence[FictionalDocument], compressor: Compressor) -> list[Chunk]:
    """The documents' chunks, in order; most documents are one chunk."""
    chunks = []
    for entry in corpus:
        document = Document(entry.id, entry.text, {"kind": entry.kind})
        chunks += split_document(document, compressor.backbone.tokenizer, max_tokens=compressor.max_chunk_tokens)
    return chunks


def chunk_with(answer: str, document_id: str, chunks: Sequence[Chunk]) -> Chunk:
    """The chunk of a document that states an answer (its first chunk where a boundary cut the answer)."""
    own = [c for c in chunks if c.document_id == document_id]
    return next((c for c in own if answer in c.text), own[0])


def evaluate_home_ground(compressor: Compressor, encoder: RetrievalEncoder, *, documents: int = 100, seed: int = 1,
                         top_k: int = 3, systems: Sequence[System] | None = None, with_bleu: bool = True,
                         progress: Callable[[str, int], None] | None = None) -> HomeGroundReport:
    """One answerable and one unanswerable question for each of `documents` held-out documents.

    Args:
        systems: compared ones [default: `default_systems` at the factors of 4, 8 and 16 that the compressor can make];
            the texts that are read out of spans for BLEU are at the smallest of these factors.
        progress: called with (system, questions answered).
    """
    factors = possible_factors(compressor)
    systems = list(systems or default_systems(factors))
    corpus = generate_corpus(documents, seed, "held_out")
    chunks = split_corpus(corpus, compressor)
    rng = random.Random(seed)
    asked = [rng.choice(d.questions) for d in corpus]
    absent = [rng.choice(d.unanswerable) for d in corpus]
    vectors = embed_texts(encoder, [c.text for c in chunks])
    scores = embed_texts(encoder, [a.question for a in asked]) @ vectors.T
    nearest = np.argsort(-scores, axis=1)[:, :top_k]
    comparison = Comparison(compressor, FrozenDecoder(compressor.backbone))
    right = [chunk_with(a.answer, d.id, chunks) for a, d in zip(asked, corpus, strict=True)]
    whole = [tuple(c for c in chunks if c.document_id == d.id) for d in corpus]
    single = [Question(a.question, (a.answer,), (c,)) for a, c in zip(asked, right, strict=True)]
    several = [Question(a.question, (a.answer,), tuple(chunks[j] for j in hits))
               for a, hits in zip(asked, nearest, strict=True)]
    missing = [Question(a.question, (NOT_STATED,), own) for a, own in zip(absent, whole, strict=True)]

    def score(questions: Sequence[Question], chosen: Sequence[System]) -> dict[str, float]:
        result = {}
        for system in chosen:
            answers = comparison.ask(system, questions, lambda n, s=system: progress(s.name, n) if progress else None)  # type: ignore[misc]
            hits = [exact_match(g.text, q.answers) for g, q in zip(answers, questions, strict=True)]
            result[system.name] = round(100 * mean(hits), 1)
        return result

    reading = [s for s in systems if s.kind in ("text", "spans")]
    stated = {name: round(100 - em, 1) for name, em in score(missing, reading).items()}
    return HomeGroundReport(
        exact_match=score(single, systems),
        exact_match_retrieved=score(several, [s for s in systems if s.kind != "none"]),
        false_answers=stated,
        retrieval_recall=round(100 * mean([float(c in q.chunks) for c, q in zip(right, several, strict=True)]), 1),
        reconstruction_bleu=reconstruction_bleu(comparison, chunks, factors[0]) if with_bleu else None,
        questions=len(single), documents=len(corpus), top_k=top_k,
    )


def reconstruction_bleu(comparison: Comparison, chunks: Sequence[Chunk], factor: float) -> float:
    """BLEU of the texts that the decoder reads out of the spans."""
    texts = reconstructions(comparison.decoder, comparison.spans(chunks, factor), comparison.compressor.spec)
    return round(bleu(texts, [c.text for c in chunks]), 1)
