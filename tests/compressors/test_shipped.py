"""The compressors that come with the embedded decoder answer from their spans."""

from __future__ import annotations

import pytest

from ctxcomp_rag import load_frozen
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import load_trained_compressor
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, enclosed
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.metrics import exact_match
from ctxcomp_rag.pipeline import prompt_parts

CORPUS = generate_corpus(20, seed=11)


@pytest.mark.parametrize(("method", "factor", "documents", "least"), [
    ("icae", 4.0, 1, 57), ("icae", 4.0, 3, 54), ("icae", 16.0, 1, 36), ("pcc", 4.0, 1, 54), ("pcc", 16.0, 1, 32)])
def test_held_out_documents_are_answered_from_spans(method: str, factor: float, documents: int, least: int) -> None:
    backbone = load_frozen()
    compressor = load_trained_compressor(method, backbone)
    chunks = [Chunk(d.id, d.text, 0, len(d.text), len(backbone.tokenizer.encode(d.text))) for d in CORPUS]
    spans = compressor.compress(chunks, compression_factor=factor)
    shown = [enclosed(s, compressor.spec) for s in spans]
    asked = [(i, question) for i, d in enumerate(CORPUS) for question in d.questions[:3]]
    prompts = [prompt_parts(backbone, q.question, (shown * 2)[i : i + documents], compressor.spec) for i, q in asked]
    said = FrozenDecoder(backbone).batch(prompts, GenerationSettings(max_new_tokens=16))
    right = sum(exact_match(made.text.strip(), [q.answer]) for made, (_, q) in zip(said, asked, strict=True))
    assert right >= least, f"{right:.0f} of {len(asked)}"
