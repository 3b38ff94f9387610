"""Tensors of a safetensors file that lies in memory, without copying it (`safetensors.torch.load` copies each)."""

from __future__ import annotations

import json
import math
import struct
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

_DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def stored_tensors(data: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name -> tensor, the metadata of the file).

    The tensors lie over the bytes of `data` (bytes or any buffer), which they keep alive. Must not be written to.

    Raises:
        ValueError: the file is cut short, or its header is not one.
    """
    view = memoryview(data)
    if len(view) < 8:
        raise ValueError(f"expected a safetensors file, got {len(view)} bytes")
    (length,) = struct.unpack_from("<Q", view)
    begin = 8 + length
    if begin > len(view):
        raise ValueError(f"expected a header of {length} bytes, got {len(view) - 8}")
    header = json.loads(bytes(view[8:begin]))
    metadata: dict[str, str] = header.pop("__metadata__", {})
    content = _over(view[begin:])
    return {name: _tensor(name, about, content) for name, about in header.items()}, metadata


def _tensor(name: str, about: Any, content: Tensor) -> Tensor:
    """One tensor of a file's content (bytes,) uint8."""
    first, last = about["data_offsets"]
    dtype, shape = _DTYPES[about["dtype"]], about["shape"]
    if not 0 <= first <= last <= content.numel() or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the tensor {name!r} of shape {shape} does not lie at {first} to {last}")
    flat = content[first:last]
    aligned = not (first % dtype.itemsize or content.data_ptr() % dtype.itemsize)
    return (flat if aligned else flat.clone()).view(dtype).view(shape)


def _over(view: memoryview) -> Tensor:
    if not len(view):
        return torch.empty(0, dtype=torch.uint8)
    if not view.readonly:
        return torch.frombuffer(view, dtype=torch.uint8)
    import pyarrow as pa

    # dlpack carries no read-only flag, which torch would warn about with every other way in
    buffer = pa.py_buffer(view)
    made: Tensor = from_dlpack(pa.Array.from_buffers(pa.uint8(), buffer.size, [None, buffer]))
    return made


__all__ = ["stored_tensors"]
