"""What is chosen when a question is asked: factor, slot budget, and which chunks are read as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ctxcomp_rag import CompressedRAG, Document, GenerationSettings
from ctxcomp_rag.chunking import split_document
from ctxcomp_rag.compressors.icae import ICAECompressor
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.retention import MeasuringCompressor
from ctxcomp_rag.retrieval import embed_texts, encoder_name
from ctxcomp_rag.spans import MemorySpan
from tests.compressors.test_icae import icae
from tests.compressors.test_nested import CONFIG
from tests.tiny_models import LetterCounts

TEXTS = ["The lamp of Varn is red.", "Brel has 31 potters.", "The ferry of Osk rests until 1 March 1904."]
DOCUMENTS = [Document(f"d{i}", text) for i, text in enumerate(TEXTS)]
QUESTION = "How many potters are in Brel?"
SHORT = GenerationSettings(max_new_tokens=4)


def index_of(compressor: ICAECompressor, path: Path, retention: list[dict[float, float]] | None = None,
             factor: float | None = None) -> CompressedRAG:
    """An index of the documents; `retention` by factor, as if it had been measured."""
    encoder = LetterCounts()
    chunks = [c for d in DOCUMENTS for c in split_document(d, compressor.backbone.tokenizer, max_tokens=64)]
    spans: list[MemorySpan] = list(compressor.compress(chunks, compression_factor=factor))
    for i, by_factor in enumerate(retention or []):
        counts = compressor.spec.slot_counts(spans[i]) or dict.fromkeys(by_factor, spans[i].num_slots)
        spans[i] = replace(spans[i], retention={counts[f]: share for f, share in by_factor.items()})
    vectors = embed_texts(encoder, [c.text for c in chunks])
    index = MemoryIndex.create(path, compressor.spec, vector_size=vectors.shape[1],
                               retrieval_encoder=encoder_name(encoder), codec="exact")
    index.add(chunks, spans, vectors, spec=compressor.spec)
    return CompressedRAG(compressor.backbone, index, encoder, compressor)


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> CompressedRAG:
    retention = [{2.0: 1.0, 4.0: 0.5, 8.0: 0.25}, {2.0: 1.0, 4.0: 1.0, 8.0: 0.9}, {2.0: 0.5, 4.0: 0.5, 8.0: 0.5}]
    return index_of(icae(CONFIG), tmp_path_factory.mktemp("nested") / "kb", retention)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> CompressedRAG:
    return index_of(icae(replace(CONFIG, nested=None)), tmp_path_factory.mktemp("plain") / "kb")


def slots(rag: CompressedRAG) -> dict[str, dict[float, int]]:
    """Slots of every document at every factor."""
    found = rag.retrieve(QUESTION, top_k=3)
    return {s.chunk.document_id: rag.spec.slot_counts(s.span) or {0.0: s.span.num_slots} for s in found}


@pytest.mark.parametrize("factor", [4.0, 8.0])
def test_a_nested_index_answers_as_one_that_was_made_at_the_factor(nested: CompressedRAG, factor: float,
                                                                  tmp_path: Path) -> None:
    assert isinstance(nested.compressor, ICAECompressor)
    alone = index_of(nested.compressor, tmp_path / "kb", factor=factor)
    read, made = nested.answer(QUESTION, settings=SHORT, factor=factor), alone.answer(QUESTION, settings=SHORT)
    assert read.text == made.text
    assert read.usage == made.usage
    assert read.usage.slots == sum(counts[factor] for counts in slots(nested).values())
    assert "".join(nested.stream(QUESTION, settings=SHORT, factor=factor)) == read.text


def test_a_span_stored_with_fewer_slots_is_read_as_it_is(nested: CompressedRAG, tmp_path: Path) -> None:
    assert isinstance(nested.compressor, ICAECompressor)
    alone = index_of(nested.compressor, tmp_path / "kb", factor=8.0)
    assert alone.answer(QUESTION, settings=SHORT, factor=2.0).usage == alone.answer(QUESTION, settings=SHORT).usage


def test_a_budget_makes_nested_spans_shorter_and_drops_none(nested: CompressedRAG) -> None:
    counts = slots(nested)
    budget = sum(c[4.0] for c in counts.values())
    answer = nested.answer(QUESTION, settings=SHORT, slot_budget=budget)
    assert answer.dropped == ()
    assert budget - 4 <= answer.usage.slots <= budget
    for source in answer.sources:
        assert source.span.num_slots in counts[source.chunk.document_id].values()


def test_a_budget_drops_whole_spans_last_ranked_first_and_says_so(plain: CompressedRAG) -> None:
    ranked = plain.retrieve(QUESTION, top_k=3)
    sizes = [s.span.num_slots for s in ranked]
    answer = plain.answer(QUESTION, settings=SHORT, slot_budget=sum(sizes) - 1)
    assert [s.chunk.id for s in answer.sources] == [s.chunk.id for s in ranked[:2]]
    assert [s.chunk.id for s in answer.dropped] == [ranked[2].chunk.id]
    assert answer.usage.slots == sum(sizes[:2])
    with pytest.raises(InputError, match=rf"slot budget of at least {sizes[0]}, the slots of the best span, got 1"):
        plain.answer(QUESTION, slot_budget=1)


def test_the_knapsack_takes_the_slots_that_retain_most(nested: CompressedRAG) -> None:
    counts = slots(nested)
    budget = counts["d0"][2.0] + counts["d1"][8.0] + counts["d2"][8.0]
    answer = nested.answer(QUESTION, settings=SHORT, slot_budget=budget, share="knapsack")
    # d2 gains nothing by more slots, d1 little, d0 much
    found = {s.chunk.document_id: s.span.num_slots for s in answer.sources}
    assert found == {"d0": counts["d0"][2.0], "d1": counts["d1"][8.0], "d2": counts["d2"][8.0]}


def test_chunks_whose_spans_retain_too_little_are_read_as_text(nested: CompressedRAG) -> None:
    answer = nested.answer(QUESTION, settings=SHORT, min_retention=0.9)
    full = slots(nested)
    assert answer.usage.slots == full["d0"][2.0] + full["d1"][2.0]
    at_8x = nested.answer(QUESTION, settings=SHORT, min_retention=0.9, factor=8.0)
    assert at_8x.usage.slots == full["d1"][8.0]
    text = nested.answer(QUESTION, settings=SHORT, min_retention=1.01)
    assert text.usage.slots == 0
    # delimiters apart, a prompt of raw chunks only
    assert text.text == nested.answer(QUESTION, settings=SHORT, mode="text").text


def test_refusals(nested: CompressedRAG, plain: CompressedRAG) -> None:
    with pytest.raises(InputError, match=r"cannot be read at the factor 3: they can be read at 2, 4, 8"):
        nested.answer(QUESTION, factor=3.0)
    with pytest.raises(InputError, match=r"at the factor 4: the compressor icae-\w+ is not nested. Leave the factor"):
        plain.answer(QUESTION, factor=4.0)
    with pytest.raises(InputError, match=r"retention .* was not measured; precompress its document .* --retention"):
        plain.answer(QUESTION, min_retention=0.5)
    with pytest.raises(InputError, match=r"mode 'text' reads none; leave them out"):
        plain.answer(QUESTION, mode="text", slot_budget=50)


def test_retention_is_measured_at_every_number_of_slots_and_comes_back_from_the_index(tmp_path: Path) -> None:
    compressor = icae(CONFIG)
    chunks = [c for d in DOCUMENTS for c in split_document(d, compressor.backbone.tokenizer, max_tokens=64)]
    spans = MeasuringCompressor(compressor).compress(chunks)
    for span in spans:
        assert set(span.retention) == set(compressor.spec.slot_counts(span).values())
        assert all(0 <= share <= 1 for share in span.retention.values())
    with MemoryIndex.create(tmp_path / "kb", compressor.spec, vector_size=3, retrieval_encoder="e") as index:
        index.add(chunks, spans, np.eye(3, dtype=np.float32), spec=compressor.spec)
        assert [dict(s.span.retention) for s in index.get([c.id for c in chunks])] == [dict(s.retention)
                                                                                     for s in spans]


def test_a_measuring_compressor_refuses_what_contradicts_itself() -> None:
    compressor = icae(CONFIG)
    with pytest.raises(InputError, match=r"target retention above 0 and at most 1, got 95"):
        MeasuringCompressor(compressor, 95)
    with pytest.raises(InputError, match=r"the factor 4 and the target retention 0.95 both say how many slots"):
        MeasuringCompressor(compressor, 0.95).compress([], compression_factor=4.0)
    with pytest.raises(InputError, match=r"cannot be asked for their text: the compressor brings no 'reconstruct'"):
        MeasuringCompressor(icae(replace(CONFIG, delimiters=("after",))))
