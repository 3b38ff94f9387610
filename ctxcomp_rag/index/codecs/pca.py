"""A bottleneck: the `rank` directions in which the spans of an index differ most, their coordinates as int8.

Principal components of the channels, learned from the index's first spans; applied when a span is written, inverted
when it is read. What the spans hold outside these directions is lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index.codecs.base import Role, Tables
from ctxcomp_rag.index.codecs.integer import Int8
from ctxcomp_rag.index.codecs.learned import Learned

_INT8 = Int8()


class PCA(Learned):
    """`rank` bytes a slot. Table "directions" (rank, channels), orthonormal."""

    def __init__(self, rank: int, tables: Tables | None = None) -> None:
        super().__init__(tables)
        self.rank, self.name = rank, f"pca{rank}"

    @classmethod
    def named(cls, name: str) -> PCA | None:
        """The codec of a name such as "pca96"; None for any other."""
        found = re.fullmatch(r"pca([1-9]\d*)", name)
        return cls(int(found[1])) if found else None

    def _copy(self, tables: Tables) -> Self:
        return type(self)(self.rank, tables)

    def _learn(self, rows: Tensor, role: Role) -> dict[str, Tensor]:
        if role in ("keys", "values"):
            raise InputError(f"the codec {self.name!r} is for soft and latent spans, whose slots are rows of one "
                             "space; store KV spans with int8, int4 or a rotated codec")
        if self.rank >= rows.shape[1]:
            raise InputError(f"expected fewer directions than the {rows.shape[1]} channels of a slot, got "
                             f"{self.name!r}; choose a smaller rank, or int8")
        self.require_rows(rows, 2 * self.rank)
        return {"directions": torch.linalg.svd(rows, full_matrices=False).Vh[: self.rank]}

    def _encode(self, rows: Tensor, role: Role) -> dict[str, Tensor]:
        return _INT8.encode(rows @ self.table("directions", role).T, "embeds")

    def _decode(self, pieces: Mapping[str, Tensor], role: Role) -> Tensor:
        codes = pieces["codes"]
        return _INT8.decode(pieces, "embeds", tuple(codes.shape), torch.float32) @ self.table("directions", role)
