"""Rounding to 8 or 4 bits: absmax for int8, minimum and range in groups of at most 32 for int4.

The layout of KIVI (arXiv 2402.02750): embeddings and keys share a scale along the slots, values along the channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ctxcomp_rag.index.codecs.base import Codec, Role, Scaled, reduced_axis

_GROUP = 32
SCALE_DTYPE = torch.bfloat16  # the range of float32; what it lacks in precision, rounding by the stored scale absorbs


class Int8(Scaled):
    """One byte an element; relative squared error about 4e-5."""

    name = "int8"

    def encode(self, tensor: Tensor, role: Role) -> dict[str, Tensor]:
        x = tensor.float()
        scale = stored(x.abs().amax(dim=reduced_axis(role), keepdim=True) / 127)
        codes = torch.where(scale > 0, x / scale.float(), torch.zeros(())).round().clamp(-127, 127)
        return {"codes": codes.to(torch.int8), "scale": scale}


class Int4(Codec):
    """Half a byte an element and a bfloat16 minimum and step for 32 of them (5 bits); relative error about 5e-3."""

    name = "int4"

    def encode(self, tensor: Tensor, role: Role) -> dict[str, Tensor]:
        groups = grouped(tensor.float(), role)
        low = -stored(-groups.amin(dim=-1, keepdim=True))
        step = stored((groups.amax(dim=-1, keepdim=True) - low.float()) / 15)
        codes = torch.where(step > 0, (groups - low.float()) / step.float(), torch.zeros(())).round().clamp(0, 15)
        flat = codes.to(torch.uint8).flatten()
        flat = torch.cat([flat, flat.new_zeros(len(flat) % 2)])
        return {"codes": flat[::2] | flat[1::2] << 4, "low": low, "step": step}

    def decode(self, pieces: Mapping[str, Tensor], role: Role, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        packed, low, step = pieces["codes"], pieces["low"].float(), pieces["step"].float()
        sizes = (*low.shape[:-1], group_size(shape[reduced_axis(role)]))
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten()[: math.prod(sizes)].float().view(sizes)
        return ungrouped(codes * step + low, role, shape).to(dtype)


def stored(scale: Tensor) -> Tensor:
    """Rounded up in the stored dtype: the largest element must not fall outside the codes."""
    rounded = scale.to(SCALE_DTYPE)
    return torch.where(rounded.float() < scale, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)


def group_size(length: int) -> int:
    """Elements of a group: the fewest groups of at most 32, as even as they can be."""
    return math.ceil(length / math.ceil(length / _GROUP))


def grouped(x: Tensor, role: Role) -> Tensor:
    """(..., n, d) as (..., other axis, groups, group size), along the axis that shares scales; the last value pads."""
    x = x.transpose(-1, -2) if reduced_axis(role) == -2 else x
    size = group_size(x.shape[-1])
    x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], -x.shape[-1] % size)], dim=-1)
    return x.reshape(*x.shape[:-1], -1, size)


def ungrouped(groups: Tensor, role: Role, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `grouped`."""
    axis = reduced_axis(role)
    x = groups.flatten(-2)[..., : shape[axis]]
    return x.transpose(-1, -2).contiguous() if axis == -2 else x.contiguous()
