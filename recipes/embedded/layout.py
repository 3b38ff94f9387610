"""How a row becomes one sequence of tokens: positions, slots, what is predicted where, and where heads are to look."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import torch
from data import Row
from torch import Tensor

FEW = 2  # a token that the context has more often says little about where to look


def num_slots(length: int, factor: float) -> int:
    return max(1, math.ceil(length / factor))


def slot_places(length: int, slots: int) -> list[int]:
    """Slot j sits on the last token of the j-th of `slots` equal pieces of the text."""
    return [max(1, (j + 1) * length // slots) - 1 for j in range(slots)]


class Span(NamedTuple):
    """Slots in the place of a text: which of all slots is the first, and the tokens of the text that they sit on."""

    first: int
    places: list[int]

    def holder(self, token: int) -> int:
        """The slot that holds a token: the first at or after it."""
        return min(bisect_left(self.places, token), len(self.places) - 1)

    def turn(self, token: int) -> tuple[int, int]:
        """Which token of its slot a token is, and how many the slot holds."""
        slot = self.holder(token)
        begin = self.places[slot - 1] + 1 if slot else 0
        return token - begin, self.places[slot] - begin + 1


class Point(NamedTuple):
    """A column whose heads are told where to look."""

    column: int
    targets: tuple[int, ...]
    kind: str
    token: int = 0  # which token of the slot looked at is wanted, of how many that it holds
    tokens: int = 1


@dataclass
class Flat:
    """One row laid out for the decoder."""

    ids: list[int]
    places: list[int]
    context: int
    branches: list[int]  # their lengths
    slot: list[int]  # index into the slot table, -1 for text
    targets: list[tuple[int, int, str, int]]  # (column, label, loss kind, branch)
    points: list[Point] = field(default_factory=list)


def columns_of(flats: list[Flat]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, places and slots of all rows, end to end, each (tokens,)."""
    ids, places, slot = (torch.tensor([x for f in flats for x in part(f)])
                         for part in (attrgetter("ids"), attrgetter("places"), attrgetter("slot")))
    return ids, places, slot


def lay_out(row: Row, separator: list[int], spans: dict[int, Span]) -> Flat:
    """One sequence of tokens for the decoder; `spans` by part."""
    flat = Flat([], [], 0, [], [], [])
    place = 0
    held: list[list[int]] = []  # by part, the column of each of its tokens, or of the slot that holds it
    text_columns: list[tuple[int, int]] = []

    def add_text(ids: list[int], labelled: bool = False) -> None:
        nonlocal place
        for i, token in enumerate(ids):
            if labelled and i:
                text_columns.append((len(flat.ids) - 1, token))
            flat.ids.append(token)
            flat.places.append(place)
            flat.slot.append(-1)
            place += 1

    add_text(row.prefix)
    for k, (ids, _) in enumerate(row.parts):
        if k:
            add_text(separator)
        span = spans.get(k)
        held.append([len(flat.ids) + (span.holder(n) if span else n) for n in range(len(ids))])
        if span is None:
            add_text(ids, labelled=row.language_model)
            continue
        for j, p in enumerate(span.places):
            flat.ids.append(0)
            flat.places.append(place + p)
            flat.slot.append(span.first + j)
        place += len(ids)
    flat.context = len(flat.ids)
    named: dict[int, tuple[int, ...]] = {}  # by part, the columns that name it, wherever it does
    for k, (there, mentions) in enumerate(zip(held, row.names, strict=False)):
        spelt = [tuple(sorted({*there[first : last + 1]})) for first, last in mentions]
        if spelt:
            named[k] = tuple(sorted({*chain(*spelt)}))
            flat.points += [Point(column, spelt[0], "bind") for column in sorted({*there}) if column > spelt[0][-1]]
    columns: dict[int, list[int]] = {}
    for (ids, _), there in zip(row.parts, held, strict=True):
        for token, column in zip(ids, there, strict=True):
            columns.setdefault(token, []).append(column)
    kind = "lm-home" if row.source.startswith("fictional") else "lm"
    flat.targets += [(c, t, kind, 0) for c, t in text_columns]
    for number, branch in enumerate(row.branches, 1):
        base = len(flat.ids)
        flat.ids += branch.heard or branch.ids
        flat.places += range(place, place + len(branch.ids))
        flat.branches.append(len(branch.ids))
        flat.slot += [-1] * len(branch.ids)
        for i in range(1, len(branch.ids)):
            loss = branch.kind if i >= branch.answer_start else "question"
            if loss == "question" and branch.kind in ("cloze", "recall"):
                continue
            if loss == "answer" and i == branch.answer_start and row.source.startswith(("squad", "fictional-")):
                loss = "answer-first"
            elif loss == "answer" and row.source.startswith("fictional"):
                loss = {"fictional-several": "answer-several", "fictional-short": "answer-short"}.get(
                    row.source, "answer-home")
            flat.targets.append((base + i - 1, branch.ids[i], loss, number))
        asked = branch.ids[: branch.answer_start] if branch.kind != "reconstruct" else []
        flat.points += [Point(base + i, tuple(columns[token]), "match") for i, token in enumerate(asked)
                        if 0 < len(columns.get(token, ())) <= FEW]
        if branch.name is not None:
            first, last = branch.name
            name = tuple(range(base + first, base + last + 1))
            flat.points.append(Point(base + branch.answer_start - 1, name, "who"))
        if branch.stands is not None:
            part, first = branch.stands
            (ids, _), there = row.parts[part], held[part]
            begin = base + branch.answer_start - 1
            if part in named:
                flat.points.append(Point(begin, named[part], "ask"))
            for n, token in enumerate(branch.answer):
                if n and ids[first + n : first + n + 1] != [token]:
                    break
                kind = "follow" if n or branch.kind == "reconstruct" else "point"
                turn = spans[part].turn(first + n) if part in spans else (0, 1)
                flat.points.append(Point(begin + n, (there[first + n],), kind, *turn))
    return flat
