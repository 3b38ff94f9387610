"""One answer in the making, step by step, so that each step can be timed: spliced by the package, or bare.

The bare runs are what a program without this package would do: the model of transformers, its cache, `argmax`. They are
the baselines, and with rows or cache entries that lie ready in memory they are the ideal that a splice can reach.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, Part
from ctxcomp_rag.decoding.loop import Request


class Run(ABC):
    """`assemble`, then `first`, then `following` once a token. `positions` counts the prompt's, when assembled."""

    positions: int = 0

    def assemble(self) -> None:  # noqa: B027 - bare runs have nothing to assemble
        """Fetch what is read and lay it out."""

    @abstractmethod
    def first(self) -> None:
        """Read the prompt, up to the first token."""

    @abstractmethod
    def following(self) -> None:
        """One more token."""

    def finish(self) -> None:  # noqa: B027
        """Put back what a later run needs; not timed."""


class SplicedRun(Run):
    """An answer by `FrozenDecoder`, its parts fetched by `fetch`. The decoder must have no end ids that occur."""

    def __init__(self, decoder: FrozenDecoder, fetch: Callable[[], Sequence[Part]], new_tokens: int) -> None:
        self.decoder, self.fetch = decoder, fetch
        self.settings = GenerationSettings(max_new_tokens=new_tokens)

    def assemble(self) -> None:
        self.request: Request = self.decoder.request(self.fetch(), self.settings)
        self.positions = self.request.prompt.usage.positions

    def first(self) -> None:
        self.loop = self.decoder.loop()
        self.loop.admit([self.request])
        self.loop.advance()

    def following(self) -> None:
        self.loop.advance()


class BareRun(Run):
    """The model alone. `read` feeds the prompt to the model with a cache and returns logits (1, n, vocab_size).

    Args:
        cache: what is in the cache before, made when the run is assembled (not timed: see `bare_cache`).
    """

    def __init__(self, backbone: Backbone, read: Tensor, cache: DynamicCache | None = None) -> None:
        self.model: Any = backbone.model
        self.read = read
        self.cache: Any = cache if cache is not None else DynamicCache(config=backbone.model.config)
        self.before = int(self.cache.get_seq_length())
        self.positions = self.before + int(read.shape[1])

    @torch.inference_mode()
    def first(self) -> None:
        name = "inputs_embeds" if self.read.is_floating_point() else "input_ids"
        self._step(**{name: self.read})

    @torch.inference_mode()
    def following(self) -> None:
        self._step(input_ids=self.token)

    def _step(self, **inputs: Tensor) -> None:
        logits = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token = logits[:, -1:].argmax(-1)


class PrefixRun(BareRun):
    """A prompt over a cache of the prompts before it: what they have in common at the start is not read again.

    Args:
        kept: ids and cache of an earlier prompt; the cache is this run's to use, and is cut back in `finish`.
    """

    def __init__(self, backbone: Backbone, ids: Sequence[int], kept: tuple[Sequence[int], DynamicCache]) -> None:
        shared = 0
        while shared < min(len(ids) - 1, len(kept[0])) and ids[shared] == kept[0][shared]:
            shared += 1
        self.shared = shared
        cache = kept[1] if shared else DynamicCache(config=backbone.model.config)
        _cut(cache, shared)
        super().__init__(backbone, torch.tensor([list(ids[shared:])], device=backbone.device), cache)

    def finish(self) -> None:
        if self.shared:
            _cut(self.cache, self.shared)


def _cut(cache: DynamicCache, entries: int) -> None:
    surplus = int(cache.get_seq_length()) - entries
    if surplus:
        cache.crop(-surplus)


def bare_cache(backbone: Backbone, entries: int) -> DynamicCache:
    """A cache of `entries` random entries: what was read long ago costs nothing but its place."""
    cache = DynamicCache(config=backbone.model.config)
    shape = (1, backbone.num_kv_heads, entries, backbone.head_dim)
    for layer in range(int(backbone.config.num_hidden_layers)):
        cache.update(torch.randn(shape, dtype=backbone.dtype, device=backbone.device),
                     torch.randn(shape, dtype=backbone.dtype, device=backbone.device), layer)
    return cache


@torch.inference_mode()
def read_cache(backbone: Backbone, ids: Sequence[int]) -> DynamicCache:
    """The cache after reading `ids`."""
    run = BareRun(backbone, torch.tensor([list(ids)], device=backbone.device))
    run.first()
    cache: DynamicCache = run.cache
    return cache
