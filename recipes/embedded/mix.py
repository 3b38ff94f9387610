"""Which rows a step trains on, by stage."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from data import Corpus, Row
from layout import num_slots

Factors = dict[int, int]  # factor -> how often it is drawn, once the curriculum is over

FICTIONAL: Factors = {1: 3, 2: 7, 3: 5, 4: 35, 6: 8, 8: 25, 12: 5, 16: 12}
ENGLISH: Factors = {1: 2, 2: 8, 3: 8, 4: 72, 6: 6, 8: 4}  # 8x and beyond is out of this model's reach
MORE_FICTIONAL: Factors = {1: 2, 2: 4, 3: 3, 4: 28, 6: 6, 8: 28, 12: 5, 16: 24}
MORE_ENGLISH: Factors = {1: 1, 2: 5, 3: 6, 4: 80, 6: 6, 8: 2}


@dataclass(frozen=True)
class Mix:
    """Rows of one step, by source.

    Attributes:
        text, slots: of one document as text, as slots.
        together: of several documents.
        as_text: the share of several documents that stands as text: one of these.
        short: share of several fictional documents that keep a few sentences.
        drilled: share of SQuAD's rows that are also asked for gaps, recall and reconstruction.
        factors: of fictional documents alone, of several, of English.
    """

    text: Mapping[str, int]
    slots: Mapping[str, int]
    together: Mapping[str, int]
    as_text: tuple[float, ...] = (0.0, 0.0, 0.3, 1.0)
    short: float = 0.4
    drilled: float = 1.0
    factors: Mapping[str, Factors] = field(default_factory=lambda: {
        "fictional": FICTIONAL, "several": FICTIONAL, "english": ENGLISH})


# A stage each; the others stand for stages of released weights that go on: they have their drill behind them, and are
# shown what they still lose most of, SQuAD at 4x, several documents at 8x and 16x, or how slots are nested.
MIXES = {
    "text": Mix({"fictional": 1, "squad": 12, "wiki": 1}, {}, {"fictional": 1, "squad": 1}, as_text=(1.0,)),
    "joint": Mix({"fictional": 1, "squad": 5}, {"fictional": 3, "squad": 8, "wiki": 3}, {"fictional": 2, "squad": 1}),
    "answers": Mix({"fictional": 1, "squad": 5}, {"fictional": 3, "squad": 16, "wiki": 2},
                   {"fictional": 3, "squad": 1}, drilled=0.3,
                   factors={"fictional": MORE_FICTIONAL, "several": MORE_FICTIONAL, "english": MORE_ENGLISH}),
    "documents": Mix({"fictional": 1, "squad": 3}, {"fictional": 3, "squad": 6, "wiki": 2},
                     {"fictional": 10, "squad": 1}, as_text=(0.0,) * 6 + (0.3, 1.0), short=0.25, drilled=0.3,
                     factors={"fictional": MORE_FICTIONAL, "english": MORE_ENGLISH,
                              "several": {2: 3, 3: 2, 4: 12, 6: 5, 8: 20, 12: 10, 16: 50}}),
    "nested": Mix({}, {"fictional": 5, "squad": 5, "wiki": 2}, {"fictional": 6, "squad": 1},
                  as_text=(0.0,) * 5 + (0.3,), short=0.25, drilled=0.5,
                  factors={"fictional": {4: 40, 8: 30, 16: 30}, "several": {4: 40, 8: 30, 16: 30},
                           "english": {4: 85, 8: 15}}),
    "compressor": Mix({}, {"fictional": 4, "squad": 6, "wiki": 3}, {"fictional": 2, "squad": 1}),
}
ONWARD = ("answers", "documents", "nested")


def draw_factor(rng: random.Random, progress: float, limit: float, factors: Factors) -> float:
    """1x at first; the largest factor grows to 8x over two thirds of the curriculum and to the limit at its end, from
    when on factors are drawn as the table says."""
    if progress >= 1:
        return min(limit, float(rng.choices(list(factors), list(factors.values()))[0]))
    top = min(limit, 8 ** min(1.0, progress * 1.5))
    if progress > 2 / 3:
        top = min(limit, 8 * 2 ** (progress * 3 - 2))
    return float(top ** rng.betavariate(2.0, 1.2)) if top > 1 else 1.0


def step_rows(corpus: Corpus, stage: str, rng: random.Random, progress: float, scale: float, vocab: int,
              max_factor: float, english: float, copies: int) -> list[Row]:
    """The rows of one step of a stage, or of one that `MIXES` names in its place.

    Args:
        english: share of steps that take each of the English rows in.
        copies: how many random strings the text stage repeats.
    """
    ae, mix = vocab + 1, MIXES[stage]

    def drawn(rows: Mapping[str, int]) -> list[str]:
        return [source for source, n in rows.items() for _ in range(max(1, round(n * scale)))
                if source == "fictional" or rng.random() < english]

    def factor(source: str, several: bool = False) -> float:
        table = "english" if source != "fictional" else "several" if several else "fictional"
        return draw_factor(rng, progress, max_factor, mix.factors[table])

    def several(source: str) -> Row:
        compressed, as_text = factor(source, several=True), rng.choice(mix.as_text)
        short = source == "fictional" and rng.random() < mix.short
        size = rng.randint(2, 6) if short else rng.choice((2, 3, 3, 4)) if source == "fictional" else rng.choice((2, 3))
        parts = [None if rng.random() < as_text else compressed for _ in range(size)]
        return corpus.several_row(rng, source, parts, short)

    rows = [corpus.single_row(rng, source, None, ae, mix.drilled) for source in drawn(mix.text)]
    rows += [corpus.single_row(rng, source, factor(source), ae, mix.drilled) for source in drawn(mix.slots)]
    if stage == "text" or progress > 0.15:
        rows += [several(source) for source in drawn(mix.together)]
    if stage == "text":
        rows += [corpus.random_row(rng, None, ae, 24) for _ in range(max(1, round(copies * scale)))]
    elif progress < 0.5:
        rows += [corpus.random_row(rng, rng.uniform(1, 2), ae) for _ in range(max(1, round(2 * scale)))]
    return rows


def cost(row: Row) -> int:
    """About the number of tokens that a row sends through the blocks."""
    parts = sum(len(ids) if f is None else len(ids) + 2 * num_slots(len(ids), f) for ids, f in row.parts)
    return parts + sum(len(b.ids) for b in row.branches)
