"""A cache that writes new entries in place: a `DynamicCache` copies all of it for every span and every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ctxcomp_rag.backbone import Backbone

_ROOM = 64  # entries to grow by: one copy of the cache in as many tokens


class RoomyLayer(DynamicLayer):
    """A layer whose keys and values are the front of larger tensors.

    `keys` and `values` may be replaced or cut from outside; what does not lie at the front any more is moved at the
    next update. A layer that was cut short writes over what was cut off, so nobody may keep views of that.

    Args:
        reserve: entries to make room for at first.
    """

    def __init__(self, reserve: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reserve = reserve
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.grow(key_states.shape[-2], key_states, value_states)
        keys.copy_(key_states)
        values.copy_(value_states)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def grow(self, count: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`count` more entries: views (batch, num_kv_heads, count, head_dim) of keys and values, to be written to.

        Args:
            keys, values: tensors of the same sizes, whatever their number of entries.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        before = self.get_seq_length()
        after = before + count
        buffers = self._with_room(keys, values, before, after)
        self.keys, self.values = (buffer[:, :, :after] for buffer in buffers)
        return buffers[0][:, :, before:after], buffers[1][:, :, before:after]

    def _with_room(self, key_states: Tensor, value_states: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
        buffers, (keys, values) = self._buffers, (self.keys, self.values)
        assert keys is not None
        assert values is not None
        if buffers is not None and after <= buffers[0].shape[2] and all(
                _at_front(held, buffer) for held, buffer in zip((keys, values), buffers, strict=True)):
            return buffers
        room = max(self.reserve, after + _ROOM)
        made = []
        for held, states in ((keys, key_states), (values, value_states)):
            buffer = states.new_empty(*states.shape[:2], room, states.shape[3])
            if before:
                buffer[:, :, :before] = held
            made.append(buffer)
        self._buffers = made[0], made[1]
        return self._buffers

    def reset(self) -> None:
        self._buffers = None
        super().reset()


def _at_front(held: Tensor, buffer: Tensor) -> bool:
    return (held.data_ptr() == buffer.data_ptr() and held.stride() == buffer.stride()
            and held.shape[:2] == buffer.shape[:2])


def new_cache(backbone: Backbone, reserve: int = 0) -> DynamicCache:
    """An empty cache for the decoder, with room for `reserve` entries in the layers that keep all of them."""
    cache = DynamicCache(config=backbone.model.config)
    cache.layers = [RoomyLayer(reserve) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keeps_all(cache: DynamicCache) -> bool:
    """Whether every layer keeps all entries."""
    return all(type(layer) in (DynamicLayer, RoomyLayer) for layer in cache.layers)


__all__ = ["RoomyLayer", "keeps_all", "new_cache"]
