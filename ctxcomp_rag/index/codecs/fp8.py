"""float8 (e4m3) with a scale a row: no group, no header, indifferent to large channels."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxcomp_rag.index.codecs.base import Role, Scaled

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Float8(Scaled):
    """One byte an element; relative squared error about 7e-4."""

    name = "fp8"

    def encode(self, tensor: Tensor, role: Role) -> dict[str, Tensor]:
        x = tensor.float()
        scale = x.abs().amax(dim=-1, keepdim=True) / _LARGEST
        codes = torch.where(scale > 0, x / scale, torch.zeros(())).clamp(-_LARGEST, _LARGEST)
        return {"codes": codes.to(torch.float8_e4m3fn), "scale": scale}
