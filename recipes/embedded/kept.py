"""A memory for a decoder that never met slots: keys and values, of every layer, of the tokens most worth keeping.

    python recipes/embedded/kept.py --data DATA --begin runs/embedded/after-text.safetensors --out runs/control
    python recipes/embedded/train.py --data DATA --out runs/control --memory kept --joint 0 --compressor 500 \
        --curriculum 0 --max-factor 4

The first command teaches a scorer, a small network on the frozen decoder's hidden states, which tokens answers are made
of; the second trains LoRA, with which the decoder makes the keys and values of the tokens that the scorer chooses.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from data import Corpus, Row
from layout import num_slots
from model import Model, Shape
from objective import Encode, coarsest_first, encode_spans
from packed import Packing
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

# What the scorer is to make of a token: of an answer; of the subject's name; behind an answer, where it ends.
ANSWER, NAME, STOP = 1.0, 0.5, 0.1
HOME, SQUAD = 12, 20  # texts of a step of the scorer
RATE, WARMUP = 3e-3, 20

Labelled = tuple[list[int], Tensor]  # a text's tokens and what the scorer is to make of each


class Keeper(Model):
    """A model whose memory is entries (layers, tokens, 2, heads, head_dim): keys, not rotated yet, and values."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        states = (shape.num_layers - 1) * shape.hidden_size
        self.scorer = nn.Sequential(nn.Linear(states, 64), nn.GELU(), nn.Linear(64, 1))

    def scores(self, texts: list[list[int]]) -> list[Tensor]:
        """By text, how much each of its tokens is worth keeping, (tokens,), from what the decoder makes of the text."""
        ids, places, packing = laid_end_to_end(texts)
        states: list[Tensor] = []
        with torch.no_grad():
            super().decode(ids, torch.zeros(0, self.shape.hidden_size), torch.full_like(ids, -1), places, packing,
                           torch.zeros(1, dtype=torch.long), states=states)
        seen = torch.cat([F.rms_norm(s, s.shape[-1:]) for s in states], dim=-1)
        return list(self.scorer(seen)[:, 0].split([len(text) for text in texts]))

    def entries(self, texts: list[list[int]], kept: list[list[int]]) -> Tensor:
        """Entries of these tokens of each text, made by the decoder with LoRA."""
        ids, places, packing = laid_end_to_end(texts)
        where = torch.tensor([begin + i for begin, tokens in zip(packing.begins, kept, strict=False) for i in tokens])
        taken: list[Tensor] = []

        def take(qkv: Tensor) -> Tensor:
            taken.append(qkv.index_select(0, where)[:, 1:])
            return qkv

        self.run(F.embedding(ids, self.embed), places, packing, where[:1], encoder=True,
                 edits=[take] * len(self.blocks))
        return torch.stack(taken)

    def decode(self, ids: Tensor, slots: Tensor, slot: Tensor, positions: Tensor, packing: Packing, where: Tensor,
               tap: list[tuple[Tensor, Tensor]] | None = None, states: list[Tensor] | None = None) -> Tensor:
        """As Model's; `slots` are entries, or there are none."""
        if slots.dim() == 2:
            return super().decode(ids, slots, slot, positions, packing, where, tap, states)
        columns = (slot >= 0).nonzero()
        keys_and_values = torch.tensor([[1, 2]])

        def put(qkv: Tensor, entries: Tensor) -> Tensor:
            return qkv.index_put((columns, keys_and_values), entries)

        edits = [partial(put, entries=layer) for layer in slots[:, slot[columns[:, 0]]]]
        x = F.embedding(ids, torch.cat([self.embed, self.special]))
        return F.linear(self.run(x, positions, packing, where, False, tap, states, edits), self.embed)


def laid_end_to_end(texts: list[list[int]]) -> tuple[Tensor, Tensor, Packing]:
    """Ids and places of all tokens, and where each text lies."""
    places = [i for text in texts for i in range(len(text))]
    return torch.tensor([*chain(*texts)]), torch.tensor(places), Packing([(len(text), ()) for text in texts])


