"""A cache of bounded size that reads a text of any length: fill it, distil it, go on (InfiniPot's CCD).

    read 0..7        [t0 t1 t2 t3 t4 t5 t6 t7]
    distil to 3      [t0 t5 t6]                    chosen by a scoring rule, per layer and kv head
                      0  1  2                      moved to consecutive positions, order kept (CR-RoPE)
    read 8..12       [t0 t5 t6 t8 t9 t10 t11 t12]  new tokens stand and go on from there
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ctxcomp_rag.kv.attention import (
    attention_layers,
    attention_mass,
    observed_inputs,
    observed_queries,
    scaling_of,
    softcap_of,
)
from ctxcomp_rag.kv.catalyst import Catalyst
from ctxcomp_rag.kv.scores import Entries, Reading, ScoringRule, choose
from ctxcomp_rag.rope import RotaryPositions, rotate_keys


class ContextPot:
    """The cache of one text, or of one prompt of text and spans, on its way through.

    Entries stand at increasing positions from 0, without gaps but for those that soft spans bring along; after a
    distillation at 0..size-1. Everything else that is kept per entry is kept per layer and kv head, because after a
    distillation heads hold different tokens.

    Args:
        model: the decoder; hooks are set on it while queries are observed (see `observed_queries`).
        rope: its rotary frequencies.
        rule: which entries to keep.
        catalyst: the catalyst prompt; never part of the pot afterwards.
        step_tokens: longest piece of text in one forward pass; bounds activations and logits.
        sink, recent: entries at either end that are always kept (see `choose`).

    Attributes:
        size: entries in the pot.
        num_read: entries that ever entered.
        positions: (size,) of the entries; `next_position` is where the next one will stand.
        indices: (num_layers, num_kv_heads, size) place of each entry in everything read.
        novelty: (num_layers, num_kv_heads, size) -log p of each entry's token given the pot as it was when the
            token was read, inf for the first token of all, -inf where there is no such number (see `Entries`). An
            entry keeps its number for as long as it stays. The first token after a distillation is foretold by the
            logits of the token before it.
        foretold: (vocab_size,) logits of what follows the last entry; None where that is a cached one.
    """

    def __init__(self, model: PreTrainedModel, rope: RotaryPositions, rule: ScoringRule, *, catalyst: Catalyst,
                 step_tokens: int, sink: int = 0, recent: int = 0) -> None:
        self.model, self.rope, self.rule = model, rope, rule
        self.catalyst, self.step_tokens = catalyst, step_tokens
        self.sink, self.recent = max(sink, rule.sink), max(recent, rule.recent)
        self.size = self.num_read = self.next_position = 0
        rule.prepare(model)
        self._cache: Any = DynamicCache(config=model.config)
        attentions = attention_layers(model) if rule.queries != "none" else []
        self._scaling = [(scaling_of(a), softcap_of(a)) for a in attentions]
        config = model.config.get_text_config()
        self._shape = (int(config.num_hidden_layers),
                       int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads))
        self._group = int(config.num_attention_heads) // self._shape[1]
        self.positions = torch.empty(0, dtype=torch.int64, device=model.device)
        self.indices = torch.empty(*self._shape, 0, dtype=torch.int64, device=model.device)
        self.novelty = torch.empty(*self._shape, 0, device=model.device)
        self.foretold: Tensor | None = None
        self._mass: dict[int, Tensor] = {}
        self._unrepeated: list[int] = []
        self._readings: dict[int, Reading] = {}

    @property
    def keys(self) -> list[Tensor]:
        """Keys of each layer, (num_kv_heads, size, head_dim)."""
        return [layer.keys[0] for layer in self._cache.layers]

    @property
    def values(self) -> list[Tensor]:
        """Values of each layer, (num_kv_heads, size, head_dim)."""
        return [layer.values[0] for layer in self._cache.layers]

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, ids: Sequence[int], each: Callable[[Tensor], None] | None = None) -> None:
        """Append tokens. What a "window" rule sees are the last tokens of one such piece.

        Args:
            each: called with the logits (n, vocab_size) of every n tokens as they are read; those of the last token
                only unless the rule asks for novelty.
        """
        if self.rule.queries == "window":  # the window of this piece only
            self._mass = {}
        if self.catalyst.repeats:
            self._unrepeated += ids
        last = min(self.rule.window, len(ids)) if self.rule.queries == "window" else 0
        ends = [*range(self.step_tokens, len(ids) - last, self.step_tokens), len(ids) - last, len(ids)]
        begin = 0
        for end in ends:
            if end > begin:
                step = torch.tensor(ids[begin:end], device=self.model.device)
                in_window = self.rule.queries == "window" and begin >= len(ids) - last
                logits = self._forward({"input_ids": step[None]}, torch.arange(end - begin),
                                       observe=in_window or self.rule.queries == "all")
                if self.rule.novelty:
                    self._extend_novelty(step, logits)
                self._extend(torch.arange(end - begin), end - begin)
                self.foretold = logits[-1].clone()
                if each:
                    each(logits)
            begin = end

    def read_rows(self, embeds: Tensor, offsets: Tensor, num_positions: int) -> Tensor:
        """Append embedding rows (n, hidden_size), at most `step_tokens` of them, `offsets` (n,) from the next position.

        Returns their logits, as `read` does. The next position moves on by `num_positions`.
        """
        logits = self._forward({"inputs_embeds": embeds[None]}, offsets, observe=self.rule.queries == "all")
        self._extend(offsets, num_positions)
        self.foretold = logits[-1].clone()
        return logits

    def append(self, keys: Tensor, values: Tensor, offsets: Tensor, num_positions: int) -> None:
        """Append cached entries: keys, values (num_layers, num_kv_heads, n, head_dim), keys rotated for `offsets` (n,).

        They are moved on by the next position, and that by `num_positions`.
        """
        moved = rotate_keys(keys, self.next_position, self.rope)
        for layer, (k, v) in enumerate(zip(moved, values, strict=True)):
            self._cache.update(k[None], v[None], layer)
        self._extend(offsets, num_positions)
        self.foretold = None

    def _extend(self, offsets: Tensor, num_positions: int) -> None:
        n, device = offsets.numel(), self.positions.device
        new = torch.arange(self.num_read, self.num_read + n, device=device)
        self.indices = torch.cat([self.indices, new.expand(*self._shape, -1)], dim=-1)
        self.positions = torch.cat([self.positions, offsets.to(device) + self.next_position])
        self.size += n
        self.num_read += n
        self.next_position += num_positions
        if self.rule.novelty:
            self.novelty = torch.nn.functional.pad(self.novelty, (0, self.size - self.novelty.shape[-1]),
                                                   value=-torch.inf)

    def _extend_novelty(self, ids: Tensor, logits: Tensor) -> None:
        before = self.foretold[None] if self.foretold is not None else logits[:1]
        foretelling = torch.cat([before, logits[:-1]])
        new = torch.nn.functional.cross_entropy(foretelling.float(), ids, reduction="none")
        if self.foretold is None:
            new[0] = -torch.inf if self.num_read else torch.inf
        self.novelty = torch.cat([self.novelty, new.expand(*self._shape, -1)], dim=-1)

    def _forward(self, inputs: dict[str, Tensor], offsets: Tensor, *, observe: bool,
                 catalyst: bool = False) -> Tensor:
        """Logits of the new rows (of the last one only unless novelty is asked for), appended after the entries."""
        device, end = self.model.device, int(self._cache.get_seq_length()) + offsets.numel()
        with torch.no_grad(), ExitStack() as watching:
            if observe:
                watching.enter_context(observed_queries(self.model, self._add_mass))
            if self.rule.reading:
                watching.enter_context(observed_inputs(self.model, self._add_reading))
            # the mask always covers cache and input: without it transformers drops suffix tokens silently
            output = self.model(
                **inputs, past_key_values=self._cache, use_cache=True,
                attention_mask=torch.ones(1, end, dtype=torch.long, device=device),
                position_ids=(offsets.to(device) + self.next_position)[None],
                logits_to_keep=0 if self.rule.novelty and not catalyst else 1,
            )
        logits: Tensor = output.logits[0]
        return logits

    def _add_mass(self, layer: int, queries: Tensor) -> None:
        keys = self._cache.layers[layer].keys[0]
        scaling, softcap = self._scaling[layer]
        # a catalyst comes in pieces, whose sums are divided when all are there
        reduce = "sum" if self.rule.reduce == "mean" and self.rule.queries == "catalyst" else self.rule.reduce
        mass = attention_mass(queries, keys, scaling, reduce, softcap)
        if layer in self._mass:
            known = mass[:, : self._mass[layer].shape[1]]
            known.copy_(torch.maximum(known, self._mass[layer]) if self.rule.reduce == "max"
                        else known + self._mass[layer])
        self._mass[layer] = mass

    def _add_reading(self, layer: int, new: Reading) -> None:
        if layer in self._readings:
            old = self._readings[layer]
            cos, sin = (torch.cat(pair, dim=1)
                        for pair in zip(old.position_embeddings, new.position_embeddings, strict=True))
            new = replace(new, hidden_states=torch.cat([old.hidden_states, new.hidden_states], dim=1),
                          position_embeddings=(cos, sin))
        self._readings[layer] = new

    # -- distilling ----------------------------------------------------------------------------------------------

    def distil(self, keep: int) -> None:
        """Keep `keep` entries of every layer and kv head, and move them to positions 0..keep-1."""
        assert 1 <= keep <= self.size
        if self.rule.queries == "catalyst":
            self._read_catalyst()
        kept = []
        for number, layer in enumerate(self._cache.layers):  # layer by layer: one layer more than the pot at most
            places = self._distil_layer(number, layer, keep)
            if number in self._mass:
                self._mass[number] = self._mass[number].gather(1, places)
            kept.append(places)
        chosen = torch.stack(kept)
        self.indices = self.indices.gather(-1, chosen)
        if self.rule.novelty:
            self.novelty = self.novelty.gather(-1, chosen)
        self.positions = torch.arange(keep, device=self.positions.device)
        self.size = self.next_position = keep
        self._readings = {}

    def _read_catalyst(self) -> None:
        if not self.catalyst.repeats:
            self._mass = {}
        pending, drafted = [*self.catalyst.ids, *self._unrepeated], 0
        self._unrepeated = []
        begin = 0
        while begin < len(pending):
            step = torch.tensor(pending[begin : begin + self.step_tokens], device=self.model.device)
            logits = self._forward({"input_ids": step[None]}, torch.arange(begin, begin + len(step)), observe=True,
                                   catalyst=True)
            begin += len(step)
            if begin == len(pending) and drafted < self.catalyst.draft_tokens:
                token = int(logits[-1].argmax())
                if token not in self.catalyst.end_ids:
                    pending.append(token)
                    drafted += 1
        if self.rule.reduce == "mean":
            for layer, mass in self._mass.items():
                self._mass[layer] = mass / (len(pending) * self._group)

    def _distil_layer(self, number: int, layer: Any, keep: int) -> Tensor:
        # the catalyst's own entries are the last ones, if it was read
        keys, values = layer.keys[0, :, : self.size], layer.values[0, :, : self.size]
        mass = self._mass[number][:, : self.size] if number in self._mass else None
        entries = Entries(keys, values, self.indices[number], self.novelty[number] if self.rule.novelty else None,
                          mass, keep, self.num_read, number, self._readings.get(number))
        places = choose(self.rule, entries, sink=self.sink, recent=self.recent)
        rows = places[..., None].expand(-1, -1, keys.shape[-1])
        shift = torch.arange(keep, device=places.device) - self.positions[places]
        layer.keys = rotate_keys(keys.gather(1, rows), shift, self.rope)[None]
        layer.values = values.gather(1, rows)[None]
        return places


__all__ = ["ContextPot"]
