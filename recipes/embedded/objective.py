"""The losses of a step: next tokens, where heads look, and what slots name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from data import Row
from layout import Flat, Span, columns_of, lay_out, num_slots, slot_places
from model import Model
from packed import Packing
from parallel import total
from teaching import distillation_loss
from torch import Tensor

from ctxcomp_rag.compressors.nested import coarse_to_fine

# The losses that tell the first heads of a block where to look: a token of a question, where the context has the same
# one; what predicts an answer, at the name that the question has; by the same head, a token of one of several
# documents, at the name of what this document is about, and what predicts an answer, at the name in question; the first
# token of an answer, where the context states it; further tokens, each in its turn.
POINTING = {"match": 0.2, "who": 0.2, "bind": 0.2, "ask": 0.3, "point": 0.7, "follow": 0.3}
# Their block, and how many heads. All heads of a block are to copy answers, so that more of a slot is passed on than
# the 64 numbers of one head; what depends on the others was little when it was measured (benchmarks/LOG.md).
HEADS = {"match": (1, 1), "who": (-4, 1), "bind": (-3, 1), "ask": (-3, 1), "point": (-2, 4), "follow": (-2, 4)}
# One mean over all tokens that are read from the context. With a mean for each kind, the few of a rare kind made most
# of the gradient's noise: its norm was 12 where that of SQuAD's answers was 3.
# The first token of an answer weighs more, but where one fictional document is asked about: it says where it is read,
# which is what answers that quote get wrong.
READ = {"answer-home": 1.0, "answer-several": 1.0, "answer-short": 1.0, "answer": 1.0, "answer-first": 3.0,
        "cloze": 0.5, "recall": 0.5, "reconstruct": 0.25}
READ_WEIGHT = 2.25
MEANS = {"question": 0.2, "lm": 0.3, "lm-home": 0.3, **POINTING}
KINDS = tuple(sorted(READ | MEANS))


def token_weights(counts: dict[str, int]) -> dict[str, float]:
    """What one token of each kind weighs in the loss of a step that has so many of each."""
    read = READ_WEIGHT / max(1.0, sum(READ[k] * counts[k] for k in READ))
    return {k: READ[k] * read if k in READ else MEANS[k] / max(1, counts[k]) for k in KINDS}


# Texts and how much to compress them -> what stands in their place, and by text the tokens that it sits on.
Encode = Callable[[Model, list[tuple[list[int], float]]], tuple[Tensor, list[list[int]]]]
FINEST = 4.0  # factor of nested spans whose slots are all read


def in_text_order(length: int, factor: float) -> list[int]:
    return slot_places(length, num_slots(length, factor))


def coarsest_first(length: int, factor: float) -> list[int]:
    """The places of nested slots, in the order in which the encoder makes them (`ctxcomp_rag.compressors.nested`)."""
    places = slot_places(length, num_slots(length, FINEST))
    return [places[j] for j in coarse_to_fine(len(places))[: num_slots(length, max(FINEST, factor))]]


def encode_spans(model: Model, spans: list[tuple[list[int], float]],
                 order: Callable[[int, float], list[int]] = in_text_order) -> tuple[Tensor, list[list[int]]]:
    """Slots of all spans, in text order, and by span the places of its slots in the text."""
    made = [order(len(ids), f) for ids, f in spans]
    packing = Packing([(len(ids) + len(on), ()) for (ids, _), on in zip(spans, made, strict=True)])
    ids, places, where = [], [], []
    for (text, _), on, begin in zip(spans, made, packing.begins, strict=False):
        ids += text + [model.shape.vocab_size] * len(on)
        places += [*range(len(text)), *on]
        where += [begin + len(text) + j for j in sorted(range(len(on)), key=on.__getitem__)]
    return (model.encode(torch.tensor(ids), torch.tensor(places), packing, torch.tensor(where)),
            [sorted(on) for on in made])


def pointing_loss(tapped: tuple[Tensor, Tensor], flats: list[Flat], kind: str, heads: int,
                  dealt: bool = True) -> Tensor:
    """Sum over the points of a kind of -log of what attention lays on the targets, mean over the first `heads` heads.

    A guide for the heads that match and copy: an answer says which token comes next, and not where it was to be read.
    With `dealt`, the tokens of a slot are dealt out to the heads (`has_token`).
    """
    loss = torch.zeros(())
    for flat, queries, keys in zip(flats, *(x[:, :heads].split([len(f.ids) for f in flats]) for x in tapped),
                                   strict=True):
        points = [p for p in flat.points if p.kind == kind]
        if not points:
            continue
        column = torch.tensor([p.column for p in points])
        scores = torch.einsum("phd,thd->hpt", queries.index_select(0, column), keys) * queries.shape[-1] ** -0.5
        begins = accumulate(flat.branches, initial=flat.context)
        begin = torch.tensor([0] * flat.context
                             + [b for b, n in zip(begins, flat.branches, strict=False) for _ in range(n)])
        every = torch.arange(len(flat.ids))
        hidden = (every > column[:, None]) | ((every >= flat.context) & (every < begin[column][:, None]))
        looks = [(head, n, t) for n, p in enumerate(points) for head in range(heads)
                 for t in (p.targets if not dealt or has_token(head, heads, p.token, p.tokens) else (0,))]
        elsewhere = torch.ones((heads, *hidden.shape), dtype=torch.bool)
        elsewhere[tuple(torch.tensor(x) for x in zip(*looks, strict=True))] = False
        loss = loss + (scores.masked_fill(hidden, -1e9).logsumexp(-1)
                       - scores.masked_fill(elsewhere, -1e9).logsumexp(-1)).sum() / heads
    return loss


def has_token(head: int, heads: int, token: int, tokens: int) -> bool:
    """Whether a head is to copy this token of a slot that holds so many; the others look at the row's first token."""
    return head * tokens // heads == token if tokens <= heads else head == token * heads // tokens


