"""Moving rotated keys, against NVIDIA kvpress and the rotary embedding of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from ctxcomp_rag.rope import RotaryPositions, rotate_keys

SHORT, LONG, PLACED = 2e-5, 2e-4, 5e-4


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(params=["default", "llama3", "yarn"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def meta(golden: Path, kind: str) -> dict[str, Any]:
    return json.loads((golden / "rerotation" / "meta.json").read_text())[kind]


@pytest.fixture
def tensors(golden: Path, kind: str) -> dict[str, Tensor]:
    return load_file(golden / "rerotation" / f"{kind}.safetensors")


def rope_of(meta: dict[str, Any], case: str) -> RotaryPositions:
    fields = dict(meta["cases"][case]["config"])
    return RotaryPositions.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))


def gathered(rows: Tensor, indices: Tensor) -> Tensor:
    """Rows (heads, n, d) picked by indices (heads, k), or by one set of indices (k,) for all heads."""
    return rows[torch.arange(len(rows))[:, None], indices.expand(len(rows), -1)]


def moved(rows: Tensor, old: Tensor, new: Tensor, meta: dict[str, Any], case: str = "short") -> Tensor:
    return rotate_keys(rows, new - old, rope_of(meta, case))


def test_frequencies(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for case, name in (("short", "inv_freq"), ("long", "long.inv_freq")):
        rope = rope_of(meta, case)
        assert difference(rope.inv_freq, tensors[name]) <= 1e-6 * tensors[name].max().item()
        assert rope.attention_scaling == pytest.approx(meta["attention_scaling"], abs=1e-6)


def test_kept_indices_and_values(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    kept = meta["cases"]["short"]["kept"]
    indices = tensors["scores"].topk(kept).indices.sort().values
    assert indices.equal(tensors["per_head.indices"])
    assert gathered(tensors["values"], indices).equal(tensors["per_head.expected_values"])


@pytest.mark.parametrize("which", ["per_head", "shared"])
def test_kept_keys_close_ranks(which: str, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    indices = tensors[f"{which}.indices"]
    keys = gathered(tensors["keys_post_rope"], indices)
    result = moved(keys, indices, torch.arange(indices.shape[-1]), meta)
    assert difference(result, tensors[f"{which}.expected_keys"]) <= SHORT


def test_all_keys_move_to_a_far_place(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    keys, places = tensors["keys_post_rope"], tensors["placed.new_positions"]
    result = moved(keys, torch.arange(keys.shape[1]), places, meta)
    assert difference(result, tensors["placed.expected_keys"]) <= PLACED


def test_keys_come_back_from_far_places(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    places = tensors["long.kept_positions"]
    result = moved(tensors["long.kept_keys_post_rope"], places, torch.arange(len(places)), meta, "long")
    assert difference(result, tensors["long.expected_keys"]) <= LONG


def test_unrotated_keys_get_their_first_rotation_with_the_scaling(meta: dict[str, Any],
                                                                  tensors: dict[str, Tensor]) -> None:
    """The other way to the same keys: rotate the unrotated ones at the new places; the factor goes on once."""
    rope = rope_of(meta, "short")
    places = torch.arange(tensors["shared.indices"].numel())
    kept = gathered(tensors["keys_pre_rope"], tensors["shared.indices"])
    near = rotate_keys(kept, places, rope) * rope.attention_scaling
    assert difference(near, tensors["shared.expected_keys"]) <= SHORT
    far = rotate_keys(tensors["keys_pre_rope"], tensors["placed.new_positions"], rope) * rope.attention_scaling
    assert difference(far, tensors["placed.expected_keys"]) <= PLACED


def test_keys_left_where_they_were_are_seen(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    left = gathered(tensors["keys_post_rope"], tensors["shared.indices"])
    assert difference(left, tensors["shared.expected_keys"]) > 1000 * SHORT
