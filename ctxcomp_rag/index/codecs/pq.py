"""Product quantisation (Jegou et al. 2011) by faiss: a few channels together become one byte, the number of the nearest
of 256 learned points.

Below two bits an element nothing that learns nothing comes near.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ctxcomp_rag.index.codecs.base import Role
from ctxcomp_rag.index.codecs.learned import Learned

_POINTS = 256
_ROWS_PER_POINT = 4  # fewer, and the points are the samples themselves


class _PQ(Learned):
    """One byte for `group` channels. Table "points" (channels / group, 256, group)."""

    group: ClassVar[int]

    def _learn(self, rows: Tensor, role: Role) -> dict[str, Tensor]:
        import faiss

        self.require_rows(rows, _POINTS * _ROWS_PER_POINT)
        padded = self._padded(rows)
        quantizer = faiss.ProductQuantizer(padded.shape[1], padded.shape[1] // self.group, 8)
        quantizer.cp.min_points_per_centroid = _ROWS_PER_POINT  # below it faiss prints a warning
        quantizer.train(padded.numpy())
        points = torch.from_numpy(faiss.vector_to_array(quantizer.centroids))
        return {"points": points.view(-1, _POINTS, self.group)}

    def _encode(self, rows: Tensor, role: Role) -> dict[str, Tensor]:
        groups = self._padded(rows).view(len(rows), -1, self.group).transpose(0, 1)
        return {"codes": torch.cdist(groups, self.table("points", role)).argmin(-1).T.to(torch.uint8)}

    def _decode(self, pieces: Mapping[str, Tensor], role: Role) -> Tensor:
        points, codes = self.table("points", role), pieces["codes"].long()
        rows = points[torch.arange(len(points)), codes].flatten(1)
        return rows[:, : len(self.table("mean", role))]

    def _padded(self, rows: Tensor) -> Tensor:
        return functional.pad(rows, (0, -rows.shape[1] % self.group)).contiguous()


class PQ4(_PQ):
    """Half a byte an element; relative squared error about 1e-2."""

    name = "pq4"
    group = 2


class PQ2(_PQ):
    """Two bits an element; relative squared error about 0.1 on independent channels, less on others."""

    name = "pq2"
    group = 4


class PQ1(_PQ):
    """One bit an element; relative squared error about 0.3 on independent channels, less on others."""

    name = "pq1"
    group = 8
