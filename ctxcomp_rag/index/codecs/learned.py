"""What the codecs that learn have in common: tables of an index's first spans, and channels of one size."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index.codecs.base import Codec, Role, Tables, as_rows, from_rows


class Learned(Codec):
    """A codec of rows whose channels are brought to mean 0 and size 1 first, so that no large one hides the others.

    Tables: "ROLE.mean" and "ROLE.size" (channels,), and what `_learn` adds for a role.
    """

    def __init__(self, tables: Tables | None = None) -> None:
        if tables is not None:
            self.tables = tables

    @abstractmethod
    def _learn(self, rows: Tensor, role: Role) -> dict[str, Tensor]:
        """Tables for rows (n, channels) of mean 0 and size 1."""

    @abstractmethod
    def _encode(self, rows: Tensor, role: Role) -> dict[str, Tensor]:
        """Pieces of such rows."""

    @abstractmethod
    def _decode(self, pieces: Mapping[str, Tensor], role: Role) -> Tensor:
        """Rows (n, channels) again."""

    def _copy(self, tables: Tables) -> Self:
        return type(self)(tables)

    @property
    def learns(self) -> bool:
        return True

    def learn(self, samples: Mapping[Role, Tensor]) -> Self:
        tables: dict[str, Tensor] = {}
        for role, rows in samples.items():
            mean, size = rows.mean(0), rows.std(0, correction=0)
            size = torch.where(size > 0, size, torch.ones(()))
            learned = {"mean": mean, "size": size, **self._learn((rows - mean) / size, role)}
            tables |= {f"{role}.{name}": table.contiguous() for name, table in learned.items()}
        return self._copy(tables)

    def with_tables(self, tables: Tables) -> Self:
        return self._copy(tables)

    def encode(self, tensor: Tensor, role: Role) -> dict[str, Tensor]:
        return self._encode((as_rows(tensor) - self.table("mean", role)) / self.table("size", role), role)

    def decode(self, pieces: Mapping[str, Tensor], role: Role, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        rows = self._decode(pieces, role) * self.table("size", role) + self.table("mean", role)
        return from_rows(rows, shape).to(dtype)

    def table(self, name: str, role: Role) -> Tensor:
        """A table of a role; raises KeyError where none was learned for it."""
        return self.tables[f"{role}.{name}"]

    def require_rows(self, rows: Tensor, needed: int) -> None:
        """Raises InputError unless there are enough rows to learn from."""
        if len(rows) < needed:
            raise InputError(f"the codec {self.name!r} learns from the first spans of an index and needs {needed} "
                             f"slots for it, got {len(rows)}; begin with more documents at once, or choose a codec "
                             "that learns nothing, such as int4 or rotated2")
