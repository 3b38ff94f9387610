"""InfiniPot with eager attention, one token at a time, one head at a time: slow and obvious."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.kv.catalyst import Catalyst

LAYERS = HEADS = 2
"""Of the tiny decoders; two query heads share a kv head."""


def eager_model(backbone: Backbone) -> PreTrainedModel:
    model = backbone.second_tree()
    model.set_attn_implementation("eager")
    return model


def rotate_half(row: Tensor) -> Tensor:
    return torch.cat([-row[len(row) // 2 :], row[: len(row) // 2]])


def best_first(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])


class SlowPot:
    """A pot that is told when to read and when to distil. `held[layer][head]`: numbers of the tokens it holds."""

    def __init__(self, backbone: Backbone, catalyst: Catalyst, *, alpha: float = 0.5, recent: int = 0,
                 reduce: str = "sum") -> None:
        self.model: Any = eager_model(backbone)
        self.catalyst, self.alpha, self.recent, self.reduce = catalyst, alpha, recent, reduce
        self.cache: Any = DynamicCache(config=self.model.config)
        self.held: list[list[list[int]]] = [[[] for _ in range(HEADS)] for _ in range(LAYERS)]
        self.novelty: list[float] = []
        self.logits: Tensor | None = None
        self.size = 0
        self.unrepeated: list[int] = []
        self.mass: dict[tuple[int, int, int], float] = {}

    def read(self, token: int) -> None:
        number = len(self.novelty)
        self.novelty.append(math.inf if self.logits is None else -float(self.logits.log_softmax(-1)[token]))
        self.logits = self.model(torch.tensor([[token]]), position_ids=torch.tensor([[self.size]]),
                                 past_key_values=self.cache).logits[0, -1]
        self.size += 1
        self.unrepeated.append(token)
        for of_head in (h for of_layer in self.held for h in of_layer):
            of_head.append(number)

    def distil(self, keep: int) -> None:
        rows = self._catalyst_rows()
        if not self.catalyst.repeats:
            self.mass = {}
        fresh: Any = DynamicCache(config=self.model.config)
        free, last = keep - self.recent, list(range(self.size - self.recent, self.size))
        for layer in range(LAYERS):
            keys, values = [], []
            for head in range(HEADS):
                tokens = self.held[layer][head]
                for place, token in enumerate(tokens):
                    seen = [float(row[layer][h, place]) for row in rows for h in (2 * head, 2 * head + 1)]
                    old = self.mass.get((layer, head, token), 0.0)
                    self.mass[layer, head, token] = max(old, *seen) if self.reduce == "max" else old + sum(seen)
                mass = [self.mass[layer, head, t] for t in tokens[: self.size - self.recent]]
                novel = best_first([self.novelty[t] for t in tokens[: len(mass)]])[: int(self.alpha * free)]
                rest = [i for i in best_first(mass) if i not in novel]
                best = [*sorted(novel + rest[: free - len(novel)]), *last]
                full = self.cache.layers[layer]
                keys.append(torch.stack([self._turned(full.keys[0, head, p], p, j) for j, p in enumerate(best)]))
                values.append(full.values[0, head, best])
                self.held[layer][head] = [tokens[p] for p in best]
            fresh.update(torch.stack(keys)[None], torch.stack(values)[None], layer)
        self.cache, self.size = fresh, keep

    def _catalyst_rows(self) -> list[list[Tensor]]:
        """Attention weights of every token of the catalyst: by token, layer, then (query heads, entries)."""
        tokens, rows = [*self.catalyst.ids, *(self.unrepeated if self.catalyst.repeats else [])], []
        self.unrepeated = []
        given = len(tokens)
        for number, token in enumerate(tokens):  # grows while it is walked
            made = self.model(torch.tensor([[token]]), position_ids=torch.tensor([[self.size + number]]),
                              past_key_values=self.cache, output_attentions=True)
            rows.append([w[0, :, 0] for w in made.attentions])
            said = int(made.logits[0, -1].argmax())
            going = given - 1 <= number < given + self.catalyst.draft_tokens - 1
            if going and said not in self.catalyst.end_ids:
                tokens.append(said)
        return rows

    def _turned(self, key: Tensor, old: int, new: int) -> Tensor:
        cos, sin = self.model.model.rotary_emb(key[None], torch.tensor([[old]]))
        dim = cos.shape[-1]
        plain = key[:dim] * cos[0, 0] - rotate_half(key[:dim]) * sin[0, 0]
        cos, sin = self.model.model.rotary_emb(key[None], torch.tensor([[new]]))
        return torch.cat([plain * cos[0, 0] + rotate_half(plain) * sin[0, 0], key[dim:]])
