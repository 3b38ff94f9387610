"""Batches by length: nothing lost, nothing too large, little padding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.jobs.batches import batches_by_length


def chunks_of(lengths: list[int]) -> list[Chunk]:
    return [Chunk("d", f"text {i}", i, i + 1, length) for i, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_every_chunk_is_in_one_batch_and_no_batch_is_larger_than_the_budget(lengths: list[int], budget: int) -> None:
    chunks = chunks_of(lengths)
    batches = batches_by_length(chunks, budget)
    assert sorted(c.id for batch in batches for c in batch) == sorted(c.id for c in chunks)
    assert all(len(batch) * max(c.num_tokens for c in batch) <= budget for batch in batches if len(batch) > 1)


def test_short_and_long_chunks_do_not_share_a_batch() -> None:
    batches = batches_by_length(chunks_of([100, 10, 100, 10, 100, 10]), 300)
    assert [[c.num_tokens for c in batch] for batch in batches] == [[10, 10, 10], [100, 100, 100]]


def test_a_chunk_above_the_budget_is_a_batch_of_its_own() -> None:
    assert [len(batch) for batch in batches_by_length(chunks_of([50, 50, 5]), 20)] == [1, 1, 1]
