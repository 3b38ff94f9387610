"""One task, several systems, the same hits for all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ctxcomp_rag.chunking import Chunk, split_document
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.metrics import mean
from ctxcomp_rag.evaluation.scoring import Scored, interval, score
from ctxcomp_rag.evaluation.systems import Comparison, Question, System, default_systems
from ctxcomp_rag.evaluation.tasks import Asked, TaskData
from ctxcomp_rag.evaluation.timing import cache_bytes, time_to_answer, time_to_first_token
from ctxcomp_rag.retrieval import RetrievalEncoder, embed_texts

SETTINGS = ("oracle", "retrieved")


@dataclass(frozen=True)
class Row:
    """One system in one setting.

    Attributes:
        factor: of the system's spans or of what it imitates; None where it has none.
        scores: by measure, per cent (perplexity as it is), with their 95 % bootstrap intervals over the questions.
        of_full_text: share of the full text's last measure that is kept, per cent, of a system that quotes that of the
            full text quoted; None where that is 0.
        cache_bytes: keys and values of the mean prompt.
        first_token_ms, total_ms: median time from prompt parts to the first token, and to the end of the answer, over
            a sample, one question at a time.
        answers_per_second: in batches, compression not counted.
        index_bytes: stored per source token of what the system reads.
        docs_per_second: chunks compressed per second; None where it was done for an earlier row.
        too_long: questions whose prompt does not fit the decoder's window; they count as wrong.
    """

    setting: str
    system: str
    factor: float | None
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    of_full_text: float | None
    positions: float
    cache_bytes: int
    first_token_ms: float | None
    total_ms: float | None
    answers_per_second: float | None
    index_bytes: float | None
    docs_per_second: float | None
    too_long: int

    def to_json(self) -> dict[str, Any]:
        """The fields in one object, a measure as `f1` and its interval as `f1_interval`."""
        fields = asdict(self)
        scores, intervals = fields.pop("scores"), fields.pop("intervals")
        head = {k: fields.pop(k) for k in ("setting", "system", "factor")}
        measured = {k: v for m in scores for k, v in ((m, scores[m]), (f"{m}_interval", intervals[m]))}
        return {**head, **measured, **fields}


@dataclass(frozen=True)
class TaskResult:
    """All rows of a run, what retrieval found, and the answers themselves (by setting/system)."""

    rows: tuple[Row, ...]
    retrieval_recall: float | None
    questions: int
    documents: int
    chunks: int
    answers: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return {**asdict(self), "rows": [row.to_json() for row in self.rows]}


def run_task(data: TaskData, compressor: Compressor, encoder: RetrievalEncoder, *,
             settings: Sequence[str] = SETTINGS, systems: Sequence[System] | None = None, top_k: int = 3,
             timed: int = 10, seed: int = 0, progress: Callable[[str, int], None] | None = None) -> TaskResult:
    """Ask every system every question.

    Args:
        settings: "oracle" gives the chunks that hold the answer, "retrieved" the `top_k` nearest ones; a task that asks
            for no answer has the first only.
        timed: questions whose times are measured; 0 for none.
        progress: called with (setting/system, questions answered).
    """
    unknown = set(settings) - set(SETTINGS)
    if unknown:
        raise InputError(f"there is no setting {min(unknown)!r}; expected {' or '.join(SETTINGS)}")
    if not data.asked:
        raise InputError("the task has no questions")
    systems = list(systems or default_systems())
    # no chunk is longer than what every compressor was made for
    limit = min(c.max_chunk_tokens for c in (compressor, *(s.compressor for s in systems if s.compressor)))
    chunks = [c for d in data.documents for c in split_document(d, compressor.backbone.tokenizer, max_tokens=limit)]
    comparison = Comparison(compressor, FrozenDecoder(compressor.backbone),
                            GenerationSettings(max_new_tokens=data.answer_tokens))
    given = _posed(data, chunks, encoder, settings, top_k)
    asked = next(iter(given.values()))
    answers: list[dict[str, Any]] = [{"question": q.text, "expected": list(q.answers)} for q in asked]
    if data.ask == "question":
        answers = [{**a, **q.about} for a, q in zip(answers, data.asked, strict=True)]
    rows: list[Row] = []
    for setting, posed in given.items():
        full: dict[bool, float | None] = {}  # by whether it quotes
        for system in systems:
            if (system.kind == "none" and setting != next(iter(given))) or (
                    data.ask == "repeat" and system.kind != "spans"):
                continue  # nothing to read does not depend on the setting; only spans are read out
            label = f"{setting}/{system.name}"
            asking = _Asking(comparison, system, posed, data, seed,
                             lambda n, name=label: progress(name, n) if progress else None)  # type: ignore[misc]
            row, said = asking.row(setting, full.get(system.quote), timed)
            if system.kind == "text":
                full[system.quote] = row.scores.get(data.measures[-1])
            for answer, text in zip(answers, said, strict=True):
                answer[label] = text
            rows.append(row)
    recall = None
    if "retrieved" in given:
        recall = round(100 * mean([float(any(_states(c, q.answers) for c in q.chunks)) for q in given["retrieved"]]), 1)
    return TaskResult(tuple(rows), recall, len(asked), len(data.documents), len(chunks), tuple(answers))


class _Asking:
    """One system and the questions of one setting."""

    def __init__(self, comparison: Comparison, system: System, posed: Sequence[Question], data: TaskData, seed: int,
                 progress: Callable[[int], None]) -> None:
        self.comparison, self.system, self.data, self.seed = comparison, system, data, seed
        self.posed, self.progress = posed, progress
        comparison.prepare(system, posed)
        self.fitting = {i for i, q in enumerate(posed) if self._fits(q)}

    def row(self, setting: str, full: float | None, timed: int) -> tuple[Row, list[str]]:
        """(the system's row, its answers); `full` is the full text's last measure, None for that itself."""
        comparison, system = self.comparison, self.system
        scored, said, positions, rate = self._continued() if self.data.ask == "continue" else self._answered()
        last = scored[self.data.measures[-1]][0]
        full = last if system.kind == "text" else full
        kept = round(100 * last / full, 1) if full and self.data.ask == "question" else None
        sample = [self.posed[i] for i in sorted(self.fitting)[:timed]] if self.data.ask == "question" else []
        prompts = [comparison.prompt(system, q) for q in sample]
        first = [time_to_first_token(comparison.decoder, {"": p}, repeats=3)[""] for p in prompts]
        total = [time_to_answer(comparison.decoder, {"": p}, comparison.settings_of(system, q), repeats=1)[""]
                 for p, q in zip(prompts, sample, strict=True)]
        chunks = list({c.id: c for q in self.posed for c in q.chunks}.values())
        stored = comparison.index_bytes(system, chunks) if chunks else None
        work = comparison.work.pop(system.name, None)
        where = round(mean(positions), 1)
        return Row(
            setting, system.name, None if system.kind in ("none", "text") else system.factor,
            {m: v for m, (v, _) in scored.items()}, {m: i for m, (_, i) in scored.items()}, kept, where,
            cache_bytes(comparison.decoder, round(where)), _milliseconds(first), _milliseconds(total), rate,
            round(stored, 1) if stored is not None else None,
            round(work.chunks / work.seconds, 1) if work and work.seconds else None,
            len(self.posed) - len(self.fitting)), said

    def _answered(self) -> tuple[dict[str, Scored], list[str], list[float], float | None]:
        order = sorted(self.fitting)
        begin = time.perf_counter()
        made = self.comparison.ask(self.system, [self.posed[i] for i in order], self.progress)
        seconds = time.perf_counter() - begin
        texts = dict(zip(order, (self.data.final(g.text) for g in made), strict=True))
        said = [texts.get(i, "") for i in range(len(self.posed))]
        references = [q.answers for q in self.posed]
        scored = {m: score(m, said, references, self.seed) for m in self.data.measures}
        rate = round(len(made) / seconds, 2) if made else None
        return scored, said, [float(g.usage.positions) for g in made], rate

    def _continued(self) -> tuple[dict[str, Scored], list[str], list[float], float | None]:
        losses, positions = [], []
        for i in sorted(self.fitting):
            nats, tokens = self.comparison.loss(self.system, self.posed[i])
            losses.append(nats / tokens)
            prompt = self.comparison.prompt(self.system, self.posed[i])
            positions.append(float(self.comparison.decoder.splice(prompt).usage.positions) if prompt else 0.0)
            self.progress(1)
        if not losses:
            raise InputError(f"no text and its continuation fit the decoder's window as {self.system.name}; "
                             "use shorter texts")
        low, high = (round(math.exp(v), 2) for v in interval(losses, self.seed, digits=6))
        return {"perplexity": (round(math.exp(mean(losses)), 2), (low, high))}, [""] * len(self.posed), positions, None

    def _fits(self, question: Question) -> bool:
        parts = self.comparison.prompt(self.system, question)
        room = self.comparison.decoder.backbone.max_positions
        if question.ask == "continue":
            room -= len(self.comparison.decoder.backbone.tokenizer.encode(question.answers[0]))
        try:
            return not parts or self.comparison.decoder.splice(parts).usage.positions <= room
        except InputError:
            return False


def _posed(data: TaskData, chunks: Sequence[Chunk], encoder: RetrievalEncoder, settings: Sequence[str],
           top_k: int) -> dict[str, list[Question]]:
    """The questions with what each setting gives for them."""
    if data.ask == "repeat":
        return {"oracle": [Question("", (c.text,), (c,), "repeat") for c in chunks]}
    of_document: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        of_document.setdefault(chunk.document_id, []).append(chunk)
    given = {}
    if "oracle" in settings or data.ask == "continue":
        given["oracle"] = [_oracle(q, of_document) for q in data.asked]
    if "retrieved" in settings and data.ask == "question":
        given["retrieved"] = _retrieved(data.asked, chunks, of_document, encoder, top_k)
    return {setting: [Question(q.question, q.answers, c, data.ask) for q, c in zip(data.asked, contexts, strict=True)]
            for setting, contexts in given.items()}


def _milliseconds(seconds: Sequence[float]) -> float | None:
    return round(1000 * statistics.median(seconds), 2) if seconds else None


def _oracle(asked: Asked, of_document: dict[str, list[Chunk]]) -> tuple[Chunk, ...]:
    """The chunks of the gold documents. Where the answer's place is known: the chunk that holds it; else those of its
    document that state an accepted answer; else those that hold a part of it."""
    if asked.place is None:
        return tuple(c for i in asked.gold for c in of_document[i])
    name, begin, end = asked.place
    own = of_document[name]
    holding = [c for c in own if c.start <= begin and end <= c.end]
    stating = [c for c in own if _states(c, asked.answers)]
    sharing = [c for c in own if c.start < end and begin < c.end]
    return tuple(holding[:1] or stating or sharing or own)


def _states(chunk: Chunk, answers: Sequence[str]) -> bool:
    return any(a.lower() in chunk.text.lower() for a in answers)


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

