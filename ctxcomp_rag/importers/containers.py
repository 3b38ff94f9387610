"""Files that torch.save wrote, read without ever running what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ctxcomp_rag.errors import ModelLoadError

MAX_TENSOR_FILE_BYTES = 4 * 2**30
"""Largest `.bin` or `.pt` that is read: hundreds of times the published ones, far from filling a machine."""


def read_tensors(path: Path) -> dict[str, Any]:
    """A `.bin` or `.pt` of tensors, strings and lists; nothing else in it is ever run."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ModelLoadError(f"there is no file {str(path)!r}") from error
    if size > MAX_TENSOR_FILE_BYTES:
        raise ModelLoadError(f"{str(path)!r} has {size:,} bytes, more than the {MAX_TENSOR_FILE_BYTES:,} that such a "
                             "file may have")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the bytes happen to provoke
        reason = str(error).strip().split("\n")[0]
        raise ModelLoadError(f"{str(path)!r} is not a file of plain tensors that can be read: {reason}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{str(path)!r} must hold a dictionary of tensors, got {type(content).__name__}")
    return content
