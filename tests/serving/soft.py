"""An index of soft spans with consecutive slots for the embedded decoder: what vLLM reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ctxcomp_rag import CompressedRAG, Document, load_frozen, load_trained_compressor
from ctxcomp_rag.compressors.icae import ICAECompressor
from ctxcomp_rag.evaluation.fictional import generate_corpus
from tests.tiny_models import LetterCounts

CORPUS = generate_corpus(12, seed=5)
QUESTIONS = [d.questions[0].question for d in CORPUS]


def consecutive_compressor(folder: Path) -> Path:
    """The embedded compressor with its slots numbered on; what it was not trained for, so its answers are worse."""
    trained = load_trained_compressor("icae", load_frozen())
    assert isinstance(trained, ICAECompressor)
    made = ICAECompressor(trained.backbone, replace(trained.config, slot_positions="consecutive"),
                          encoder=trained.encoder, memory_tokens=trained.memory_tokens.detach())
    made.save_pretrained(folder)
    return folder


def consecutive_index(folder: Path) -> CompressedRAG:
    """Twelve fictional documents, compressed."""
    made = CompressedRAG.create(folder / "kb", compressor=consecutive_compressor(folder / "icae"),
                                encoder=LetterCounts())
    made.index(Document(d.id, d.text) for d in CORPUS)
    return made
