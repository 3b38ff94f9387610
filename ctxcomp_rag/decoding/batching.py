"""Prefill of one or several spliced prompts into one left-padded cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.codes import write
from ctxcomp_rag.decoding.blend import additive_mask, blend
from ctxcomp_rag.decoding.cache import keeps_all, new_cache
from ctxcomp_rag.decoding.prefix import PrefixCache
from ctxcomp_rag.decoding.splice import BlendedRun, CachedRun, EmbeddedRun, SplicedPrompt
from ctxcomp_rag.rope import Rotation

_ROOM_FOR_ANSWER = 64
_LARGEST_MASK = 2**24  # elements


@dataclass
class DecodingState:
    """Everything the next step needs; row i belongs to request i of the batch.

    Attributes:
        logits: (rows, vocab_size) of the next token.
        cache: keys and values of all rows, left-padded to one length.
        mask: (rows, cache length), 1 where a cache entry is real.
        positions: (rows,) position of the next token.
    """

    logits: Tensor
    cache: DynamicCache
    mask: Tensor
    positions: Tensor

    def keep(self, rows: list[int]) -> None:
        """Drop the other rows, and the padding that only they needed: a batch that never empties stays bounded."""
        index = torch.tensor(rows, device=self.mask.device)
        self.logits, self.mask, self.positions = self.logits[index], self.mask[index], self.positions[index]
        padding = int(self.mask.any(0).int().argmax())
        layers: list[Any] = list(self.cache.layers)
        if padding and keeps_all(self.cache):  # other layers count what they have seen
            self.mask = self.mask[:, padding:]
            for layer in layers:
                layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]
        self.cache.batch_select_indices(index)  # copies: what was cut off is freed


def prefill(prompts: Sequence[SplicedPrompt], backbone: Backbone,
            prefixes: PrefixCache | None = None) -> DecodingState:
    """Run prompts through the decoder; logits are computed for the last row of each only.

    Args:
        prefixes: of this decoder; for prompts that are read one by one.
    """
    if all(len(p.runs) == 1 for p in prompts) and (prefixes is None or len(prompts) > 1 or not prompts[0].head):
        return _prefill_together(prompts, backbone)
    states = [_prefill_alone(p, backbone, prefixes) for p in prompts]
    return states[0] if len(states) == 1 else merge(states, backbone)


def all_logits(prompt: SplicedPrompt, backbone: Backbone) -> Tensor:
    """Logits (embedded rows, vocab_size) at every row that goes through the decoder."""
    return _read(prompt, backbone, keep_all=True)[0]


def step(state: DecodingState, tokens: list[int], backbone: Backbone) -> None:
    """Feed one token to every row."""
    ids = torch.tensor(tokens, device=backbone.device)[:, None]
    state.mask = torch.cat([state.mask, state.mask.new_ones(len(tokens), 1)], dim=1)
    state.logits = _forward(backbone, backbone.embed(ids), state.positions[:, None], state.mask, state.cache, 1)[:, -1]
    state.positions = state.positions + 1


def extend(state: DecodingState, tokens: list[int], backbone: Backbone) -> Tensor:
    """Feed several tokens to the only row; logits (tokens, vocab_size) after each of them."""
    ids = torch.tensor([tokens], device=backbone.device)
    positions = state.positions[:, None] + torch.arange(len(tokens), device=backbone.device)
    state.mask = torch.cat([state.mask, state.mask.new_ones(1, len(tokens))], dim=1)
    logits = _forward(backbone, backbone.embed(ids), positions, state.mask, state.cache, 0)[0]
    state.logits, state.positions = logits[-1:], state.positions + len(tokens)
    return logits


def retract(state: DecodingState, count: int) -> None:
    """Forget the last tokens of the only row. Its logits are no longer those of the next token."""
    if count:
        state.cache.crop(-count)
        state.mask, state.positions = state.mask[:, :-count], state.positions - count


def merge(states: Sequence[DecodingState], backbone: Backbone) -> DecodingState:
    """One state of the rows of several, left-padded to one length. Keys are rotated already: padding moves nothing.

    Only for models whose layers all keep every position (`require_full_attention`).
    """
    width = max(s.mask.shape[1] for s in states)
    cache = new_cache(backbone)

    def padded(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))

    caches: list[list[Any]] = [list(s.cache.layers) for s in states]
    for number, layers in enumerate(zip(*caches, strict=True)):
        cache.update(torch.cat([padded(layer.keys) for layer in layers]),
                     torch.cat([padded(layer.values) for layer in layers]), number)
    masks = [torch.nn.functional.pad(s.mask, (width - s.mask.shape[1], 0)) for s in states]
    return DecodingState(torch.cat([s.logits for s in states]), cache, torch.cat(masks),
                         torch.cat([s.positions for s in states]))


def _forward(backbone: Backbone, embeds: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache,
             logits_to_keep: int) -> Tensor:
    # The mask always covers cache and input: without it transformers drops suffix tokens silently, and takes
    # positions with gaps for several packed sequences.
    logits: Tensor = backbone.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions,
                                    past_key_values=cache, use_cache=True, logits_to_keep=logits_to_keep).logits
    return logits


def _read(prompt: SplicedPrompt, backbone: Backbone, *, keep_all: bool) -> tuple[Tensor, DynamicCache]:
    if _fits_one_pass(prompt):
        return read_at_once(prompt, backbone, keep_all=keep_all)
    return read_in_turn(prompt, backbone, keep_all=keep_all)


def _fits_one_pass(prompt: SplicedPrompt) -> bool:
    embedded = [run.embeds.shape[0] for run in prompt.runs if isinstance(run, EmbeddedRun)]
    small = sum(embedded) * prompt.length <= _LARGEST_MASK
    return len(embedded) > 1 and small and not any(isinstance(run, BlendedRun) for run in prompt.runs)


def read_at_once(prompt: SplicedPrompt, backbone: Backbone, *, keep_all: bool) -> tuple[Tensor, DynamicCache]:
    """All rows between cached runs in one pass: every pass reads all weights, be it for a single line break.

    The cached entries come first in the cache, whatever their places. Keys carry their positions, so attention does
    not care; the mask lets each row see what stands before it in the prompt. Not for prompts with blended runs.

    Returns:
        Logits (embedded rows, vocab_size), or (1, vocab_size) of the last row only; the cache.
    """
    cache = new_cache(backbone, prompt.length + _ROOM_FOR_ANSWER)
    places: list[Tensor] = []
    cached: list[CachedRun] = []
    rows: list[EmbeddedRun] = []
    row_places: list[Tensor] = []
    seen = 0
    for run in prompt.runs:
        assert not isinstance(run, BlendedRun)
        count = run.embeds.shape[0] if isinstance(run, EmbeddedRun) else run.num_entries
        place = torch.arange(seen, seen + count, device=backbone.device)
        seen += count
        if isinstance(run, EmbeddedRun):
            rows.append(run)
            row_places.append(place)
            continue
        places.append(place)
        cached.append(run)
    append(cached, cache, backbone)
    standing = torch.cat(row_places)
    visible = torch.cat([*places, standing]) <= standing[:, None]
    logits = _forward(backbone, torch.cat([run.embeds for run in rows])[None],
                      torch.cat([run.positions for run in rows])[None], additive_mask(visible, backbone.dtype), cache,
                      0 if keep_all else 1)
    return logits[0], cache


def read_in_turn(prompt: SplicedPrompt, backbone: Backbone, *, keep_all: bool) -> tuple[Tensor, DynamicCache]:
    """One pass for each embedded run; what `read_at_once` is tested against."""
    cache = new_cache(backbone, prompt.length + _ROOM_FOR_ANSWER)
    seen = 0
    kept: list[Tensor] = []
    waiting: list[CachedRun] = []
    for number, run in enumerate(prompt.runs):
        if isinstance(run, CachedRun):
            seen += run.num_entries
            waiting.append(run)
            continue
        append(waiting, cache, backbone)
        waiting.clear()
        if isinstance(run, BlendedRun):
            seen += run.cached.num_entries
            blend(run, cache, backbone)
            continue
        seen += run.embeds.shape[0]
        mask = torch.ones(1, seen, dtype=torch.long, device=backbone.device)
        logits = _forward(backbone, run.embeds[None], run.positions[None], mask, cache, 0 if keep_all else 1)
        if keep_all or number == len(prompt.runs) - 1:
            kept.append(logits[0])
    return torch.cat(kept), cache


def append(runs: Sequence[CachedRun], cache: DynamicCache, backbone: Backbone) -> None:
    """Runs that stand one after the other: together they take the calls of one.

    Layer by layer, decoded and moved where the cache keeps them: all layers at once would copy the spans once more.
    """
    if not runs:
        return
    count, heads, head_dim = sum(run.num_entries for run in runs), backbone.num_kv_heads, backbone.head_dim
    rotation = Rotation.joined([(run.rotation, run.num_entries) for run in runs])
    like = torch.empty(1, heads, 0, head_dim, dtype=backbone.dtype, device=backbone.device)
    unmoved = like.new_empty(heads, count, head_dim)  # the same memory for every layer: it stays in fast caches
    layers: list[Any] = list(cache.layers)
    for number, layer in enumerate(layers):
        keys, values = (grown[0] for grown in layer.grow(count, like, like))
        write((run.values[number] for run in runs), values, dim=1)
        write((run.keys[number] for run in runs), keys if rotation is None else unmoved, dim=1)
        if rotation is not None:
            rotation(unmoved, out=keys)


def _prefill_alone(prompt: SplicedPrompt, backbone: Backbone, prefixes: PrefixCache | None) -> DecodingState:
    prompt = prefixes.begin(prompt) if prefixes is not None else prompt
    logits, cache = _read(prompt, backbone, keep_all=False)
    if prefixes is not None and prompt.head:
        stored = [run.num_entries for run in prompt.runs if isinstance(run, CachedRun)]
        prefixes.keep(prompt, cache, sum(stored) if _fits_one_pass(prompt) else 0)
    mask = torch.ones(1, prompt.length, dtype=torch.long, device=backbone.device)
    return DecodingState(logits[-1:], cache, mask, torch.tensor([prompt.next_position], device=backbone.device))


def _prefill_together(prompts: Sequence[SplicedPrompt], backbone: Backbone) -> DecodingState:
    runs = [p.runs[0] for p in prompts]
    width = max(p.length for p in prompts)
    device = backbone.device
    embeds = torch.zeros(len(prompts), width, backbone.hidden_size, dtype=backbone.dtype, device=device)
    positions = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    mask = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    for row, run in enumerate(runs):
        assert isinstance(run, EmbeddedRun)
        n = run.embeds.shape[0]
        embeds[row, width - n :], positions[row, width - n :], mask[row, width - n :] = run.embeds, run.positions, 1
    cache = new_cache(backbone, width + _ROOM_FOR_ANSWER)
    logits = _forward(backbone, embeds, positions, mask, cache, 1)[:, -1]
    return DecodingState(logits, cache, mask, torch.tensor([p.next_position for p in prompts], device=device))
