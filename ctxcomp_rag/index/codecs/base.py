"""What a codec is: a tensor of a span as fewer bytes, and back.

A codec sees a tensor (..., n, d): n slots, d channels (leading axes: layers and heads of a KV span). Whatever it needs
to read the codes again it stores beside them, in the span itself: no state is shared between spans, so spans of
different codecs lie in one index, and no lost header makes an index unreadable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

Role = Literal["embeds", "keys", "values", "memory"]
"""What the tensor is: a codec may treat keys, whose channels differ in size, unlike values (KIVI, arXiv 2402.02750)."""


class Codec(ABC):
    """A new codec is one file: subclass, give it a `name`, and add a line to the registry in `codecs/__init__.py`."""

    name: ClassVar[str]

    @abstractmethod
    def encode(self, tensor: Tensor, role: Role) -> dict[str, Tensor]:
        """Named pieces that `decode` reads; `tensor` (..., n, d) is finite and floating point, on the CPU."""

    @abstractmethod
    def decode(self, pieces: Mapping[str, Tensor], role: Role, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor again, (..., n, d). Raises KeyError or RuntimeError for pieces that are not of this codec."""


def reduced_axis(role: Role) -> int:
    """The axis that shares one scale: channels for values, slots for all else (a scale a channel).

    A few channels of hidden states and keys are many times larger than the rest; a scale of their own keeps them from
    costing the others their precision.
    """
    return -1 if role == "values" else -2

