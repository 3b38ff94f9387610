"""Two to four bits an element, without training: channels to equal size, a random rotation, a quantiser of normals.

After a random rotation the elements of a row are nearly independent normals, whatever the row was, and one table of
levels fits them all (TurboQuant, arXiv 2504.19874). The rotation is a Hadamard transform with random signs. Before it,
each channel is divided by its size over the span: otherwise a rotation would spread a few huge channels, and their
error, over all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ctxcomp_rag.index.codecs.base import Codec, Role
from ctxcomp_rag.index.codecs.integer import SCALE_DTYPE

_STEPS = 4  # of a channel's size, to the octave: it need not be exact, only equal when encoding and decoding


class _Rotated(Codec):
    """`bits` an element, one scale a row and one byte a channel."""

    bits: ClassVar[int]

    def encode(self, tensor: Tensor, role: Role) -> dict[str, Tensor]:
        x = tensor.float()
        size = x.square().mean(dim=-2, keepdim=True).sqrt()
        size_codes = (size.clamp(min=2.0**-32).log2() * _STEPS).round().clamp(-128, 127).to(torch.int8)
        rows = rotate(x / _sizes(size_codes))
        norm = rows.square().mean(dim=-1, keepdim=True).sqrt()
        unit = torch.where(norm > 0, rows / norm, torch.zeros(()))
        codes = torch.bucketize(unit, _borders(self.bits))
        rounded = _levels(self.bits)[codes]
        # the scale of the least error: rows that the normal does not fit, a single large element say, need it
        scale = norm * (unit * rounded).sum(-1, keepdim=True) / rounded.square().sum(-1, keepdim=True)
        return {"codes": _pack(codes, self.bits), "scale": scale.to(SCALE_DTYPE), "size": size_codes}

    def decode(self, pieces: Mapping[str, Tensor], role: Role, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        codes = _unpack(pieces["codes"], self.bits, math.prod(shape)).view(shape)
        rows = _levels(self.bits)[codes] * pieces["scale"].float()
        return (rotate_back(rows) * _sizes(pieces["size"])).to(dtype)


class Rotated4(_Rotated):
    """Half a byte an element; relative squared error about 9e-3."""

    name = "rotated4"
    bits = 4


class Rotated3(_Rotated):
    """Three bits an element; relative squared error about 3.4e-2."""

    name = "rotated3"
    bits = 3


class Rotated2(_Rotated):
    """Two bits an element; relative squared error about 0.12."""

    name = "rotated2"
    bits = 2


def rotate(x: Tensor) -> Tensor:
    """An orthogonal map of the last axis, the same one for every tensor of this width."""
    for begin, signs in _passes(x.shape[-1]):
        end = begin + len(signs)
        x = torch.cat([x[..., :begin], _hadamard(x[..., begin:end] * signs), x[..., end:]], dim=-1)
    return x


def rotate_back(x: Tensor) -> Tensor:
    """Inverse of `rotate`."""
    for begin, signs in reversed(_passes(x.shape[-1])):
        end = begin + len(signs)
        x = torch.cat([x[..., :begin], _hadamard(x[..., begin:end]) * signs, x[..., end:]], dim=-1)
    return x


@cache
def _passes(width: int) -> tuple[tuple[int, Tensor], ...]:
    """(begin, signs) of the blocks to transform: one of a power of two; else two that overlap and cover the row."""
    block = 2 ** int(math.log2(width))
    generator = torch.Generator().manual_seed(width)
    begins = (0,) if block == width else (0, width - block)
    return tuple((b, torch.randint(0, 2, (block,), generator=generator).float() * 2 - 1) for b in begins)


def _hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform of the last axis, a power of two wide; orthonormal, its own inverse."""
    width, half = x.shape[-1], 1
    while half < width:
        pairs = x.reshape(*x.shape[:-1], -1, 2, half)
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2).flatten(-3)
        half *= 2
    return x / math.sqrt(width)


def _sizes(codes: Tensor) -> Tensor:
    return torch.exp2(codes.float() / _STEPS)


@cache
def _levels(bits: int) -> Tensor:
    """The 2^bits levels of least squared error for a standard normal (Lloyd's iteration, on exact integrals)."""
    normal, count = NormalDist(), 2**bits
    levels = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    for _ in range(2000):
        borders = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        density = [0.0 if math.isinf(b) else normal.pdf(b) for b in borders]
        mass = [normal.cdf(b) for b in borders]
        levels = [(density[i] - density[i + 1]) / (mass[i + 1] - mass[i]) for i in range(count)]
    return torch.tensor(levels)


@cache
def _borders(bits: int) -> Tensor:
    levels = _levels(bits)
    return (levels[1:] + levels[:-1]) / 2


def _pack(codes: Tensor, bits: int) -> Tensor:
    digits = np.unpackbits(codes.to(torch.uint8).flatten().numpy()[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(digits))


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    digits = np.unpackbits(packed.contiguous().numpy(), count=count * bits).reshape(count, bits)
    padded = np.pad(digits, ((0, 0), (8 - bits, 0)))
    return torch.from_numpy(np.packbits(padded, axis=1)[:, 0].astype(np.int64))
