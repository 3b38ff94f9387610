"""The cache that writes in place holds what a DynamicCache holds, whatever is done to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from ctxcomp_rag.decoding.cache import RoomyLayer, keeps_all, new_cache
from tests.tiny_models import ARCHITECTURES, tiny_backbone


def entries(count: int, seed: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 2, count, 4, generator=generator), torch.randn(batch, 2, count, 4, generator=generator))


def same(mine: Any, plain: Any) -> bool:
    return torch.equal(mine.keys, plain.keys) and torch.equal(mine.values, plain.values)


@pytest.mark.parametrize("reserve", [0, 5, 1000])
def test_it_grows_as_a_dynamic_cache_does(reserve: int) -> None:
    mine, plain = RoomyLayer(reserve), DynamicCache()
    for seed, count in enumerate((3, 1, 1, 200, 1, 70)):
        got = mine.update(*entries(count, seed))
        expected = plain.update(*entries(count, seed), 0)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert mine.get_seq_length() == 276


def test_what_is_written_to_the_views_of_a_grown_layer_is_in_it() -> None:
    mine, plain = RoomyLayer(20), RoomyLayer(20)
    for seed, count in enumerate((3, 30)):
        keys, values = entries(count, seed)
        new_keys, new_values = mine.grow(count, keys[:, :, :1], values[:, :, :1])
        new_keys.copy_(keys)
        new_values.copy_(values)
        plain.update(keys, values)
        assert same(mine, plain)


def test_within_its_room_nothing_moves() -> None:
    layer = RoomyLayer(200)
    layer.update(*entries(40, 0))
    first = layer.keys
    layer.update(*entries(160, 1))
    assert layer.keys.data_ptr() == first.data_ptr()
    layer.update(*entries(1, 2))
    assert layer.keys.data_ptr() != first.data_ptr()


def test_rows_may_leave_entries_be_cut_and_tensors_be_replaced() -> None:
    mine, plain = DynamicCache(), DynamicCache()
    mine.layers = [RoomyLayer(50)]
    for cache in (mine, plain):
        cache.update(*entries(10, 0, batch=3), 0)
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.update(*entries(1, 1, batch=2), 0)
        layer: Any = cache.layers[0]
        layer.keys, layer.values = layer.keys[:, :, 4:], layer.values[:, :, 4:]
        cache.update(*entries(2, 2, batch=2), 0)
        cache.crop(-3)
        cache.update(*entries(5, 3, batch=2), 0)
        layer.keys = layer.keys.flip(2)
        cache.update(*entries(1, 4, batch=2), 0)
    assert same(mine.layers[0], plain.layers[0])


def test_two_caches_never_share_what_they_write_to() -> None:
    first, second = RoomyLayer(50), RoomyLayer(50)
    first.update(*entries(10, 0))
    second.update(first.keys, first.values)
    first.update(*entries(1, 1))
    second.update(*entries(1, 2))
    assert not torch.equal(first.keys[:, :, 10], second.keys[:, :, 10])
    assert torch.equal(first.keys[:, :, :10], second.keys[:, :, :10])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_that_forget_stay_what_they_are(name: str) -> None:
    backbone = tiny_backbone(name)
    plain, mine = DynamicCache(config=backbone.model.config), new_cache(backbone, 10)
    for theirs, ours in zip(plain.layers, mine.layers, strict=True):
        assert type(ours) is (RoomyLayer if type(theirs).__name__ == "DynamicLayer" else type(theirs))
    assert keeps_all(mine) == (name not in ("gemma2", "gemma3"))
