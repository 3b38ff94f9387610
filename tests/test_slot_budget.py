"""A slot budget is kept exactly, and the knapsack is the best that a budget can buy."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.slot_budget import SHARES, Offer, allot


@st.composite
def offers(draw: st.DrawFn) -> list[Offer]:
    made = []
    for _ in range(draw(st.integers(1, 5))):
        counts = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=3)))
        retention = sorted(draw(st.lists(st.integers(0, 8), min_size=len(counts), max_size=len(counts))))
        made.append(Offer(draw(st.integers(-2, 8)) / 8, tuple(counts), tuple(r / 8 for r in retention)))
    return made


def worth(some: list[Offer], given_: tuple[int, ...]) -> float:
    return sum(o.weight * dict(zip(o.counts, o.retention, strict=True)).get(n, 0.0)
               for o, n in zip(some, given_, strict=True))


@settings(max_examples=100, deadline=None)
@given(offers(), st.integers(9, 30))
def test_the_knapsack_is_worth_what_trying_every_choice_finds(some: list[Offer], budget: int) -> None:
    choices = product(*((*o.counts, *([0] if i else [])) for i, o in enumerate(some)))
    best = max(worth(some, c) for c in choices if sum(c) <= budget)
    found = allot(some, budget, "knapsack")
    assert worth(some, tuple(found)) == pytest.approx(best)
    assert sum(found) <= budget
    assert found[0] in some[0].counts


@settings(max_examples=100, deadline=None)
@given(offers(), st.integers(9, 30), st.sampled_from(["uniform", "proportional"]))
def test_a_budget_is_kept_and_what_does_not_fit_is_dropped_from_the_end(some: list[Offer], budget: int,
                                                                       share: str) -> None:
    found = allot(some, budget, share)  # type: ignore[arg-type]
    assert sum(found) <= budget
    assert all(n == 0 or n in o.counts for n, o in zip(found, some, strict=True))
    kept = sum(n > 0 for n in found)
    assert all(found[:kept])
    assert not any(found[kept:])
    if kept < len(some):
        assert sum(o.counts[0] for o in some[: kept + 1]) > budget
    left = budget - sum(found)
    more = [next((c - n for c in o.counts if c > n), budget + 1) for n, o in zip(found[:kept], some, strict=False)]
    assert all(step > left for step in more)  # nothing more would fit


def test_shares_by_hand() -> None:
    nested = [Offer(score, (2, 4, 8, 16)) for score in (0.8, 0.4, 0.2)]
    assert allot(nested, 12, "uniform") == [4, 4, 4]
    assert allot(nested, 14, "proportional") == [8, 4, 2]
    assert allot(nested, 5, "uniform") == [2, 2, 0]
    whole = [Offer(0.9, (10,)), Offer(0.8, (12,)), Offer(0.7, (5,))]
    assert allot(whole, 16, "uniform") == [10, 0, 0]
    measured = [Offer(0.9, (10,), (0.5,)), Offer(0.8, (12,), (0.9,)), Offer(0.7, (5,), (1.0,))]
    assert allot(measured, 16, "knapsack") == [10, 0, 5]
    # a second slot count that retains no more is not worth its slots
    assert allot([Offer(1.0, (2, 8), (0.9, 0.9))], 8, "knapsack") == [2]


@pytest.mark.parametrize("share", SHARES)
def test_nothing_retrieved_takes_no_slots(share: str) -> None:
    assert allot([], 5, share) == []  # type: ignore[arg-type]


def test_refusals() -> None:
    with pytest.raises(InputError, match="slot budget of at least 10, the slots of the best span, got 9; raise it"):
        allot([Offer(0.9, (10,))], 9)
    with pytest.raises(InputError, match=r"needs the retention of every span; measure it with .* --retention"):
        allot([Offer(0.9, (10,))], 10, "knapsack")
    with pytest.raises(InputError, match="no way 'fair' to share slots; expected one of uniform, proportional, knap"):
        allot([Offer(0.9, (10,))], 10, "fair")  # type: ignore[arg-type]
