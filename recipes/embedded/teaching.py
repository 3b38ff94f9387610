"""Self-distillation: what the decoder makes of a question with the documents as text is what it should make of it with
their slots. Positions are the same in both, so each token of a question or answer has its counterpart."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from data import Row
from layout import Flat, columns_of, lay_out
from model import Model
from packed import Packing
from parallel import total
from torch import Tensor

NOT_ANSWERS = ("question", "reconstruct")  # loss kinds; rows with slots have no others


def as_text(row: Row) -> Row:
    """The same questions, every document as text; nothing is reconstructed."""
    asked = [b for b in row.branches if b.kind != "reconstruct"]
    return replace(row, parts=[(ids, None) for ids, _ in row.parts], branches=asked, language_model=False)


def asked_columns(rows: list[Row], flats: list[Flat], begins: list[int]) -> Tensor:
    """Columns, among all tokens, of every branch but reconstructions."""
    columns: list[int] = []
    for row, flat, begin in zip(rows, flats, begins, strict=False):
        first = begin + flat.context
        for branch, length in zip(row.branches, flat.branches, strict=True):
            columns += range(first, first + length) if branch.kind != "reconstruct" else ()
            first += length
    return torch.tensor(columns, dtype=torch.long)


def distillation_loss(model: Model, rows: list[Row], flats: list[Flat], begins: list[int], separator: list[int],
                      states: list[Tensor], logits: Tensor, kinds: list[tuple[int, str]]) -> Tensor:
    """KL of the predictions of answers, mean over their tokens, and for every layer but the last the squared distance
    of hidden states, mean over the tokens of questions and answers, relative to their squared length.

    Args:
        rows, flats, begins: the rows, how they are laid out, and where each begins among all tokens.
        states: hidden states (tokens, hidden_size) of every layer but the last.
        logits: (targets, vocabulary).
        kinds: the row and the loss kind of each target.
    """
    texts = {n: text for n, row in enumerate(rows)
             if any(f is not None for _, f in row.parts) and (text := as_text(row)).branches}
    pupils = list(texts)
    columns = asked_columns([rows[n] for n in pupils], [flats[n] for n in pupils], [begins[n] for n in pupils])
    chosen = torch.tensor([i for i, (n, kind) in enumerate(kinds) if n in texts and kind not in NOT_ANSWERS],
                          dtype=torch.long)
    counted = total(torch.tensor([float(len(columns)), float(len(chosen))])).clamp(min=1)
    loss = torch.zeros(())
    if not pupils:
        return loss
    laid = [lay_out(text, separator, {}) for text in texts.values()]
    packing = Packing([(f.context, f.branches) for f in laid])
    ids, places, slot = columns_of(laid)
    where = torch.tensor([begin + t[0] for f, begin in zip(laid, packing.begins, strict=False) for t in f.targets
                          if t[2] not in NOT_ANSWERS])
    taught: list[Tensor] = []
    with torch.no_grad():
        wanted = model.decode(ids, torch.zeros(0, model.shape.hidden_size), slot, places, packing, where, states=taught)
        same = asked_columns(list(texts.values()), laid, packing.begins)
    loss = loss + F.kl_div(logits[chosen].log_softmax(-1), wanted.log_softmax(-1), reduction="sum",
                           log_target=True) / counted[1]
    for mine, theirs in zip(states, (t[same] for t in taught), strict=True):
        loss = loss + (mine[columns] - theirs).square().sum() / theirs.square().sum(-1).mean() / counted[0]
    return loss
