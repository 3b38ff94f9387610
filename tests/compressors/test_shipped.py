"""The compressors that come with the embedded decoder answer from their spans."""

from __future__ import annotations

import math

import pytest

from ctxcomp_rag import load_frozen
from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import FURTHER, load_trained_compressor
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, enclosed
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.metrics import exact_match
from ctxcomp_rag.pipeline import prompt_parts
from tests.compressors.contract import assert_same_span
from tests.tiny_models import tiny_backbone

CORPUS = generate_corpus(20, seed=11)


def chunks_of(backbone: Backbone) -> list[Chunk]:
    """The documents, a chunk each."""
    return [Chunk(d.id, d.text, 0, len(d.text), len(backbone.tokenizer.encode(d.text))) for d in CORPUS]


@pytest.mark.parametrize(("method", "factor", "documents", "least"), [
    ("icae", 4.0, 1, 57), ("icae", 4.0, 3, 54), ("icae", 16.0, 1, 36), ("pcc", 4.0, 1, 54), ("pcc", 16.0, 1, 32),
    ("icae-nested", 4.0, 3, 54), ("icae-nested", 16.0, 1, 36)])
def test_held_out_documents_are_answered_from_spans(method: str, factor: float, documents: int, least: int) -> None:
    backbone = load_frozen()
    compressor = load_trained_compressor(method, backbone)
    chunks = chunks_of(backbone)
    spans = compressor.compress(chunks, compression_factor=factor)
    shown = [enclosed(s, compressor.spec) for s in spans]
    asked = [(i, question) for i, d in enumerate(CORPUS) for question in d.questions[:3]]
    prompts = [prompt_parts(backbone, q.question, (shown * 2)[i : i + documents], compressor.spec) for i, q in asked]
    said = FrozenDecoder(backbone).batch(prompts, GenerationSettings(max_new_tokens=16))
    right = sum(exact_match(made.text.strip(), [q.answer]) for made, (_, q) in zip(said, asked, strict=True))
    assert right >= least, f"{right:.0f} of {len(asked)}"


def test_the_nested_compressors_spans_are_read_at_each_factor() -> None:
    backbone = load_frozen()
    compressor = load_trained_compressor("icae-nested", backbone)
    assert compressor.spec.nested == (4.0, 8.0, 16.0)
    chunks = chunks_of(backbone)[:4]
    whole = compressor.compress(chunks)
    for factor in compressor.spec.nested:
        for span, made in zip(whole, compressor.compress(chunks, compression_factor=factor), strict=True):
            read = span.first(compressor.spec.slot_counts(span)[factor])
            assert read.num_slots == math.ceil(span.num_positions / factor)
            assert_same_span(read, made, atol=1e-4)


@pytest.mark.parametrize("name", FURTHER)
def test_further_compressors_are_those_of_the_embedded_decoder_and_have_a_size_of_their_own(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} spans have the size that the compressor was trained for"):
        load_trained_compressor(name, load_frozen(), budget="4x")
    with pytest.raises(InputError, match=rf"there is no trained {name} compressor for '.*' in this package; train one"):
        load_trained_compressor(name, tiny_backbone("llama"))
    with pytest.raises(InputError, match=rf"there is no compressor '{name}d'; expected a folder, or one of .*{name}"):
        load_trained_compressor(f"{name}d", load_frozen())
