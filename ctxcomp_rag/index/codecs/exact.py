"""The tensor bit for bit, in the decoder's dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ctxcomp_rag.index.codecs.base import Codec, Role


class Exact(Codec):
    name = "exact"

    def encode(self, tensor: Tensor, role: Role) -> dict[str, Tensor]:
        # safetensors refuses views that share storage, such as kv[0] and kv[1]
        return {"": tensor.clone(memory_format=torch.contiguous_format)}

    def decode(self, pieces: Mapping[str, Tensor], role: Role, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return pieces[""]
