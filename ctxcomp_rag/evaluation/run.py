"""One task, several systems, the same hits for all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ctxcomp_rag.chunking import Chunk, split_document
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.metrics import exact_match, mean, token_f1
from ctxcomp_rag.evaluation.systems import Comparison, Question, System, default_systems
from ctxcomp_rag.evaluation.tasks import Asked, TaskData
from ctxcomp_rag.evaluation.timing import cache_bytes, time_to_first_token
from ctxcomp_rag.retrieval import RetrievalEncoder, embed_texts

SETTINGS = ("oracle", "retrieved")
_RESAMPLES = 1000


@dataclass(frozen=True)
class Row:
    """One system in one setting. Scores are per cent, with 95 % bootstrap intervals over the questions.

    Attributes:
        of_full_text: share of the full text's F1 that is kept, per cent; None where that is 0.
        too_long: questions whose prompt does not fit the decoder's window; they count as wrong.
        first_token_ms: median time from prompt parts to the first token, over a sample.
    """

    setting: str
    system: str
    em: float
    em_interval: tuple[float, float]
    f1: float
    f1_interval: tuple[float, float]
    of_full_text: float | None
    positions: float
    cache_bytes: int
    first_token_ms: float | None
    too_long: int


@dataclass(frozen=True)
class TaskResult:
    """All rows of a run, what retrieval found, and the answers themselves."""

    rows: tuple[Row, ...]
    retrieval_recall: float | None
    questions: int
    documents: int
    chunks: int
    answers: tuple[dict[str, str], ...]


def run_task(data: TaskData, compressor: Compressor, encoder: RetrievalEncoder, *,
             settings: Sequence[str] = SETTINGS, systems: Sequence[System] | None = None, top_k: int = 3,
             timed: int = 10, seed: int = 0, max_new_tokens: int = 24,
             progress: Callable[[str, int], None] | None = None) -> TaskResult:
    """Ask every system every question.

    Args:
        settings: "oracle" gives the chunks that hold the answer, "retrieved" the `top_k` nearest ones.
        timed: questions whose time to first token is measured; 0 for none.
        progress: called with (setting/system, questions answered).
    """
    unknown = set(settings) - set(SETTINGS)
    if unknown:
        raise InputError(f"there is no setting {min(unknown)!r}; expected {' or '.join(SETTINGS)}")
    if not data.asked:
        raise InputError("the task has no questions")
    systems = list(systems or default_systems())
    chunks = [c for d in data.documents
              for c in split_document(d, compressor.backbone.tokenizer, max_tokens=compressor.max_chunk_tokens)]
    of_document: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        of_document.setdefault(chunk.document_id, []).append(chunk)
    given = {"oracle": [_oracle(q, of_document) for q in data.asked]} if "oracle" in settings else {}
    if "retrieved" in settings:
        given["retrieved"] = _retrieved(data.asked, chunks, of_document, encoder, top_k)
    comparison = Comparison(compressor, FrozenDecoder(compressor.backbone),
                            GenerationSettings(max_new_tokens=max_new_tokens))
    rows: list[Row] = []
    answers: list[dict[str, str]] = [{"question": q.question, "expected": q.answers[0]} for q in data.asked]
    for setting, contexts in given.items():
        posed = [Question(q.question, q.answers, c) for q, c in zip(data.asked, contexts, strict=True)]
        full: float | None = None
        for system in systems:
            if system.kind == "none" and setting != settings[0]:
                continue  # it does not depend on the setting
            label = f"{setting}/{system.name}"
            said, positions, too_long = _ask(comparison, system, posed,
                                             lambda n, name=label: progress(name, n) if progress else None)  # type: ignore[misc]
            for answer, text in zip(answers, said, strict=True):
                answer[label] = text
            em = [100 * exact_match(t, q.answers) for t, q in zip(said, posed, strict=True)]
            f1 = [100 * token_f1(t, q.answers) for t, q in zip(said, posed, strict=True)]
            full = mean(f1) if system.kind == "text" else full
            times = [time_to_first_token(comparison.decoder, {"": comparison.prompt(system, q)}, repeats=3)[""]
                     for q in posed[:timed] if _fits(comparison, system, q)]
            rows.append(Row(
                setting, system.name, round(mean(em), 1), interval(em, seed), round(mean(f1), 1), interval(f1, seed),
                round(100 * mean(f1) / full, 1) if full else None, round(mean(positions), 1),
                cache_bytes(comparison.decoder, round(mean(positions))),
                round(1000 * statistics.median(times), 2) if times else None, too_long))
    recall = None
    if "retrieved" in given:
        recall = round(100 * mean([float(_states(q, hits)) for q, hits in
                                   zip(data.asked, given["retrieved"], strict=True)]), 1)
    return TaskResult(tuple(rows), recall, len(data.asked), len(data.documents), len(chunks), tuple(answers))


def interval(scores: Sequence[float], seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean."""
    drawn = np.random.default_rng(seed).integers(0, len(scores), (_RESAMPLES, len(scores)))
    low, high = np.percentile(np.asarray(scores)[drawn].mean(axis=1), [2.5, 97.5])
    return round(float(low), 1), round(float(high), 1)


def _ask(comparison: Comparison, system: System, posed: Sequence[Question], progress: Callable[[int], None]
         ) -> tuple[list[str], list[float], int]:
    fitting = [i for i, q in enumerate(posed) if _fits(comparison, system, q)]
    made = comparison.ask(system, [posed[i] for i in fitting], progress)
    said = dict(zip(fitting, (g.text.strip() for g in made), strict=True))
    return ([said.get(i, "") for i in range(len(posed))], [float(g.usage.positions) for g in made],
            len(posed) - len(fitting))


def _fits(comparison: Comparison, system: System, question: Question) -> bool:
    try:
        comparison.decoder.splice(comparison.prompt(system, question))
    except InputError:
        return False
    return True


def _oracle(asked: Asked, of_document: dict[str, list[Chunk]]) -> tuple[Chunk, ...]:
    """The chunk that holds the answer's place; else those of the gold documents that state it; else all of them."""
    own = [c for i in asked.gold for c in of_document[i]]
    if asked.place is not None:
        name, begin, end = asked.place
        holding = [c for c in own if c.document_id == name and c.start <= begin and end <= c.end]
        return tuple(holding[:1] or own[:1])
    return tuple(own)


def _retrieved(asked: Sequence[Asked], chunks: Sequence[Chunk], of_document: dict[str, list[Chunk]],
               encoder: RetrievalEncoder, top_k: int) -> list[tuple[Chunk, ...]]:
    row = {c.id: i for i, c in enumerate(chunks)}
    vectors = embed_texts(encoder, [c.text for c in chunks])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    queries = embed_texts(encoder, [q.question for q in asked])
    hits = []
    for q, query in zip(asked, queries, strict=True):
        pool = np.array([row[c.id] for i in q.pool for c in of_document[i]] or range(len(chunks)))
        best = pool[np.argsort(-(vectors[pool] @ query), kind="stable")[:top_k]]
        hits.append(tuple(chunks[i] for i in best))
    return hits


def _states(asked: Asked, hits: Sequence[Chunk]) -> bool:
    return any(a.lower() in c.text.lower() for a in asked.answers for c in hits)


__all__ = ["SETTINGS", "Row", "TaskResult", "interval", "run_task"]
