"""Time to first token and cache bytes of prompts, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, Part

_ONE_TOKEN = GenerationSettings(max_new_tokens=1)


def time_to_first_token(decoder: FrozenDecoder, prompts: Mapping[str, Sequence[Part] | Callable[[], Sequence[Part]]], *,
                        repeats: int = 7) -> dict[str, float]:
    """Median seconds from prompt parts to the first token, interleaved so that a busy machine slows all alike.

    Args:
        prompts: by name, the parts, or what fetches them (from an index, say) and is timed too.
    """
    return time_to_answer(decoder, prompts, _ONE_TOKEN, repeats=repeats)


def time_to_answer(decoder: FrozenDecoder, prompts: Mapping[str, Sequence[Part] | Callable[[], Sequence[Part]]],
                   settings: GenerationSettings, *, repeats: int = 7) -> dict[str, float]:
    """Like `time_to_first_token`, to the end of the answer."""
    times: dict[str, list[float]] = {name: [] for name in prompts}
    for repeat in range(repeats + 1):
        for name, parts in prompts.items():
            begin = time.perf_counter()
            decoder.generate(parts() if callable(parts) else parts, settings)
            if repeat:  # the first round warms caches up
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def cache_bytes(decoder: FrozenDecoder, positions: int) -> int:
    """Bytes of keys and values that a prompt of so many positions keeps in the decoder's cache."""
    b = decoder.backbone
    return 2 * int(b.config.num_hidden_layers) * b.num_kv_heads * b.head_dim * b.dtype.itemsize * positions