def encode_kept(model: Model, spans: list[tuple[list[int], float]]) -> tuple[Tensor, list[list[int]]]:
    """Entries of all texts, in order, and by text the tokens that the scorer chose, in their order."""
    assert isinstance(model, Keeper)
    texts = [ids for ids, _ in spans]
    with torch.no_grad():
        kept = [sorted(scores.topk(num_slots(len(ids), factor)).indices.tolist())
                for (ids, factor), scores in zip(spans, model.scores(texts), strict=True)]
    return model.entries(texts, kept), kept


MEMORIES: dict[str, tuple[type[Model], Encode]] = {
    "slots": (Model, encode_spans), "nested": (Model, partial(encode_spans, order=coarsest_first)),
    "kept": (Keeper, encode_kept)}


def without_wording(row: Row) -> Row:
    """The row without what asks for a text word by word: of most tokens nothing is kept."""
    row.branches = [b for b in row.branches if b.kind not in ("reconstruct", "recall")]
    return row


def home_text(corpus: Corpus, rng: random.Random) -> Labelled:
    ids, document = corpus.fictional(rng)
    offsets = corpus.tokenizer.encode(document.text, add_special_tokens=False).offsets
    begins = [(document.text.index(q.answer), len(q.answer)) for q in document.questions]
    answers = [[i for i, (first, last) in enumerate(offsets) if first < begin + size and begin < last]
               for begin, size in begins]
    first, last = corpus.mentions(document.text, document.subject)[0]
    return ids, labels(len(ids), answers, range(first, last + 1))


def squad_text(corpus: Corpus, rng: random.Random) -> Labelled:
    ids, pairs = corpus.squad_window(rng, corpus.squad[rng.choice(corpus.answerable)])
    answers = [[*range(first, min(len(ids), first + len(corpus.answer_ids(answer))))] for _, answer, first in pairs]
    return ids, labels(len(ids), answers, range(0))


def labels(length: int, answers: list[list[int]], name: range) -> Tensor:
    made = torch.zeros(length)
    made[[tokens[-1] + 1 for tokens in answers if tokens and tokens[-1] + 1 < length]] = STOP
    made[list(name)] = NAME
    made[[i for tokens in answers for i in tokens]] = ANSWER
    return made


def teach(model: Keeper, corpus: Corpus, steps: int, rng: random.Random) -> None:
    """Train the scorer; everything else stays as it is."""
    optimizer = torch.optim.AdamW(model.scorer.parameters(), lr=RATE, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARMUP) * (1 - step / steps)
        drawn = [home_text(corpus, rng) for _ in range(HOME)] + [squad_text(corpus, rng) for _ in range(SQUAD)]
        scores = torch.cat(model.scores([ids for ids, _ in drawn]))
        loss = F.binary_cross_entropy_with_logits(scores, torch.cat([wanted for _, wanted in drawn]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: {loss.item():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with squad-train-v1.1.json.xz")
    parser.add_argument("--begin", type=Path, required=True, help="after-text.safetensors, tokenizer.json beside it")
    parser.add_argument("--out", type=Path, required=True, help="folder that train.py goes on in")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    checkpoint = args.out / "checkpoint.safetensors"
    if checkpoint.exists():
        parser.error(f"expected a new folder, got {args.out} with a checkpoint: train.py goes on with it")
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(args.begin.parent / "tokenizer.json", args.out)
    corpus = Corpus(Tokenizer.from_file(str(args.out / "tokenizer.json")), args.data, 0)
    torch.manual_seed(args.seed)
    model = Keeper(Shape())
    begun = {k[6:]: v for k, v in load_file(args.begin).items() if k.startswith("model.")}
    model.load_state_dict({**model.state_dict(), **begun})  # the scorer has nothing to begin with
    teach(model, corpus, args.steps, random.Random(args.seed))
    save_file({f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}, checkpoint,
              metadata={"state": json.dumps({"stage": "compressor", "step": 0})})


if __name__ == "__main__":
    main()
