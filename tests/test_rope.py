"""Cached keys can be moved: a chunk read at position 0 has, once rotated, the keys it would have had elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    FalconConfig,
    GPTNeoXConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    StableLmConfig,
)

from ctxcomp_rag.errors import UnsupportedModelError
from ctxcomp_rag.rope import RotaryPositions, Rotation, rope_fingerprint, rotate_keys
from tests.tiny_models import FULL_ATTENTION_ROPE, tiny_config, tiny_model

PARTIAL = {"vocab_size": 289, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2}
CONFIGS: dict[str, PreTrainedConfig] = {
    **{name: tiny_config(name) for name in FULL_ATTENTION_ROPE},
    "llama linear": tiny_config("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama llama3": tiny_config("llama", rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}),
    "qwen3 yarn": tiny_config("qwen3", rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}),
    "phi3 partial": tiny_config("phi3", head_dim=16, hidden_size=64, partial_rotary_factor=0.5),
    "stablelm partial": StableLmConfig(**PARTIAL, num_key_value_heads=2, partial_rotary_factor=0.25),
    "gpt-neox partial": GPTNeoXConfig(**PARTIAL, rotary_pct=0.25),
}


def keys_at(model: PreTrainedModel, ids: Tensor, offset: int) -> list[Tensor]:
    """Keys (num_kv_heads, n, head_dim) of every layer, of a text that stands at an offset and sees only itself."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[None], position_ids=torch.arange(len(ids))[None] + offset, past_key_values=cache,
              attention_mask=torch.ones(1, len(ids), dtype=torch.long), use_cache=True)
    return [layer.keys[0] for layer in cache.layers]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("offset", [1, 37, 400])
def test_chunk_read_at_zero_moves_to_any_offset(name: str, offset: int) -> None:
    model = tiny_model(CONFIGS[name]).eval()
    rope = RotaryPositions.from_config(model.config)
    ids = torch.randint(0, 280, (20,), generator=torch.Generator().manual_seed(offset))
    at_zero, in_place = keys_at(model, ids, 0), keys_at(model, ids, offset)
    assert len(at_zero) == model.config.num_hidden_layers
    for here, there in zip(at_zero, in_place, strict=True):
        assert (here - there).abs().max() > 0.01  # the rotation matters at this size
        torch.testing.assert_close(rotate_keys(here, offset, rope), there, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_are_those_of_the_model(name: str) -> None:
    model = tiny_model(CONFIGS[name])
    embedding = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    rope = RotaryPositions.from_config(model.config)
    torch.testing.assert_close(rope.inv_freq, embedding.inv_freq, atol=0, rtol=1e-6)
    assert rope.attention_scaling == pytest.approx(embedding.attention_scaling)


def test_partial_rotation_leaves_the_rest_of_the_head_alone() -> None:
    rope = RotaryPositions.from_config(CONFIGS["stablelm partial"])
    assert rope.rotary_dim == 4
    keys = torch.randn(2, 5, 16)
    moved = rotate_keys(keys, 9, rope)
    assert moved[..., 4:].equal(keys[..., 4:])
    assert not moved[..., :4].isclose(keys[..., :4]).all()


def test_every_slot_and_head_may_move_by_its_own_distance() -> None:
    rope = RotaryPositions.from_config(CONFIGS["llama"])
    keys = torch.randn(3, 4, 8)
    shift = torch.arange(12).reshape(3, 4) - 5
    moved = rotate_keys(keys, shift, rope)
    for head in range(3):
        for slot in range(4):
            alone = rotate_keys(keys[head, slot][None], int(shift[head, slot]), rope)[0]
            torch.testing.assert_close(moved[head, slot], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "stablelm partial"])
