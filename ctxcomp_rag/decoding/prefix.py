"""The text before the first span, read once: a template's beginning and a system prompt are the same in many prompts.

What stands first sees nothing else, so its keys and values are those of every prompt that begins with it.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, Final

import torch
from cachetools import LRUCache
from transformers import DynamicCache

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding.cache import keeps_all, new_cache
from ctxcomp_rag.decoding.splice import CachedRun, EmbeddedRun, SplicedPrompt

_BYTES: Final = 2**26


class PrefixCache:
    """Keys and values of prompts' heads (`SplicedPrompt.head`), for one decoder. Thread-safe.

    The least recently used go first. Decoders with layers that forget keep none.

    Args:
        max_bytes: of main memory.

    Attributes:
        hits, misses: prompts with a head, since the start.
    """

    def __init__(self, backbone: Backbone, max_bytes: int = _BYTES) -> None:
        self.hits = self.misses = 0
        self._usable = keeps_all(new_cache(backbone))
        self._kept: LRUCache[tuple[int, ...], CachedRun] = LRUCache(
            max_bytes, getsizeof=lambda run: run.keys.nbytes + run.values.nbytes)
        self._lock = threading.Lock()

    def begin(self, prompt: SplicedPrompt) -> SplicedPrompt:
        """The prompt with its head as entries, where they are known."""
        if not prompt.head or not self._usable:
            return prompt
        with self._lock:
            known = self._kept.get(prompt.head)
            self.hits, self.misses = self.hits + (known is not None), self.misses + (known is None)
        if known is None:
            return prompt
        first, *others = prompt.runs
        assert isinstance(first, EmbeddedRun)
        length = len(prompt.head)
        rest = [EmbeddedRun(first.embeds[length:], first.positions[length:])] if len(first.embeds) > length else []
        return replace(prompt, runs=(known, *rest, *others), head=())

    def keep(self, prompt: SplicedPrompt, cache: DynamicCache, start: int) -> None:
        """Remember the head of a prompt that was read into `cache`, where it stands from entry `start` on."""
        layers: list[Any] = list(cache.layers)
        if not prompt.head or not self._usable:
            return
        stretch = slice(start, start + len(prompt.head))
        run = CachedRun(torch.stack([layer.keys[0, :, stretch] for layer in layers]),
                        torch.stack([layer.values[0, :, stretch] for layer in layers]))
        with self._lock:
            if run.keys.nbytes + run.values.nbytes <= self._kept.maxsize:
                self._kept[prompt.head] = run


__all__ = ["PrefixCache"]
