"""A tensor in the one-byte codes that it was stored in, decoded where it is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ScaledCodes:
    """Codes that stand for `codes * scale`. They may lie over the bytes of a store, and must not be written to.

    Attributes:
        codes: (..., n, d) int8 or float8.
        scale: floating point, with the axes of `codes`, of size 1 where codes share a scale.
        dtype: of the tensor that they stand for.

    Raises:
        ValueError: the scale is no scale of these codes.
    """

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        sizes = tuple(self.scale.shape)
        if len(sizes) != self.codes.ndim or any(s not in (1, c) for s, c in zip(sizes, self.shape, strict=True)):
            raise ValueError(f"a scale of shape {sizes} does not fit codes of shape {self.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor that they stand for."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, number: int) -> ScaledCodes:
        """One entry of the first axis."""
        return ScaledCodes(self.codes[number], self.scale[number if self.scale.shape[0] > 1 else 0], self.dtype)

    def rows(self, chosen: Tensor) -> ScaledCodes:
        """The slots `chosen` (k,) int64: (..., k, d)."""
        scale = self.scale if self.scale.shape[-2] == 1 else self.scale[..., chosen, :]
        return ScaledCodes(self.codes[..., chosen, :], scale, self.dtype)

    def decode_into(self, out: Tensor) -> None:
        """Write the tensor to `out`, of this shape; in its own dtype without other memory of its size."""
        if out.dtype != self.dtype:
            out.copy_(self.decoded())
            return
        out.copy_(self.codes).mul_(self.scale.to(out.device))  # a code has so few bits that every dtype holds it

    def decoded(self) -> Tensor:
        made = torch.empty(self.shape, dtype=self.dtype, device=self.codes.device)
        self.decode_into(made)
        return made


Latent: TypeAlias = Tensor | ScaledCodes
"""A tensor of a span: as it is, or in codes."""


def write(latents: Iterable[Latent], out: Tensor, dim: int = 0) -> None:
    """Copy or decode tensors to `out`, one after the other along `dim`."""
    latents = list(latents)
    tensors = [latent for latent in latents if isinstance(latent, Tensor) and _alike(latent, out)]
    if len(tensors) == len(latents):  # one call: for small spans the calls are what costs
        torch.cat(tensors, dim=dim, out=out)
        return
    begin = 0
    for latent in latents:
        place = out.narrow(dim, begin, latent.shape[dim])
        begin += latent.shape[dim]
        if isinstance(latent, ScaledCodes):
            latent.decode_into(place)
        else:
            place.copy_(latent)


def _alike(tensor: Tensor, out: Tensor) -> bool:
    return tensor.dtype == out.dtype and tensor.device == out.device and not tensor.requires_grad


def decoded(latent: Latent) -> Tensor:
    return latent.decoded() if isinstance(latent, ScaledCodes) else latent


__all__ = ["Latent", "ScaledCodes", "decoded", "write"]