def test_slots_of_several_spans_move_together_as_they_do_alone(name: str, dtype: torch.dtype) -> None:
    rope = RotaryPositions.from_config(CONFIGS[name])
    shifts, counts, head_dim = (0, 7, 0, 400), (2, 3, 1, 4), 16 if "partial" in name else 8
    spans = [torch.randn(2, n, head_dim).to(dtype) for n in counts]
    device = torch.device("cpu")
    joined = Rotation.joined([(Rotation.by(shift, n, rope, device) if shift else None, n)
                              for shift, n in zip(shifts, counts, strict=True)])
    assert joined is not None
    into = torch.full((2, sum(counts) + 2, head_dim), torch.nan, dtype=dtype)
    moved = joined(torch.cat(spans, dim=1), out=into[:, 1:-1])
    expected = torch.cat([rotate_keys(keys, shift, rope) for keys, shift in zip(spans, shifts, strict=True)], dim=1)
    assert moved.equal(expected)
    assert into[:, 1:-1].equal(expected)
    assert bool(into[:, [0, -1]].isnan().all())
    assert Rotation.joined([(None, 2), (None, 1)]) is None


@pytest.mark.parametrize("name", ["llama", "stablelm partial"])
def test_gradients_flow_through_a_move(name: str) -> None:
    rope = RotaryPositions.from_config(CONFIGS[name])
    keys = torch.randn(2, 5, 16 if "partial" in name else 8, requires_grad=True)
    weights = torch.randn(keys.shape)
    (rotate_keys(keys, 9, rope) * weights).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(keys.grad, rotate_keys(weights, -9, rope))  # a rotation's transpose is its inverse


def test_moving_there_and_back_changes_nothing_but_rounding() -> None:
    rope = RotaryPositions.from_config(CONFIGS["llama"])
    keys = torch.randn(2, 6, 8)
    torch.testing.assert_close(rotate_keys(rotate_keys(keys, 1000, rope), -1000, rope), keys, atol=2e-6, rtol=0)
    assert rotate_keys(keys, 0, rope) is keys


def test_bfloat16_keys_are_rotated_in_float32() -> None:
    rope = RotaryPositions.from_config(CONFIGS["llama"])
    keys = torch.randn(2, 6, 8).bfloat16()
    moved = rotate_keys(keys, 301, rope)
    assert moved.dtype == torch.bfloat16
    assert moved.equal(rotate_keys(keys.float(), 301, rope).bfloat16())


HALF_HEAD = [1.0] * 4
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "dynamic NTK": (tiny_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
                    "the frequencies of RoPE type 'dynamic' depend on the length of the prompt"),
    "longrope": (tiny_config("phi3", original_max_position_embeddings=128, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": HALF_HEAD, "long_factor": HALF_HEAD}),
        "the frequencies of RoPE type 'longrope' depend on the length of the prompt"),
    "gemma2": (tiny_config("gemma2"), r"it has sliding-window layers \(window 16\), which drop old keys"),
    "gemma3": (tiny_config("gemma3"), r"it has sliding-window layers \(window 16\)"),
    "mistral with a window": (tiny_config("mistral", sliding_window=32), r"sliding-window layers \(window 32\)"),
    "qwen2 with a window": (tiny_config("qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=1),
                            r"sliding-window layers \(window 32\)"),
    "qwen3-next": (Qwen3NextConfig(num_hidden_layers=4), "it has linear-attention layers .* keep a state and no keys"),
    "gpt2": (tiny_config("gpt2"), "it has no rotary embedding"),
    "falcon with ALiBi": (FalconConfig(alibi=True), r"it has no rotary embedding \(learned positions, ALiBi or none\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_architecture_whose_keys_cannot_be_moved_is_refused_with_the_reason(name: str) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=rf"keys of '{config.model_type}' cannot be moved .*{reason}"):
        RotaryPositions.from_config(config)


def test_unused_window_is_no_window() -> None:
    rope = RotaryPositions.from_config(tiny_config("qwen2", use_sliding_window=False, sliding_window=32))
    assert rope.rotary_dim == 8


@pytest.mark.parametrize("changes", [{"rope_theta": 5e5}, {"rope_type": "linear", "factor": 2.0}])
def test_fingerprint_names_the_frequencies(changes: dict[str, Any]) -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e4}
    plain = tiny_config("llama", rope_parameters=parameters)
    assert rope_fingerprint(plain) == rope_fingerprint(tiny_config("llama", rope_parameters=dict(parameters)))
    assert rope_fingerprint(plain) != rope_fingerprint(tiny_config("llama", rope_parameters=parameters | changes))
    assert rope_fingerprint(tiny_config("gpt2")) == ""
