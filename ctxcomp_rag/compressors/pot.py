"""A cache of bounded size that reads a text of any length: fill it, distil it, go on (InfiniPot's CCD).

    read 0..7        [t0 t1 t2 t3 t4 t5 t6 t7]
    distil to 3      [t0 t5 t6]                    chosen by a scoring rule, per layer and kv head
                      0  1  2                      moved to consecutive positions, order kept (CR-RoPE)
    read 8..12       [t0 t5 t6 t8 t9 t10 t11 t12]  new tokens stand and go on from there
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ctxcomp_rag.compressors.attention import attention_layers, attention_mass, observed_queries, scaling_of
from ctxcomp_rag.compressors.kv_scores import Entries, ScoringRule, choose
from ctxcomp_rag.rope import RotaryPositions, rotate_keys


class ContextPot:
    """The cache of one text on its way through.

    Entries stand at positions 0..size-1 at all times. Everything that is kept per entry is kept per layer and kv
    head, because after a distillation heads hold different tokens.

    Args:
        model: the decoder; hooks are set on it while queries are observed (see `observed_queries`).
        rope: its rotary frequencies.
        rule: which entries to keep.
        catalyst: token ids of the catalyst prompt; never part of the pot afterwards.
        step_tokens: longest piece of text in one forward pass; bounds activations and logits.
        sink, recent: entries at either end that are always kept (see `choose`).

    Attributes:
        size: entries in the pot.
        indices: (num_layers, num_kv_heads, size) place of each entry's token in the text.
        novelty: (num_layers, num_kv_heads, size) -log p of each entry's token given the pot as it was when the
            token was read, inf for the first token of all. An entry keeps its number for as long as it stays. The
            first token after a distillation is foretold by the logits of the token before it.
    """

    def __init__(self, model: PreTrainedModel, rope: RotaryPositions, rule: ScoringRule, *, catalyst: Sequence[int],
                 step_tokens: int, sink: int = 0, recent: int = 0) -> None:
        self.model, self.rope, self.rule = model, rope, rule
        self.catalyst, self.step_tokens = list(catalyst), step_tokens
        self.sink, self.recent = max(sink, rule.sink), max(recent, rule.recent)
        self.size = self.num_read = 0
        self._cache: Any = DynamicCache(config=model.config)
        self._scaling = [scaling_of(a) for a in attention_layers(model)] if rule.queries != "none" else []
        config = model.config.get_text_config()
        self._shape = (int(config.num_hidden_layers),
                       int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads))
        self.indices = torch.empty(*self._shape, 0, dtype=torch.int64, device=model.device)
        self.novelty = torch.empty(*self._shape, 0, device=model.device)
        self._mass: dict[int, Tensor] = {}
        self._foretold: Tensor | None = None

    @property
    def keys(self) -> list[Tensor]:
        """Keys of each layer, (num_kv_heads, size, head_dim)."""
        return [layer.keys[0] for layer in self._cache.layers]

    @property
    def values(self) -> list[Tensor]:
        """Values of each layer, (num_kv_heads, size, head_dim)."""
        return [layer.values[0] for layer in self._cache.layers]

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, ids: Sequence[int]) -> None:
        """Append tokens. What a "window" rule sees are the last tokens of one such piece."""
        if self.rule.queries != "all":  # only heavy hitters remember the attention of pieces before
            self._mass = {}
        last = min(self.rule.window, len(ids)) if self.rule.queries == "window" else 0
        ends = [*range(self.step_tokens, len(ids) - last, self.step_tokens), len(ids) - last, len(ids)]
        begin = 0
        for end in ends:
            if end > begin:
                in_window = self.rule.queries == "window" and begin >= len(ids) - last
                self._read_step(list(ids[begin:end]), observe=in_window or self.rule.queries == "all")
            begin = end

    def _read_step(self, ids: list[int], *, observe: bool) -> None:
        logits = self._forward(ids, observe=observe, all_logits=self.rule.novelty)
        if self.rule.novelty:
            self._extend_novelty(ids, logits)
        new = torch.arange(self.num_read, self.num_read + len(ids), device=self.indices.device)
        self.indices = torch.cat([self.indices, new.expand(*self._shape, -1)], dim=-1)
        self.size += len(ids)
        self.num_read += len(ids)

    def _extend_novelty(self, ids: list[int], logits: Tensor) -> None:
        before = self._foretold[None] if self._foretold is not None else logits[:1]
        foretelling = torch.cat([before, logits[:-1]])
        new = torch.nn.functional.cross_entropy(foretelling.float(), torch.tensor(ids, device=logits.device),
                                                reduction="none")
        if self._foretold is None:
            new[0] = torch.inf
        self._foretold = logits[-1].clone()
        self.novelty = torch.cat([self.novelty, new.expand(*self._shape, -1)], dim=-1)

    def _forward(self, ids: list[int], *, observe: bool, all_logits: bool) -> Tensor:
        """Logits of the new tokens (of the last one only unless `all_logits`), appended after the entries there."""
        device, end = self.model.device, self.size + len(ids)
        watching: AbstractContextManager[None] = (
            observed_queries(self.model, self._add_mass) if observe else nullcontext())
        with torch.no_grad(), watching:
            # the mask always covers cache and input: without it transformers drops suffix tokens silently
            output = self.model(
                input_ids=torch.tensor([ids], device=device), past_key_values=self._cache, use_cache=True,
                attention_mask=torch.ones(1, end, dtype=torch.long, device=device),
                position_ids=torch.arange(self.size, end, device=device)[None],
                logits_to_keep=0 if all_logits else 1,
            )
        logits: Tensor = output.logits[0]
        return logits

    def _add_mass(self, layer: int, queries: Tensor) -> None:
        keys = self._cache.layers[layer].keys[0]
        mass = attention_mass(queries, keys, self._scaling[layer], self.rule.reduce)
        if layer in self._mass:
            known = mass[:, : self._mass[layer].shape[1]]
            known.copy_(torch.maximum(known, self._mass[layer]) if self.rule.reduce == "max"
                        else known + self._mass[layer])
        self._mass[layer] = mass

    # -- distilling ----------------------------------------------------------------------------------------------

    def distil(self, keep: int) -> None:
        """Keep `keep` entries of every layer and kv head, and move them to positions 0..keep-1."""
        assert 1 <= keep <= self.size
        if self.rule.queries == "catalyst":
            self._mass = {}
            self._forward(self.catalyst, observe=True, all_logits=False)
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
        self.size = keep

    def _distil_layer(self, number: int, layer: Any, keep: int) -> Tensor:
        # the catalyst's own entries are the last ones, if it was read
        keys, values = layer.keys[0, :, : self.size], layer.values[0, :, : self.size]
        mass = self._mass[number][:, : self.size] if number in self._mass else None
        entries = Entries(keys, values, self.indices[number], self.novelty[number] if self.rule.novelty else None,
                          mass, keep, self.num_read, number)
        places = choose(self.rule, entries, sink=self.sink, recent=self.recent)
        rows = places[..., None].expand(-1, -1, keys.shape[-1])
        shift = torch.arange(keep, device=places.device) - places
        layer.keys = rotate_keys(keys.gather(1, rows), shift, self.rope)[None]
        layer.values = values.gather(1, rows)[None]
        return places


__all__ = ["ContextPot"]
