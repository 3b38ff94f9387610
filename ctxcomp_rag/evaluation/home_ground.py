"""The embedded model on its home ground: held-out documents of the fictional knowledge base, names never trained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ctxcomp_rag.chunking import Chunk, Document, split_document
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, reconstruction_prompt
from ctxcomp_rag.evaluation.fictional import NOT_STATED, FictionalDocument, generate_corpus
from ctxcomp_rag.evaluation.metrics import bleu, exact_match, mean
from ctxcomp_rag.evaluation.systems import Comparison, Question, System, default_systems
from ctxcomp_rag.retrieval import RetrievalEncoder, embed_texts


@dataclass(frozen=True)
class HomeGroundReport:
    """Percentages. `exact_match` with the single right chunk, `exact_match_retrieved` with `top_k` retrieved ones.

    `false_answers` counts unanswerable questions that got anything but "not stated".
    """

    exact_match: dict[str, float]
    exact_match_retrieved: dict[str, float]
    false_answers: dict[str, float]
    retrieval_recall: float
    reconstruction_bleu: float | None
    questions: int
    documents: int
    top_k: int


def corpus_chunks(corpus: Sequence[FictionalDocument], compressor: Compressor) -> list[Chunk]:
    """One chunk for each document (they are shorter than a chunk)."""
    chunks = []
    for entry in corpus:
        document = Document(entry.id, entry.text, {"kind": entry.kind})
        chunks += split_document(document, compressor.backbone.tokenizer, max_tokens=compressor.max_chunk_tokens)[:1]
    return chunks


def evaluate_home_ground(compressor: Compressor, encoder: RetrievalEncoder, *, documents: int = 100, seed: int = 1,
                         top_k: int = 3, systems: Sequence[System] | None = None, with_bleu: bool = True,
                         progress: Callable[[str, int], None] | None = None) -> HomeGroundReport:
    """One answerable and one unanswerable question for each of `documents` held-out documents.

    Args:
        progress: called with (system, questions answered).
    """
    systems = list(systems or default_systems())
    corpus = generate_corpus(documents, seed, "held_out")
    chunks = corpus_chunks(corpus, compressor)
    rng = random.Random(seed)
    asked = [rng.choice(d.questions) for d in corpus]
    absent = [rng.choice(d.unanswerable) for d in corpus]
    vectors = embed_texts(encoder, [c.text for c in chunks])
    scores = embed_texts(encoder, [a.question for a in asked]) @ vectors.T
    nearest = np.argsort(-scores, axis=1)[:, :top_k]
    comparison = Comparison(compressor, FrozenDecoder(compressor.backbone))
    single = [Question(a.question, (a.answer,), (c,)) for a, c in zip(asked, chunks, strict=True)]
    several = [Question(a.question, (a.answer,), tuple(chunks[j] for j in hits))
               for a, hits in zip(asked, nearest, strict=True)]
    missing = [Question(a.question, (NOT_STATED,), (c,)) for a, c in zip(absent, chunks, strict=True)]

    def score(questions: Sequence[Question], chosen: Sequence[System]) -> dict[str, float]:
        result = {}
        for system in chosen:
            answers = comparison.ask(system, questions, lambda n, s=system: progress(s.name, n) if progress else None)  # type: ignore[misc]
            hits = [exact_match(g.text, q.answers) for g, q in zip(answers, questions, strict=True)]
            result[system.name] = round(100 * mean(hits), 1)
        return result

    stated = {name: round(100 - em, 1) for name, em in score(missing, systems[:2]).items()}
    return HomeGroundReport(
        exact_match=score(single, systems),
        exact_match_retrieved=score(several, [s for s in systems if s.kind != "none"]),
        false_answers=stated,
        retrieval_recall=round(100 * mean([float(i in hits) for i, hits in enumerate(nearest)]), 1),
        reconstruction_bleu=reconstruction_bleu(comparison, chunks, 4.0) if with_bleu else None,
        questions=len(single), documents=len(corpus), top_k=top_k,
    )


def reconstruction_bleu(comparison: Comparison, chunks: Sequence[Chunk], factor: float) -> float:
    """BLEU of the texts that the decoder reads out of the spans."""
    spans = comparison.spans(chunks, factor)
    texts: list[str] = []
    for begin in range(0, len(spans), 16):
        batch = spans[begin : begin + 16]
        prompts = [reconstruction_prompt(s, comparison.compressor.spec) for s in batch]
        limit = max(s.num_source_tokens for s in batch) + 8
        texts += [g.text for g in comparison.decoder.batch(prompts, GenerationSettings(max_new_tokens=limit))]
    return round(bleu(texts, [c.text for c in chunks]), 1)
