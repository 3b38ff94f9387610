"""ChatCtxcomp: the frozen decoder as a LangChain chat model whose messages may hold spans."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list, run_in_executor
from pydantic import Field, PrivateAttr

from ctxcomp_rag import (
    ChatPrompt,
    Generation,
    GenerationSettings,
    InputError,
    SpanChat,
    Stripper,
    UnsupportedModelError,
)
from langchain_ctxcomp.messages import read_messages, without_system
from langchain_ctxcomp.minting import OnError
from langchain_ctxcomp.scope import current_scope, scope_of

_OPENED: WeakValueDictionary[tuple[str, str | None], SpanChat] = WeakValueDictionary()
_LOCK = threading.Lock()


class ChatCtxcomp(BaseChatModel):
    """A chat model over a `SpanChat`. Calls of all threads and tasks share the decoder and decode together.

    Args:
        chat: the decoder, the index and the references; or
        index: the folder of an index, opened once for all models that name it. A retriever must have the same
            `SpanChat`: take it from `span_chat`.
        model: where the decoder is, if not where the index says.
        max_tokens, temperature, top_p, stop, seed: as in `GenerationSettings`; calls may override them.
        allow_text_references: look for references in the text of system messages and of the last human message, as
            chains that only know text bring them (`SPAN_DOCUMENT_PROMPT`). Off, only "span" blocks are resolved.
        quote: an answer from spans is a run of words of their texts, or "not stated"; what has no spans is answered
            freely.
        on_error: what happens to a span that cannot be read: its text is shown, and counted in
            `response_metadata["ctxcomp"]["rejected"]`, or the error is raised.

    With neither `chat` nor `index`, the environment decides: CTXCOMP_INDEX, and CTXCOMP_MODEL where it is set.
    """

    index: str | None = None
    model: str | None = None
    max_tokens: int = Field(default=64, ge=1)
    temperature: float = 0.0
    top_p: float = 1.0
    stop: list[str] | None = None
    seed: int = 0
    allow_text_references: bool = False
    quote: bool = False
    on_error: OnError = "text"
    _chat: SpanChat = PrivateAttr()

    def __init__(self, chat: SpanChat | None = None, **kwargs: Any) -> None:
        if chat is None and kwargs.get("index") is None:
            kwargs["index"] = os.environ.get("CTXCOMP_INDEX")
            kwargs["model"] = kwargs.get("model") or os.environ.get("CTXCOMP_MODEL")
        super().__init__(**kwargs)
        if (chat is None) == (self.index is None):
            raise InputError("expected either a SpanChat or the folder of an index: ChatCtxcomp(chat), "
                             "ChatCtxcomp(index='kb'), or the environment variable CTXCOMP_INDEX")
        self._chat = SpanChat.require(chat) if chat is not None else _opened(str(self.index), self.model)
        self._settings(None, {})

    @property
    def span_chat(self) -> SpanChat:
        """For the retriever or the compressor of the same chain."""
        return self._chat

    @property
    def _llm_type(self) -> str:
        return "ctxcomp"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What an answer depends on besides the messages; LangChain's cache goes by it."""
        decoder, spec = self._chat.backbone.fingerprint, self._chat.index.spec
        return {"decoder": str(decoder), "weights": decoder.weights_digest, "spans": spec.fingerprint,
                "index": self._chat.index.location, "max_tokens": self.max_tokens, "temperature": self.temperature,
                "top_p": self.top_p, "stop": self.stop, "seed": self.seed,
                "allow_text_references": self.allow_text_references, "quote": self.quote}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(ls_provider="ctxcomp", ls_model_type="chat",
                                 ls_model_name=str(kwargs.get("model") or self._chat.backbone.model_id),
                                 ls_temperature=kwargs.get("temperature", self.temperature),
                                 ls_max_tokens=kwargs.get("max_tokens", self.max_tokens))
        if stop or self.stop:
            params["ls_stop"] = stop or self.stop
        return params

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """LangChain's cache key: an answer of one scope is none of another's, whatever its references say."""
        scope = hashlib.sha256(current_scope(self._chat).encode()).hexdigest()
        return f"{super()._get_llm_string(stop=stop, **kwargs)}|{scope}"

    # -- every call is made in the scope of its own configuration ------------------------------------------------------

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        with scope_of(config):
            return super().invoke(input, config, **kwargs)

    async def ainvoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
                      ) -> AIMessage:
        with scope_of(config):
            return await super().ainvoke(input, config, **kwargs)

    def batch(self, inputs: list[LanguageModelInput], config: RunnableConfig | list[RunnableConfig] | None = None, *,
              return_exceptions: bool = False, **kwargs: Any) -> list[AIMessage]:
        # LangChain's threads are as many as the cores; ours wait, and what they wait for decodes together
        room = self._chat.scheduler.max_batch
        configs = get_config_list(config, len(inputs))
        wide = [{**c, "max_concurrency": c.get("max_concurrency") or room} for c in configs]
        return super().batch(inputs, wide, return_exceptions=return_exceptions, **kwargs)  # type: ignore[arg-type]

    def stream(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
               ) -> Iterator[AIMessageChunk]:
        chunks = super().stream(input, config, **kwargs)
        try:
            with scope_of(config):  # references are resolved before the first piece
                first = next(chunks, None)
            if first is not None:
                yield first
                yield from chunks
        finally:
            chunks.close()  # type: ignore[attr-defined]

    async def astream(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
                      ) -> AsyncIterator[AIMessageChunk]:
        chunks = super().astream(input, config, **kwargs)
        try:
            with scope_of(config):
                first = await anext(chunks, None)
            if first is not None:
                yield first
                async for chunk in chunks:
                    yield chunk
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    # -- answers -----------------------------------------------------------------------------------------------------

    def _generate(self, messages: list[BaseMessage], stop: list[str] | None = None,
                  run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any) -> ChatResult:
        prompt = self._prompt(messages, current_scope(self._chat))
        ticket = self._chat.submit(prompt, self._settings(stop, kwargs), quote=self.quote)
        try:
            return self._result(prompt, ticket.result())
        finally:
            ticket.cancel()

    async def _agenerate(self, messages: list[BaseMessage], stop: list[str] | None = None,
                         run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any) -> ChatResult:
        prompt = await run_in_executor(None, self._prompt, messages, current_scope(self._chat))
        ticket = self._chat.submit(prompt, self._settings(stop, kwargs), quote=self.quote)
        return self._result(prompt, await ticket.aresult())

    def _stream(self, messages: list[BaseMessage], stop: list[str] | None = None,
                run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        prompt = self._prompt(messages, current_scope(self._chat))
        ticket = self._chat.submit(prompt, self._settings(stop, kwargs), quote=self.quote)
        shown = Stripper()
        try:
            for piece in ticket.pieces():
                if text := shown.feed(piece):
                    chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
                    if run_manager:
                        run_manager.on_llm_new_token(text, chunk=chunk)
                    yield chunk
            yield self._last_chunk(prompt, ticket.result())
        finally:
            ticket.cancel()

    async def _astream(self, messages: list[BaseMessage], stop: list[str] | None = None,
                       run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any
                       ) -> AsyncIterator[ChatGenerationChunk]:
        prompt = await run_in_executor(None, self._prompt, messages, current_scope(self._chat))
        ticket = self._chat.submit(prompt, self._settings(stop, kwargs), quote=self.quote)
        shown = Stripper()
        try:
            async for piece in ticket.apieces():
                if text := shown.feed(piece):
                    chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
                    if run_manager:
                        await run_manager.on_llm_new_token(text, chunk=chunk)
                    yield chunk
            yield self._last_chunk(prompt, await ticket.aresult())
        finally:  # an abandoned `apieces` is closed when the loop gets to it; the request should leave now
            ticket.cancel()

    # -- counting ----------------------------------------------------------------------------------------------------

    def get_token_ids(self, text: str) -> list[int]:
        return self._chat.backbone.tokenizer.encode(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Positions in the decoder: tokens of text and slots of spans, the chat template included."""
        return self._chat.count(self._prompt(messages, current_scope(self._chat)))

    # -- from messages to the decoder and back -----------------------------------------------------------------------

    def _prompt(self, messages: Sequence[BaseMessage], scope: str) -> ChatPrompt:
        turns = read_messages(messages, self._chat.with_references if self.allow_text_references else None)
        try:
            return self._chat.prompt(turns, scope, on_error=self.on_error)
        except UnsupportedModelError:
            if not any(t.role == "system" for t in turns):
                raise
            return self._chat.prompt(without_system(turns), scope, on_error=self.on_error)

    def _settings(self, stop: list[str] | None, kwargs: dict[str, Any]) -> GenerationSettings:
        chosen = {n: kwargs[n] if kwargs.get(n) is not None else getattr(self, n)
                  for n in ("max_tokens", "temperature", "top_p", "seed")}
        ends = stop if stop is not None else self.stop
        return GenerationSettings(max_new_tokens=chosen["max_tokens"], temperature=chosen["temperature"],
                                  top_p=chosen["top_p"], seed=chosen["seed"], stop=tuple(ends or ()))

    def _result(self, prompt: ChatPrompt, made: Generation) -> ChatResult:
        message = AIMessage(made.text.strip(), usage_metadata=_usage(prompt, made),
                            response_metadata=self._metadata(prompt, made))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _last_chunk(self, prompt: ChatPrompt, made: Generation) -> ChatGenerationChunk:
        return ChatGenerationChunk(message=AIMessageChunk(
            content="", usage_metadata=_usage(prompt, made), response_metadata=self._metadata(prompt, made),
            chunk_position="last"))

    def _metadata(self, prompt: ChatPrompt, made: Generation) -> dict[str, Any]:
        return {"model_name": self._chat.backbone.model_id, "finish_reason": made.finish_reason,
                "ctxcomp": {"spans": len(prompt.chunk_ids), "slots": made.usage.slots,
                            "text_tokens": made.usage.text_tokens, "source_tokens": made.usage.source_tokens,
                            "rejected": dict(prompt.rejected)}}


def _usage(prompt: ChatPrompt, made: Generation) -> UsageMetadata:
    """Positions, slots included; `cache_read` are those that came as stored keys and values, `cache_creation` those
    that this call has put into memory for the next one."""
    positions, answered = made.usage.positions, made.completion_tokens
    details = InputTokenDetails(cache_read=prompt.cache_read(made.usage), cache_creation=prompt.prerolled_now)
    return UsageMetadata(input_tokens=positions, output_tokens=answered, total_tokens=positions + answered,
                         input_token_details=details)


def _opened(index: str, model: str | None) -> SpanChat:
    """Models that name the same folder share one decoder."""
    key = (str(Path(index).resolve()), model)
    with _LOCK:
        found = _OPENED.get(key)
        if found is None or found.scheduler.closed:
            found = _OPENED[key] = SpanChat.open(index, model=model)
        return found


__all__ = ["ChatCtxcomp"]