def naming_loss(model: Model, spans: list[tuple[list[int], float]], slots: Tensor) -> Tensor:
    """Sum over slots of the cross-entropy of a slot, read by the tied head, against the tokens of its piece of text.

    A scaffold for the first part of the joint stage: at 1x it asks a slot to look like its token's embedding, which
    the decoder can read already; without it, slots carry nothing for thousands of steps.
    """
    slot_of: list[int] = []
    token: list[int] = []
    weight: list[float] = []
    first = 0
    for ids, factor in spans:
        count = num_slots(len(ids), factor)
        for j in range(count):
            piece = ids[j * len(ids) // count : max(j * len(ids) // count + 1, (j + 1) * len(ids) // count)]
            slot_of += [first + j] * len(piece)
            token += piece
            weight += [1 / len(piece)] * len(piece)
        first += count
    log_p = F.log_softmax(F.linear(slots, model.embed), dim=-1)
    return -(log_p[torch.tensor(slot_of), torch.tensor(token)] * torch.tensor(weight)).sum()


@dataclass
class Outcome:
    """Sums of the loss by kind, counts, and per answer branch whether every token was right."""

    loss: Tensor
    sums: dict[str, float]
    counts: dict[str, int]
    exact: list[bool]


def forward(model: Model, rows: list[Row], separator: list[int], naming: float = 0.0, taught: float = 0.0,
            guided: bool = True, encode: Encode = encode_spans, dealt: bool = True) -> Outcome:
    """Loss of these rows. With several processes, means are over the rows of all of them.

    Args:
        naming: weight of the naming loss.
        taught: weight of what the documents as text teach (see `teaching`); rows that are all text have none.
        guided: heads are told where to look. Those of a frozen decoder cannot learn it.
        encode: makes the memory that stands in the place of texts.
        dealt: the tokens of a slot are dealt out to the heads that are told where to look. The heads of a mean of
            weights all look at each.
    """
    spans = [(ids, f) for row in rows for ids, f in row.parts if f is not None]
    slots, spread = encode(model, spans) if spans else (torch.zeros(0, model.shape.hidden_size), [])
    laid = map(Span, accumulate(map(len, spread), initial=0), spread)
    flats = [lay_out(row, separator, {k: next(laid) for k, (_, f) in enumerate(row.parts) if f is not None})
             for row in rows]
    rows = [r for r, f in zip(rows, flats, strict=True) if f.targets]
    flats = [f for f in flats if f.targets]
    kind_counts = Counter(t[2] for f in flats for t in (*f.targets, *f.points))
    counted = total(torch.tensor([float(kind_counts[k]) for k in KINDS] + [float(sum(map(len, spread)))]))
    totals = dict(zip(KINDS, map(int, counted.tolist()), strict=False))
    weights = token_weights(totals)
    loss = torch.zeros(())
    if naming and spread:
        loss = loss + naming_loss(model, spans, slots) * (naming / float(counted[-1]))
    packing = Packing([(f.context, f.branches) for f in flats])
    targets = [(begin + t[0], *t[1:], n) for n, (f, begin) in enumerate(zip(flats, packing.begins, strict=False))
               for t in f.targets]
    where, labels = (torch.tensor([t[i] for t in targets]) for i in (0, 1))
    kind_of = torch.tensor([KINDS.index(t[2]) for t in targets])
    ids, places, slot = columns_of(flats)
    tap: list[tuple[Tensor, Tensor]] = []
    states: list[Tensor] = []
    logits = model.decode(ids, slots, slot, places, packing, where, tap, states)
    sums = dict.fromkeys(KINDS, 0.0)
    for kind, (block, heads) in HEADS.items() if guided else ():
        pointed = pointing_loss(tap[block], flats, kind, heads, dealt)
        loss = loss + pointed * weights[kind]
        sums[kind] = float(pointed.detach())
    each = F.cross_entropy(logits, labels, reduction="none")
    loss = loss + (each * torch.tensor([weights[k] for k in KINDS])[kind_of]).sum()
    if taught:
        loss = loss + taught * distillation_loss(model, rows, flats, packing.begins, separator, states, logits,
                                                 [(n, kind) for _, _, kind, _, n in targets])
    with torch.no_grad():
        for i, k in enumerate(KINDS):
            if k not in POINTING:
                sums[k] = float(each[kind_of == i].sum())
        right = logits.argmax(-1) == labels
    flags: dict[tuple[int, int], bool] = {}
    for (_, _, kind, branch, n), ok in zip(targets, right.tolist(), strict=True):
        if kind.startswith(("answer", "reconstruct")):
            flags[(n, branch)] = flags.get((n, branch), True) and ok
    sums = dict(zip(KINDS, total(torch.tensor([sums[k] for k in KINDS])).tolist(), strict=True))
    return Outcome(loss, sums, totals, list(flags.values()))
