"""What a codec is: a tensor of a span as fewer bytes, and back.

A codec sees a tensor (..., n, d): n slots, d channels (leading axes: layers and heads of a KV span). What it needs to
read the codes again it stores beside them, in the span itself, so that spans of different codecs lie in one index and
no lost header makes an index unreadable. Only a codec that learns has tables which the spans of an index share; every
span names them by their digest (see `ctxcomp_rag.index.tables`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Self

import torch
from torch import Tensor

from ctxcomp_rag.codes import Latent, ScaledCodes

Role = Literal["embeds", "keys", "values", "memory"]
"""What the tensor is: a codec may treat keys, whose channels differ in size, unlike values (KIVI, arXiv 2402.02750)."""

Tables = Mapping[str, Tensor]
"""What a codec has learned: plain arrays by name."""


class Codec(ABC):
    """A new codec is one file: subclass, give it a `name`, and add a line to the registry in `codecs/__init__.py`."""

    name: str
    tables: Tables = MappingProxyType({})

    @abstractmethod
    def encode(self, tensor: Tensor, role: Role) -> dict[str, Tensor]:
        """Named pieces that `decode` reads; `tensor` (..., n, d) is finite and floating point, on the CPU."""

    @abstractmethod
    def decode(self, pieces: Mapping[str, Tensor], role: Role, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor again, (..., n, d). Raises KeyError or RuntimeError for pieces that are not of this codec."""

    def read(self, pieces: Mapping[str, Tensor], role: Role, shape: tuple[int, ...], dtype: torch.dtype) -> Latent:
        """The tensor, or codes from which it can be decoded elsewhere. Raises as `decode` does, and ValueError."""
        return self.decode(pieces, role, shape, dtype)

    @property
    def learns(self) -> bool:
        """Whether the codec needs tables."""
        return False

    def learn(self, samples: Mapping[Role, Tensor]) -> Self:
        """This codec with tables for tensors such as the samples, role -> (slots, channels); see `as_rows`.

        Raises:
            InputError: the samples are too few, or of a role that it does not store.
        """
        return self

    def with_tables(self, tables: Tables) -> Self:
        """This codec with tables that were learned before."""
        return self


class Scaled(Codec):
    """A codec whose pieces are one-byte "codes" of the tensor's shape and a "scale" to multiply them by."""

    def read(self, pieces: Mapping[str, Tensor], role: Role, shape: tuple[int, ...], dtype: torch.dtype) -> ScaledCodes:
        codes = ScaledCodes(pieces["codes"], pieces["scale"], dtype)
        if codes.shape != shape:
            raise ValueError(f"codes of shape {codes.shape} stand for a tensor of shape {shape}")
        return codes

    def decode(self, pieces: Mapping[str, Tensor], role: Role, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.read(pieces, role, shape, dtype).decoded()


def reduced_axis(role: Role) -> int:
    """The axis that shares one scale: channels for values, slots for all else (a scale a channel).

    A few channels of hidden states and keys are many times larger than the rest; a scale of their own keeps them from
    costing the others their precision.
    """
    return -1 if role == "values" else -2


def as_rows(tensor: Tensor) -> Tensor:
    """(..., n, d) as (n, channels): layers and heads beside each other, in float32."""
    return tensor.float().movedim(-2, 0).flatten(1)


def from_rows(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `as_rows`."""
    return rows.reshape(shape[-2], *shape[:-2], shape[-1]).movedim(0, -2).contiguous()
