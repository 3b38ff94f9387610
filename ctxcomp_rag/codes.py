"""A tensor in the one-byte codes that it was stored in, decoded where it is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

_CODES: Final = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, eq=False)
class ScaledCodes:
    """Codes that stand for `codes * scale`. They may lie over the bytes of a store, and must not be written to.

    Attributes:
        codes: (..., n, d) int8 or float8.
        scale: floating point, with the axes of `codes`, of size 1 where codes share a scale.
        dtype: of the tensor that they stand for.

    Raises:
        ValueError: these are no codes, or the scale is none of theirs.
    """

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.codes.dtype not in _CODES or not self.scale.is_floating_point():
            raise ValueError(f"expected codes of one byte and a floating point scale, got {self.codes.dtype} and "
                             f"{self.scale.dtype}")
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
        """Write the tensor to `out`, of this shape; a float32 one takes no other memory of its size."""
        if out.dtype != self.dtype or out.dtype.itemsize == 1:
            out.copy_(self.decoded())
        else:
            self._multiply(out)

    def decoded(self) -> Tensor:
        working = torch.float32 if self.dtype.itemsize == 1 else self.dtype
        return self._multiply(torch.empty(self.shape, dtype=working, device=self.codes.device)).to(self.dtype)

    def _multiply(self, out: Tensor) -> Tensor:
        codes, scale = self.codes.to(out.device), self.scale.to(out.device)  # codes travel, not what they stand for
        return out.copy_(codes).mul_(scale)  # every dtype of two bytes or more holds a code exactly


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
