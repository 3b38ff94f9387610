"""Nodes after the postprocessor: they keep their text, ids and metadata; only what the model is given differs."""

from __future__ import annotations

from typing import Any, Self

from llama_index.core.base.llms.types import BaseContentBlock
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import MetadataMode, TextNode

from ctxcomp_rag import InputError, quoted
from llama_index_ctxcomp.blocks import SpanBlock
from llama_index_ctxcomp.minted import MintedSpan

_PREFIX = "[[span:"


def holds_reference(text: str) -> bool:
    """Whether text spells a reference or the beginning of one."""
    return _PREFIX in text


class SpanNode(TextNode):
    """A node with a span.

    Made late, by the postprocessor: stores and caches keep plain `TextNode`s, and the reference is never dumped.
    """

    _minted: MintedSpan | None = PrivateAttr(default=None)
    _as_text: bool = PrivateAttr(default=False)

    @classmethod
    def of(cls, node: TextNode, minted: MintedSpan, *, as_text: bool) -> Self:
        """A copy of `node` that carries a reference.

        Args:
            as_text: whether synthesizers that only know text are given the reference; else they get the text.
        """
        made = cls(**_fields(node))
        made._minted, made._as_text = minted, as_text
        return made

    @classmethod
    def class_name(cls) -> str:
        return "SpanNode"

    @property
    def minted(self) -> MintedSpan:
        if self._minted is None:  # read back from JSON, which holds no references
            raise InputError(f"the node {self.node_id!r} has lost its span; run SpanPostprocessor after loading nodes")
        return self._minted

    def plain(self) -> TextNode:
        """The node without its reference."""
        return TextNode(**_fields(self))

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        """The text; the reference for the model of a synthesizer that only knows text."""
        if metadata_mode == MetadataMode.LLM and self._minted is not None and self._as_text:
            return self._minted.reference
        return super().get_content(metadata_mode)

    def get_content_blocks(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> list[BaseContentBlock]:
        """The span for the model, the text for everybody else."""
        if metadata_mode == MetadataMode.LLM and self._minted is not None:
            return [SpanBlock(self._minted)]
        return super().get_content_blocks(metadata_mode)


class QuotedNode(TextNode):
    """A node without a span whose text or metadata spells a reference: the model is shown it with a blank inside."""

    @classmethod
    def of(cls, node: TextNode) -> Self:
        return cls(**_fields(node))

    @classmethod
    def class_name(cls) -> str:
        return "QuotedNode"

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        content = super().get_content(metadata_mode)
        return quoted(content) if metadata_mode == MetadataMode.LLM else content


def _fields(node: TextNode) -> dict[str, Any]:
    return {name: getattr(node, name) for name in TextNode.model_fields}


__all__ = ["QuotedNode", "SpanNode", "holds_reference"]
