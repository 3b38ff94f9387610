"""Content blocks. A message's blocks are a closed union, but a subclass of `TextBlock` passes through it as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import TextBlock
from llama_index.core.bridge.pydantic import PrivateAttr

from llama_index_ctxcomp.minted import MintedSpan


class PlainBlock(TextBlock):
    """Text in which no reference is looked for and nothing is filled in."""

    @property
    def templatable_attributes(self) -> list[str]:
        return []


class SpanBlock(PlainBlock):
    """A span in the content of a message. Its `text` is the original text: whoever cannot splice reads that.

    The reference is a private attribute: it is in no dump, trace or JSON, and JSON can never become a `SpanBlock`.
    A block is not trusted for being one: the decoder resolves its reference in its scope.
    """

    _minted: MintedSpan = PrivateAttr()

    def __init__(self, minted: MintedSpan) -> None:
        super().__init__(text=minted.text)
        self._minted = minted

    @property
    def minted(self) -> MintedSpan:
        return self._minted

    async def aestimate_tokens(self, tokenizer: Any | None = None) -> int:
        """Positions of the span, not tokens of its text."""
        return self._minted.positions

    async def asplit(self, max_tokens: int, overlap: int = 0, tokenizer: Any | None = None) -> list[Any]:
        """A span cannot be cut."""
        return [self]

    @classmethod
    async def amerge(cls, splits: Sequence[Any], chunk_size: int, tokenizer: Any | None = None) -> list[Any]:
        """Spans stay apart."""
        return list(splits)


__all__ = ["PlainBlock", "SpanBlock"]
