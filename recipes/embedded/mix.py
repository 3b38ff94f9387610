"""Which rows a step trains on, by stage."""

from __future__ import annotations

import random

from data import Corpus, Row
from layout import num_slots

# Once the curriculum is over: how often a factor is drawn. English at 8x and beyond is out of this model's reach.
FACTORS = {"fictional": {1: 3, 2: 7, 3: 5, 4: 35, 6: 8, 8: 25, 12: 5, 16: 12},
           "english": {1: 2, 2: 8, 3: 8, 4: 72, 6: 6, 8: 4}}
# Of released weights that go on: what they still lose most of.
MORE_FACTORS = {"fictional": {1: 2, 2: 4, 3: 3, 4: 28, 6: 6, 8: 28, 12: 5, 16: 24},
                "english": {1: 1, 2: 5, 3: 6, 4: 80, 6: 6, 8: 2}}


def draw_factor(rng: random.Random, source: str, progress: float, limit: float,
                factors: dict[str, dict[int, int]] = FACTORS) -> float:
    """1x at first; the largest factor grows to 8x over two thirds of the curriculum and to the limit at its end."""
    if progress >= 1:
        table = factors["fictional" if source == "fictional" else "english"]
        return min(limit, float(rng.choices(list(table), list(table.values()))[0]))
    top = min(limit, 8 ** min(1.0, progress * 1.5))
    if progress > 2 / 3:
        top = min(limit, 8 * 2 ** (progress * 3 - 2))
    return float(top ** rng.betavariate(2.0, 1.2)) if top > 1 else 1.0


# Rows of one step by stage: one document as text, one as slots, several documents as text, as slots or as both.
MIX = {"text": ({"fictional": 1, "squad": 12, "wiki": 1}, {}, {"fictional": 1, "squad": 1}),
       "joint": ({"fictional": 1, "squad": 5}, {"fictional": 3, "squad": 8, "wiki": 3},
                 {"fictional": 2, "squad": 1}),
       "more": ({"fictional": 1, "squad": 5}, {"fictional": 3, "squad": 16, "wiki": 2}, {"fictional": 3, "squad": 1}),
       "compressor": ({}, {"fictional": 4, "squad": 6, "wiki": 3}, {"fictional": 2, "squad": 1})}
DRILLED = {"more": 0.3}  # of SQuAD's rows; the released weights have their drill behind them


def step_rows(corpus: Corpus, stage: str, rng: random.Random, progress: float, scale: float, vocab: int,
              max_factor: float, english: float, copies: int) -> list[Row]:
    """The rows of one step of a stage, or of "more", the joint stage of released weights that go on. `english` is the
    share of steps that take each of the English rows in; `copies` is how many random strings the text stage repeats."""
    ae, drilled = vocab + 1, DRILLED.get(stage, 1.0)
    factors = MORE_FACTORS if stage == "more" else FACTORS

    def drawn(mix: dict[str, int]) -> list[str]:
        return [source for source, n in mix.items() for _ in range(max(1, round(n * scale)))
                if source == "fictional" or rng.random() < english]

    def several(source: str) -> Row:
        factor = draw_factor(rng, source, progress, max_factor, factors)
        as_text = 1.0 if stage == "text" else rng.choice((0.0, 0.0, 0.3, 1.0))
        short = source == "fictional" and rng.random() < 0.4
        size = rng.randint(2, 6) if short else rng.choice((2, 3, 3, 4)) if source == "fictional" else rng.choice((2, 3))
        return corpus.several_row(rng, source, [None if rng.random() < as_text else factor for _ in range(size)], short)

    text, slots, together = MIX[stage]
    rows = [corpus.single_row(rng, source, None, ae, drilled) for source in drawn(text)]
    rows += [corpus.single_row(rng, source, draw_factor(rng, source, progress, max_factor, factors), ae, drilled)
             for source in drawn(slots)]
    if stage == "text" or progress > 0.15:
        rows += [several(source) for source in drawn(together)]
    if stage == "text":
        rows += [corpus.random_row(rng, None, ae, 24) for _ in range(max(1, round(copies * scale)))]
    elif progress < 0.5:
        rows += [corpus.random_row(rng, rng.uniform(1, 2), ae) for _ in range(max(1, round(2 * scale)))]
    return rows


def cost(row: Row) -> int:
    """About the number of tokens that a row sends through the blocks."""
    parts = sum(len(ids) if f is None else len(ids) + 2 * num_slots(len(ids), f) for ids, f in row.parts)
    return parts + sum(len(b.ids) for b in row.branches)
