"""`ctxcomp demo`: the whole job on the embedded model's home ground, offline, in under two minutes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.decoding import GenerationSettings, Part
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.home_ground import HomeGroundReport, evaluate_home_ground
from ctxcomp_rag.evaluation.systems import default_systems, quoted_systems
from ctxcomp_rag.evaluation.timing import cache_bytes, time_to_first_token
from ctxcomp_rag.pipeline import CompressedRAG, Mode


@dataclass(frozen=True)
class SideBySide:
    """One question, read from spans and from raw text."""

    question: str
    expected: str
    spans_answer: str
    text_answer: str
    spans_positions: int
    text_positions: int
    spans_seconds: float
    text_seconds: float
    spans_cache_bytes: int
    text_cache_bytes: int


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured; `to_json` is what `--json` prints."""

    seed: int
    documents: int
    compress_seconds: float
    examples: list[SideBySide]
    report: HomeGroundReport
    seconds: float

    def to_json(self) -> dict[str, Any]:
        report = asdict(self.report)
        return {"seed": self.seed, "documents": self.documents, "compress_seconds": round(self.compress_seconds, 3),
                "seconds": round(self.seconds, 1), **report, "examples": [asdict(e) for e in self.examples]}


def run_demo(seed: int = 1, *, documents: int = 100, examples: int = 2,
             say: Callable[[str], None] = lambda _: None) -> DemoResult:
    """Compress a generated corpus, answer through spans and through text, and score every system.

    Args:
        seed: of the corpus; every seed gives other documents with other names, none of them seen in training.
        say: called with a line of progress.
    """
    began = time.perf_counter()
    corpus = generate_corpus(documents, seed, "held_out")
    with tempfile.TemporaryDirectory() as folder, CompressedRAG.create(folder) as rag:
        assert rag.compressor is not None
        say(f"compressing {documents} documents once, 4x")
        report = rag.index((Document(d.id, d.text, {"kind": d.kind}) for d in corpus), factor=4.0)
        shown = [_side_by_side(rag, d.questions[0].question, d.questions[0].answer) for d in corpus[:examples]]
        say("asking every system the same questions")
        systems = default_systems()
        quoted = quoted_systems([s for s in systems if s.kind == "spans"])
        scores = evaluate_home_ground(rag.compressor, rag.encoder, documents=documents, seed=seed, with_bleu=False,
                                      systems=[*systems, *quoted])
    return DemoResult(seed, documents, report.seconds, shown, scores, time.perf_counter() - began)


def _side_by_side(rag: CompressedRAG, question: str, expected: str) -> SideBySide:
    sources = rag.retrieve(question)
    modes: tuple[Mode, ...] = ("spans", "text")
    prompts: dict[str, list[Part]] = {mode: rag.prompt(question, sources, mode) for mode in modes}
    seconds = time_to_first_token(rag.decoder, prompts)
    made = {mode: rag.decoder.generate(parts, GenerationSettings(max_new_tokens=24)) for mode, parts in prompts.items()}
    positions = {mode: g.usage.positions for mode, g in made.items()}
    return SideBySide(
        question, expected, made["spans"].text.strip(), made["text"].text.strip(),
        positions["spans"], positions["text"], round(seconds["spans"], 5), round(seconds["text"], 5),
        cache_bytes(rag.decoder, positions["spans"]), cache_bytes(rag.decoder, positions["text"]),
    )
