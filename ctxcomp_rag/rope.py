"""Moving cached keys to new positions (RoPE), by one rotation that does not need the unrotated keys.

R(p') k = R(p' - p) R(p) k, so a key that was rotated for position p is moved by rotating it once more by the
difference. The attention scaling of YaRN is a factor on the rotated key; it is there already and is not applied again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ctxcomp_rag.errors import UnsupportedModelError

_STATIC_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class RotaryPositions:
    """Frequencies of a decoder's rotary embedding.

    Attributes:
        inv_freq: (rotary_dim / 2,) float32, radians per position.
        attention_scaling: factor that the model applies to cos and sin (1.0 but for YaRN).
    """

    inv_freq: Tensor
    attention_scaling: float

    @property
    def rotary_dim(self) -> int:
        """Leading part of head_dim that is rotated (all of it unless `partial_rotary_factor` < 1)."""
        return 2 * int(self.inv_freq.numel())

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> RotaryPositions:
        """Read the frequencies of a Hugging Face decoder configuration.

        Raises:
            UnsupportedModelError: cached keys of this architecture cannot be moved; the message says why.
        """
        _refuse(config, _why_no_full_cache(config) or _why_not_movable(config))
        parameters = rope_parameters(config)
        kind = parameters.get("rope_type", "default")
        if kind == "default":
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            dim = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
            exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
            return cls(1.0 / (parameters["rope_theta"] ** exponents), 1.0)
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return cls(inv_freq.to(torch.float32), float(scaling))


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """RoPE parameters of a configuration, {} where it has none (learned positions)."""
    parameters = getattr(config, "rope_parameters", None)
    return dict(parameters) if parameters else {}


def rope_fingerprint(config: PretrainedConfig) -> str:
    """RoPE parameters as canonical JSON, "" where the model has none."""
    parameters = rope_parameters(config)
    return json.dumps(parameters, sort_keys=True, default=str) if parameters else ""


def require_full_attention(config: PretrainedConfig) -> None:
    """Raises UnsupportedModelError, with the reason, where some layer does not keep all keys."""
    _refuse(config, _why_no_full_cache(config))


def _refuse(config: PretrainedConfig, reason: str) -> None:
    if reason:
        raise UnsupportedModelError(
            f"keys of {config.model_type!r} cannot be moved to new positions: {reason}. "
            f"Use soft spans (ICAE, PCC) with this decoder."
        )


def _why_no_full_cache(config: PretrainedConfig) -> str:
    layer_types = set(getattr(config, "layer_types", None) or ())
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if any("linear" in t or "mamba" in t or "recurrent" in t for t in layer_types):
        return f"it has linear-attention layers ({sorted(layer_types)}), which keep a state and no keys"
    if any("sliding" in t or "chunked" in t for t in layer_types) or (sliding and not layer_types):
        return f"it has sliding-window layers (window {getattr(config, 'sliding_window', None)}), which drop old keys"
    return ""


def _why_not_movable(config: PretrainedConfig) -> str:
    parameters = rope_parameters(config)
    if not parameters or getattr(config, "alibi", False):
        return "it has no rotary embedding (learned positions, ALiBi or none)"
    if any(isinstance(v, dict) for v in parameters.values()):
        return "its layers use different rotary embeddings"
    kind = parameters.get("rope_type", "default")
    if kind not in _STATIC_TYPES:
        return f"the frequencies of RoPE type {kind!r} depend on the length of the prompt"
    if parameters.get("mrope_section"):
        return "its rotary embedding has several axes (M-RoPE)"
    return ""


@dataclass(frozen=True, eq=False)
class Rotation:
    """A move of keys by some positions, to be applied to layer after layer.

    Attributes:
        cos: (..., num_slots, rotary_dim) float32, each half alike.
        sin: (..., num_slots, rotary_dim / 2) float32, or one row for all slots.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def by(cls, shift: Tensor | int, num_slots: int, rope: RotaryPositions, device: torch.device) -> Rotation:
        """By `shift` positions, an int or a tensor broadcastable to (..., num_slots)."""
        shift = torch.as_tensor(shift, device=device)
        # float64 angles: a shift of 1,000 positions in float32 is already off by 6e-5 rad
        angle = shift.to(torch.float64)[..., None] * rope.inv_freq.to(device, torch.float64)
        cos, sin = angle.cos().to(torch.float32), angle.sin().to(torch.float32)
        # a row of its own for every slot: torch then multiplies whole slots, not halves one after the other
        rows = torch.cat([cos, cos], dim=-1).expand(*shift.shape[:-1], num_slots, rope.rotary_dim)
        return cls(rows.contiguous(), sin)

    @classmethod
    def joined(cls, moves: Sequence[tuple[Rotation | None, int]]) -> Rotation | None:
        """One rotation for slots that stand one after the other: (one made by a single shift, or None where they stay;
        num_slots) of each."""
        some = next((rotation for rotation, _ in moves if rotation is not None), None)
        if some is None or len(moves) == 1:
            return some
        dim = some.cos.shape[-1]
        cos = [r.cos if r is not None else some.cos.new_ones(n, dim) for r, n in moves]
        sin = [(r.sin if r is not None else some.sin.new_zeros(1)).expand(n, dim // 2) for r, n in moves]
        return cls(torch.cat(cos), torch.cat(sin))

    def __call__(self, keys: Tensor, out: Tensor | None = None) -> Tensor:
        """Moved keys (..., num_slots, head_dim) in their dtype; computed in float32.

        Args:
            out: where to write them; without it gradients flow.
        """
        dim = self.cos.shape[-1]
        half = dim // 2
        rotated = keys[..., :dim].float()
        moved = (torch.mul(rotated, self.cos, out=out[..., :dim]) if out is not None and out.dtype == torch.float32
                 else rotated * self.cos)
        moved[..., :half].addcmul_(rotated[..., half:], self.sin, value=-1)
        moved[..., half:].addcmul_(rotated[..., :half], self.sin)
        if out is None:
            moved = moved.to(keys.dtype)
            return moved if dim == keys.shape[-1] else torch.cat([moved, keys[..., dim:]], dim=-1)
        if out.dtype != torch.float32:
            out[..., :dim] = moved
        if dim < keys.shape[-1]:
            out[..., dim:] = keys[..., dim:]
        return out


def rotate_keys(keys: Tensor, shift: Tensor | int, rope: RotaryPositions) -> Tensor:
    """Keys moved by `shift` positions.

    Args:
        keys: (..., num_slots, head_dim), rotated for their present positions; halves layout (`rotate_half`).
        shift: new minus old position, an int or a tensor broadcastable to (..., num_slots).
        rope: the decoder's frequencies.

    Returns:
        Keys of the same shape and dtype; computed in float32 (bfloat16 angles lose whole positions).
    """
    shift = torch.as_tensor(shift, device=keys.device)
    if not bool(shift.any()):
        return keys
    return Rotation.by(shift, keys.shape[-2], rope, keys.device)(keys)
