"""SpanPostprocessor: after retrieval, every node that has a span in the index gets a reference to it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import Document, MetadataMode, NodeWithScore, QueryBundle, TextNode

from ctxcomp_rag import Compressor, CtxcompError, InputError, MemorySpan, SpanChat, new_scope
from llama_index_ctxcomp.chunks import chunk_id, has_text
from llama_index_ctxcomp.minted import MintedSpan, ledger_of
from llama_index_ctxcomp.nodes import QuotedNode, SpanNode, holds_reference
from llama_index_ctxcomp.writer import SpanWriter

logger = logging.getLogger(__name__)
# other subclasses have content of their own (images, links to other indices) that no span stands for
_TEXT_NODES = (TextNode, Document, SpanNode, QuotedNode)
OnMissing = Literal["text", "compress", "raise"]
OnError = Literal["text", "raise"]


class SpanPostprocessor(BaseNodePostprocessor):
    """Looks up the spans of retrieved nodes; works behind any retriever. Put it last.

    Order, number, scores, ids, text and metadata of the nodes stay. References are minted now and carried by the
    nodes themselves, so that a stream may be read long after the query returned, in any thread or task.

    Args:
        chat: where spans are looked up and references are minted; the one that the model has.
        scope: of references that travel as text through synthesizers that only know text (`compact`, `refine`, ...);
            one per tenant or conversation, the same as the model's. Without one, every call has a scope of its own
            and only `SpanSynthesizer` sees references; others read the text.
        on_missing: what happens to a node without a span: it stays text, is compressed now, or an error is raised.
        on_error: what happens to a node whose span cannot be read or made (also where the embedding model fails): it
            stays text and the error is logged, or the error is raised.
        compressor, embed_model: needed to compress now; the embedding model is the one the index was made with.
    """

    on_missing: OnMissing = "text"
    on_error: OnError = "text"
    _chat: SpanChat = PrivateAttr()
    _scope: str | None = PrivateAttr(default=None)
    _writer: SpanWriter | None = PrivateAttr(default=None)
    _embed_model: BaseEmbedding | None = PrivateAttr(default=None)

    def __init__(self, chat: SpanChat, *, scope: str | None = None, on_missing: OnMissing = "text",
                 on_error: OnError = "text", compressor: Compressor | None = None,
                 embed_model: BaseEmbedding | None = None, **kwargs: Any) -> None:
        super().__init__(**{"on_missing": on_missing, "on_error": on_error, **kwargs})
        SpanChat.require(chat)
        if scope == "":
            raise InputError("expected a scope, got an empty one; use new_scope(), or leave it out")
        if on_missing == "compress":
            if compressor is None or embed_model is None:
                raise InputError("on_missing='compress' needs a compressor and an embed_model; pass both, or use "
                                 "on_missing='text'")
            self._writer = SpanWriter(chat.index, compressor)
        self._chat, self._scope, self._embed_model = chat, scope, embed_model

    @classmethod
    def class_name(cls) -> str:
        return "SpanPostprocessor"

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
                           ) -> list[NodeWithScore]:
        names = {i: chunk_id(n.node) for i, n in enumerate(nodes) if _eligible(n)}
        missing = self._chat.index.missing(names.values())
        if missing and self.on_missing == "raise":
            node = next(nodes[i].node for i, name in names.items() if name in missing)
            raise InputError(f"expected a span for every retrieved node, but {len(missing)} have none, first "
                             f"{node.node_id!r}; run SpanPrecompress on them, or use on_missing='text'")
        if missing and self._writer is not None:
            self._compress([nodes[i] for i, name in names.items() if name in missing])
        spans = self._spans(list(dict.fromkeys(names.values())))
        scope = self._scope or new_scope()
        minted = {name: self._mint(name, span, scope) for name, span in spans.items()}
        return [self._with_span(n, minted[names[i]]) if names.get(i) in minted else _without_span(n)
                for i, n in enumerate(nodes)]

    async def _apostprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
                                  ) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._postprocess_nodes, nodes, query_bundle)  # it reads files

    def _mint(self, name: str, span: MemorySpan, scope: str) -> tuple[str, str, int]:
        around = self._chat.index.spec.delimiters
        enclosing = sum(around[d].shape[0] for d in ("before", "after") if d in around)
        return self._chat.references.mint(name, scope), scope, span.num_positions + enclosing

    def _with_span(self, found: NodeWithScore, minted: tuple[str, str, int]) -> NodeWithScore:
        assert isinstance(found.node, TextNode)
        reference, scope, positions = minted
        span = MintedSpan(reference, scope, found.node.text, positions)
        if self._scope is not None:
            ledger_of(self._chat).note(span)
        return NodeWithScore(node=SpanNode.of(found.node, span, as_text=self._scope is not None), score=found.score)

    def _spans(self, names: list[str]) -> dict[str, MemorySpan]:
        index = self._chat.index
        here = [name for name in names if name not in index.missing(names)]
        try:
            return {s.chunk.id: s.span for s in index.get(here)}
        except CtxcompError:
            pass  # one damaged or just deleted chunk must not take the others with it
        spans: dict[str, MemorySpan] = {}
        for name in here:
            try:
                spans[name] = index.get([name])[0].span
            except CtxcompError as error:
                self._failed(error)
        return spans

    def _compress(self, found: list[NodeWithScore]) -> None:
        assert self._writer is not None
        assert self._embed_model is not None
        try:
            nodes = [n.node.model_copy() for n in found]
            texts = [n.get_content(metadata_mode=MetadataMode.EMBED) for n in nodes]
            for node, row in zip(nodes, self._embed_model.get_text_embedding_batch(texts), strict=True):
                node.embedding = row
            self._writer.write(nodes)
        except Exception as error:
            if self.on_error == "raise" or len(found) == 1:
                self._failed(error)
                return
            for each in found:  # one that cannot be compressed must not take the others with it
                self._compress([each])

    def _failed(self, error: Exception) -> None:
        if self.on_error == "raise":
            raise error
        logger.warning("a node stays text: %s", error)


def _eligible(found: NodeWithScore) -> bool:
    return type(found.node) in _TEXT_NODES and has_text(found.node)


def _without_span(found: NodeWithScore) -> NodeWithScore:
    node = found.node
    if isinstance(node, SpanNode):  # of an earlier call, whose scope is not this one
        found = NodeWithScore(node=node.plain(), score=found.score)
    if type(node) in _TEXT_NODES and holds_reference(found.node.get_content(metadata_mode=MetadataMode.LLM)):
        assert isinstance(node, TextNode)
        return NodeWithScore(node=QuotedNode.of(node), score=found.score)
    return found


__all__ = ["OnError", "OnMissing", "SpanPostprocessor"]
