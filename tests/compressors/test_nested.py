"""Nested ICAE spans: the first slots of a span are the span of fewer slots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import load_compressor
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.compressors.nested import coarse_to_fine
from ctxcomp_rag.errors import InputError, SpanShapeError
from ctxcomp_rag.spans import SoftSpan
from tests.compressors.contract import assert_same_span
from tests.compressors.test_icae import icae

CONFIG = ICAEConfig(num_memory_tokens=5, segment_tokens=64, compression_factor=2.0, slots="proportional",
                    slot_positions="spread", lora_rank=4, nested=(2.0, 4.0, 8.0))
TEXTS = ["It is 31 metres high.", "The lighthouse of Varn was built in 1871.", "Yes."]
CHUNKS = [Chunk(f"d{i}", text, 0, len(text), 1) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def nested() -> ICAECompressor:
    return icae(CONFIG)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 25, 32])
def test_the_order_names_every_slot_once_from_the_end_of_the_text(count: int) -> None:
    order = coarse_to_fine(count)
    assert sorted(order) == list(range(count))
    assert order[0] == count - 1


def test_the_first_powers_of_two_stand_where_so_many_slots_would_be_spread() -> None:
    spread = replace(CONFIG, nested=None)
    for count in (1, 2, 4, 8, 16):
        assert sorted(CONFIG.slot_places(64, count)) == spread.slot_places(64, count)


@pytest.mark.parametrize("length", [20, 47, 61])
def test_twice_the_factor_reads_every_second_slot(length: int) -> None:
    all_places = sorted(CONFIG.slot_places(length, CONFIG.num_slots(length, 2.0)))
    for step in (2, 4, 8):
        count = CONFIG.num_slots(length, 2.0 * step)
        assert sorted(CONFIG.slot_places(length, count)) == all_places[::-1][::step][::-1]


@pytest.mark.parametrize("length", [20, 47, 61])
def test_every_beginning_of_the_order_covers_the_text(length: int) -> None:
    """No gap between neighbouring slots is more than about twice that of slots that are spread evenly."""
    pieces = CONFIG.num_slots(length, 2.0)
    for count in range(1, pieces + 1):
        places = sorted(CONFIG.slot_places(length, count))
        gaps = [b - a for a, b in zip([-1, *places], places, strict=False)]
        assert places[-1] == length - 1
        assert max(gaps) <= 2 * length / count + 2


@pytest.mark.parametrize("factor", [4.0, 8.0])
def test_the_first_slots_are_the_span_of_a_larger_factor(nested: ICAECompressor, factor: float) -> None:
    stored, alone = nested.compress(CHUNKS), nested.compress(CHUNKS, compression_factor=factor)
    for whole, direct in zip(stored, alone, strict=True):
        count = nested.spec.slot_counts(whole)[factor]
        assert count == direct.num_slots
        assert_same_span(whole.first(count), direct, atol=1e-5)
        assert torch.equal(whole.first(count).order, direct.order)  # type: ignore[arg-type]


def test_a_shorter_span_can_be_shortened_again(nested: ICAECompressor) -> None:
    span = nested.compress(CHUNKS[1:2])[0]
    counts = nested.spec.slot_counts(span)
    assert span.num_slots == counts[2.0] > counts[4.0] > counts[8.0] >= 1
    assert_same_span(span.first(counts[4.0]).first(counts[8.0]), span.first(counts[8.0]))
    assert span.first(span.num_slots) is span
    assert span.first(counts[8.0]).num_positions == span.num_positions


def test_a_batch_changes_nothing(nested: ICAECompressor) -> None:
    for together, chunk in zip(nested.compress(CHUNKS), CHUNKS, strict=True):
        assert_same_span(together, nested.compress([chunk])[0], atol=1e-5)


def test_saved_and_loaded_it_is_nested_still(nested: ICAECompressor, tmp_path: Path) -> None:
    nested.save_pretrained(tmp_path)
    again = load_compressor(tmp_path, nested.backbone)
    assert again.spec.nested == (2.0, 4.0, 8.0)
    assert again.spec.fingerprint == nested.spec.fingerprint
    for a, b in zip(again.compress(CHUNKS), nested.compress(CHUNKS), strict=True):
        assert_same_span(a, b)


def test_a_compressor_that_is_not_nested_keeps_its_digest_and_makes_spans_that_are_read_whole() -> None:
    plain = icae(replace(CONFIG, nested=None))
    assert "nested" not in plain.spec.compressor
    assert plain.spec.nested == ()
    span = plain.compress(CHUNKS[1:2])[0]
    assert plain.spec.slot_counts(span) == {}
    with pytest.raises(SpanShapeError, match=r"read with all its \d+ slots, not with 2: it is not nested"):
        span.first(2)


def test_refusals(nested: ICAECompressor) -> None:
    with pytest.raises(InputError, match=r"nested and was trained for 2x, 4x, 8x; it cannot make 3x"):
        nested.compress(CHUNKS, compression_factor=3.0)
    with pytest.raises(InputError, match=r"reads a text in one segment of at most 64 tokens, got \d+; cut it"):
        nested.compress([Chunk("d", "many words " * 40, 0, 1, 1)])
    with pytest.raises(InputError, match=r"nested spans need slots='proportional' and slot_positions='spread'"):
        replace(CONFIG, slot_positions="consecutive")
    with pytest.raises(InputError, match=r"nested factors that ascend from the compression factor 2, got \(4.0,\)"):
        replace(CONFIG, nested=(4.0,))
    with pytest.raises(SpanShapeError, match="order must name each of the 2 slots once"):
        SoftSpan("c", 4, torch.arange(2), 4, torch.zeros(2, 3), torch.tensor([0, 0]))
