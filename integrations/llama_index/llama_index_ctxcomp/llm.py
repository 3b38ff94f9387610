"""CtxcompLLM: the frozen decoder as a LlamaIndex model whose messages may hold spans."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM

from ctxcomp_rag import ChatPrompt, GenerationSettings, InputError, SpanChat, Stripper, Ticket
from llama_index_ctxcomp.answers import chat_response, completion_response, usage_of
from llama_index_ctxcomp.blocks import PlainBlock
from llama_index_ctxcomp.errors import audible
from llama_index_ctxcomp.messages import read_messages

_SETTINGS = ("max_tokens", "temperature", "top_p", "stop", "seed")


class CtxcompLLM(CustomLLM):
    """A chat model over a `SpanChat`. Threads and tasks share the decoder, and their requests decode together.

    References are resolved when a method is called, also when its stream is read later. Requests are queued when the
    answer is first asked for; closing a stream, or cancelling a task, cancels the request. What is refused raises
    `PromptError`.

    Args:
        chat: the decoder, the index and the references.
        scope: allows references as text, if they were minted in this scope; see `SpanPostprocessor`.
        max_tokens, temperature, top_p, stop, seed: as in `GenerationSettings`; calls may override them.
        quote: an answer from spans is a run of words of their texts, or "not stated"; what has no spans is answered
            freely.
        on_error: what happens to a span that cannot be read: its text is shown, and counted in
            `raw["ctxcomp"]["rejected"]`, or the error is raised.
    """

    max_tokens: int = Field(default=64, description="Upper bound on generated tokens.")
    temperature: float = Field(default=0.0, description="0 is greedy.")
    top_p: float = Field(default=1.0, description="Sample from the smallest set that reaches this probability.")
    stop: tuple[str, ...] = Field(default=(), description="The answer ends before the first of these strings.")
    seed: int = Field(default=0, description="Seed of the sampling.")
    quote: bool = Field(default=False, description="Hold answers to the words of the texts behind the spans.")
    on_error: Literal["text", "raise"] = Field(default="text", description="What to do if a span cannot be read.")
    _chat: SpanChat = PrivateAttr()
    _scope: str | None = PrivateAttr(default=None)

    def __init__(self, chat: SpanChat, *, scope: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if scope == "":
            raise InputError("expected a scope, got an empty one; use new_scope(), or leave it out")
        self._chat, self._scope = SpanChat.require(chat), scope
        self._settings({})

    @classmethod
    def class_name(cls) -> str:
        return "CtxcompLLM"

    @property
    def span_chat(self) -> SpanChat:
        return self._chat

    @property
    def scope(self) -> str | None:
        return self._scope

    @property
    def metadata(self) -> LLMMetadata:
        """`context_window` is in positions: a token of text takes one, a span as many as its specification says."""
        backbone = self._chat.backbone
        return LLMMetadata(context_window=backbone.max_positions, num_output=self.max_tokens, is_chat_model=True,
                           model_name=backbone.model_id)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        prompt, settings = self._prepared(messages, kwargs)
        made = self._submit(prompt, settings).result()
        return chat_response(made.text.strip(), usage_of(prompt, made))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        prompt, settings = await asyncio.to_thread(self._prepared, messages, kwargs)  # it reads spans from files
        made = await self._submit(prompt, settings).aresult()
        return chat_response(made.text.strip(), usage_of(prompt, made))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        prompt, settings = self._prepared(messages, kwargs)

        def responses() -> ChatResponseGen:
            ticket, shown = self._submit(prompt, settings), Stripper()
            for piece in ticket.pieces():
                if delta := shown.feed(piece):
                    yield chat_response(shown.text, delta=delta)
            yield chat_response(shown.text, usage_of(prompt, ticket.result()), delta="")

        return responses()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        prompt, settings = await asyncio.to_thread(self._prepared, messages, kwargs)

        async def responses() -> ChatResponseAsyncGen:
            ticket, shown = self._submit(prompt, settings), Stripper()
            try:
                async for piece in ticket.apieces():
                    if delta := shown.feed(piece):
                        yield chat_response(shown.text, delta=delta)
                yield chat_response(shown.text, usage_of(prompt, await ticket.aresult()), delta="")
            finally:  # an abandoned `apieces` is closed when the loop gets to it; the request should leave now
                ticket.cancel()

        return responses()

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return completion_response(self.chat(self._one_message(prompt, formatted), **kwargs))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return completion_response(await self.achat(self._one_message(prompt, formatted), **kwargs))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        stream = self.stream_chat(self._one_message(prompt, formatted), **kwargs)
        return (completion_response(r) for r in stream)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any
                               ) -> CompletionResponseAsyncGen:
        stream = await self.astream_chat(self._one_message(prompt, formatted), **kwargs)
        return (completion_response(r) async for r in stream)

    def _one_message(self, prompt: str, formatted: bool) -> list[ChatMessage]:
        """A prompt in one string says not where its context is: no reference is looked for in it."""
        assert self.completion_to_prompt is not None
        text = prompt if formatted else self.completion_to_prompt(prompt)
        return [ChatMessage(role=MessageRole.USER, blocks=[PlainBlock(text=text)])]

    def _prepared(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]
                  ) -> tuple[ChatPrompt, GenerationSettings]:
        with audible():
            return self._prompt(messages), self._settings(kwargs)

    def _submit(self, prompt: ChatPrompt, settings: GenerationSettings) -> Ticket:
        with audible():
            return self._chat.submit(prompt, settings, quote=self.quote)

    def _prompt(self, messages: Sequence[ChatMessage]) -> ChatPrompt:
        turns, scope = read_messages(messages, self._chat, self._scope)
        if not any(turn.content for turn in turns):
            raise InputError("expected a message with text or spans, got none")
        return self._chat.prompt(turns, scope, on_error=self.on_error)

    def _settings(self, kwargs: dict[str, Any]) -> GenerationSettings:
        unknown = sorted(set(kwargs) - set(_SETTINGS))
        if unknown:
            raise InputError(f"this model has no setting {unknown[0]!r}; expected some of {', '.join(_SETTINGS)}")
        chosen: dict[str, Any] = {name: kwargs.get(name) if kwargs.get(name) is not None else getattr(self, name)
                                  for name in _SETTINGS}
        return GenerationSettings(max_new_tokens=chosen["max_tokens"], temperature=chosen["temperature"],
                                  top_p=chosen["top_p"], stop=chosen["stop"], seed=chosen["seed"])


__all__ = ["CtxcompLLM"]
