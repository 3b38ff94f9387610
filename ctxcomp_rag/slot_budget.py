"""A number of slots, shared over the retrieved spans.

    uniform         as evenly as the spans allow
    proportional    by retrieval score
    knapsack        the most score-weighted retention that the slots can hold (exact)

A nested span can be read at several numbers of slots, any other at one. The best span is always read; what does not fit
is dropped, last-ranked first (the knapsack drops what is worth least).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ctxcomp_rag.errors import InputError

Share = Literal["uniform", "proportional", "knapsack"]
SHARES: tuple[Share, ...] = ("uniform", "proportional", "knapsack")
_LEAST_SCORE = 1e-6  # a cosine may be 0 or negative


@dataclass(frozen=True)
class Offer:
    """A retrieved span, as the budget sees it.

    Attributes:
        score: of the retrieval.
        counts: numbers of slots at which it can be read, ascending.
        retention: share of the chunk's facts that is read out of each of them; () where it was not measured.
    """

    score: float
    counts: tuple[int, ...]
    retention: tuple[float, ...] = ()

    @property
    def weight(self) -> float:
        return max(self.score, _LEAST_SCORE)


def allot(offers: Sequence[Offer], budget: int, share: Share = "uniform") -> list[int]:
    """Slots for each of the offers, which are in order of retrieval; 0 for one that is dropped.

    Raises:
        InputError: there is no such strategy, the best span alone has more slots, or the knapsack has no retention.
    """
    if share not in SHARES:
        raise InputError(f"there is no way {share!r} to share slots; expected one of {', '.join(SHARES)}")
    if not offers:
        return []
    if budget < offers[0].counts[0]:
        raise InputError(f"expected a slot budget of at least {offers[0].counts[0]}, the slots of the best span, got "
                         f"{budget}; raise it, or precompress with a larger factor or shorter chunks")
    if share == "knapsack":
        return _most_worth(offers, budget)
    return _evenly(offers, budget, [o.weight if share == "proportional" else 1.0 for o in offers])


def _evenly(offers: Sequence[Offer], budget: int, weights: Sequence[float]) -> list[int]:
    """Whoever has the fewest slots for its weight is given more, as long as something fits."""
    given = [0] * len(offers)
    left, kept = budget, 0
    while kept < len(offers) and offers[kept].counts[0] <= left:
        given[kept] = offers[kept].counts[0]
        left -= given[kept]
        kept += 1
    while True:
        more = {i: next((c for c in offers[i].counts if c > given[i]), budget + given[i] + 1) for i in range(kept)}
        fitting = [i for i in range(kept) if more[i] - given[i] <= left]
        if not fitting:
            return given
        chosen = min(fitting, key=lambda i: given[i] / weights[i])
        left -= more[chosen] - given[chosen]
        given[chosen] = more[chosen]


def _most_worth(offers: Sequence[Offer], budget: int) -> list[int]:
    """Exact: the best choice for every number of slots used, one offer after the other."""
    if any(len(o.retention) != len(o.counts) for o in offers):
        raise InputError("the knapsack needs the retention of every span; measure it with ctxcomp precompress "
                         "--retention, or share the slots uniform or proportional")
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for i, offer in enumerate(offers):
        choices = list(zip(offer.counts, offer.retention, strict=True)) + ([(0, 0.0)] if i else [])
        grown: dict[int, tuple[float, list[int]]] = {}
        for used, (worth, given) in best.items():
            for count, retention in choices:
                total, value = used + count, worth + offer.weight * retention
                if total <= budget and value > grown.get(total, (-1.0, []))[0]:
                    grown[total] = value, [*given, count]
        best = grown
    return max(sorted(best.items()), key=lambda item: item[1][0])[1][1]  # of equal worth, the fewest slots


__all__ = ["SHARES", "Offer", "Share", "allot"]
