"""SpanSynthesizer: contexts and question to the model as blocks, so that no string stands for a span anywhere."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ContentBlock, MessageRole
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer, QueryTextType
from llama_index.core.schema import MetadataMode, NodeWithScore
from llama_index.core.types import RESPONSE_TEXT_TYPE

from ctxcomp_rag import InputError
from llama_index_ctxcomp.blocks import PlainBlock, SpanBlock
from llama_index_ctxcomp.llm import CtxcompLLM
from llama_index_ctxcomp.nodes import SpanNode

_BETWEEN = "\n\n"


class SpanSynthesizer(BaseSynthesizer):
    """One call of the model with all contexts: spans where nodes have them, text where they have not.

    The layout is that of `CompressedRAG`: one user message, contexts with an empty line between them, then
    "Question: ...". Metadata is not shown to the model. What does not fit into the window is refused with a sentence.

    Args:
        llm: a `CtxcompLLM`.
        streaming: whether responses are streams.
    """

    def __init__(self, llm: CtxcompLLM, *, streaming: bool = False, callback_manager: CallbackManager | None = None,
                 empty_response: str | None = None) -> None:
        if not isinstance(llm, CtxcompLLM):
            raise InputError(f"expected a CtxcompLLM, which reads spans, got {type(llm).__name__}; with another model "
                             "use a synthesizer of llama_index")
        super().__init__(llm=llm, callback_manager=callback_manager, streaming=streaming, empty_response=empty_response,
                         multimodal=True)
        self._model = llm

    def synthesize(self, query: QueryTextType, nodes: list[NodeWithScore],
                   additional_source_nodes: Sequence[NodeWithScore] | None = None, **response_kwargs: Any
                   ) -> RESPONSE_TYPE:
        return super().synthesize(query, nodes, additional_source_nodes, contexts=_contexts(nodes), **response_kwargs)

    async def asynthesize(self, query: QueryTextType, nodes: list[NodeWithScore],
                          additional_source_nodes: Sequence[NodeWithScore] | None = None, **response_kwargs: Any
                          ) -> RESPONSE_TYPE:
        return await super().asynthesize(query, nodes, additional_source_nodes, contexts=_contexts(nodes),
                                         **response_kwargs)

    def get_response_from_messages(self, query_str: str, message_chunks: Sequence[ChatMessage],
                                   contexts: Sequence[list[ContentBlock]] | None = None, **response_kwargs: Any
                                   ) -> RESPONSE_TEXT_TYPE:
        messages = self._messages(query_str, contexts if contexts is not None else [m.blocks for m in message_chunks])
        if self._streaming:
            stream = self._model.stream_chat(messages, **response_kwargs)

            def deltas() -> Generator[str, None, None]:
                for response in stream:
                    if response.delta:
                        yield response.delta

            return deltas()
        return self._model.chat(messages, **response_kwargs).message.content or ""

    async def aget_response_from_messages(self, query_str: str, message_chunks: Sequence[ChatMessage],
                                          contexts: Sequence[list[ContentBlock]] | None = None, **response_kwargs: Any
                                          ) -> RESPONSE_TEXT_TYPE:
        messages = self._messages(query_str, contexts if contexts is not None else [m.blocks for m in message_chunks])
        if self._streaming:
            stream = await self._model.astream_chat(messages, **response_kwargs)

            async def deltas() -> AsyncGenerator[str, None]:
                async for response in stream:
                    if response.delta:
                        yield response.delta

            return deltas()
        return (await self._model.achat(messages, **response_kwargs)).message.content or ""

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """An answer from texts; none of them can be a span."""
        return self.get_response_from_messages(query_str, [], _as_text(text_chunks), **response_kwargs)

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
                            ) -> RESPONSE_TEXT_TYPE:
        return await self.aget_response_from_messages(query_str, [], _as_text(text_chunks), **response_kwargs)

    def _messages(self, query_str: str, contexts: Sequence[list[ContentBlock]]) -> list[ChatMessage]:
        blocks: list[ContentBlock] = []
        for context in contexts:
            blocks += [*context, PlainBlock(text=_BETWEEN)]
        # one block for the blank line and the question: the decoder was trained on the tokens that this makes
        blocks = [*blocks[:-1], PlainBlock(text=f"{_BETWEEN}Question: {query_str}")]
        messages = [ChatMessage(role=MessageRole.USER, blocks=blocks)]
        if self._model.system_prompt:
            messages.insert(0, ChatMessage(role=MessageRole.SYSTEM,
                                           blocks=[PlainBlock(text=self._model.system_prompt)]))
        return messages

    def _get_prompts(self) -> PromptDictType:
        return {}  # the layout is the one that the decoder was trained on

    def _update_prompts(self, prompts: PromptDictType) -> None:
        if prompts:
            raise InputError(f"SpanSynthesizer has no prompt {next(iter(prompts))!r} to replace; set a system_prompt "
                             "on the CtxcompLLM")


def _contexts(nodes: Sequence[NodeWithScore]) -> list[list[ContentBlock]]:
    contexts: list[list[ContentBlock]] = []
    for found in nodes:
        node = found.node
        if isinstance(node, SpanNode):
            contexts.append([SpanBlock(node.minted)])
        else:
            contexts.append([PlainBlock(text=node.get_content(metadata_mode=MetadataMode.NONE))])
    return contexts


def _as_text(text_chunks: Sequence[str]) -> list[list[ContentBlock]]:
    return [[PlainBlock(text=text)] for text in text_chunks]


__all__ = ["SpanSynthesizer"]
