"""What travels over HTTP: requests and answers in OpenAI's form, with our fields beside theirs.

Ours in a chat request: `top_k`, `where`, `mode`, and content parts `{"type": "span", "ref": ..., "text": ...}`. Ours in
an answer: `sources`, and `ctxcomp` beside the usage.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ctxcomp_rag.decoding import GenerationSettings, PromptUsage
from ctxcomp_rag.errors import CtxcompError
from ctxcomp_rag.index import RetrievedSpan
from ctxcomp_rag.pipeline import DEFAULT_TOP_K, Mode

MAX_TOP_K = 100
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "frequency_penalty": (0,),
    "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "parallel_tool_calls": (True, False),
}
"""What would change an answer in a way that is not made here, with the values that change nothing."""
_OF_NO_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


class RefusalError(CtxcompError):
    """A request that is answered with an HTTP error.

    Attributes:
        kind: OpenAI's `type`, such as "invalid_request_error".
        code: OpenAI's `code`, such as "context_length_exceeded".
        param: name of the field that is wrong.
    """

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None,
                 param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param, self.headers = status, kind, code, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class TextPart(BaseModel):
    """Text of a message."""

    type: Literal["text"]
    text: str


class SpanPart(BaseModel):
    """A reference that this server minted; `text` is what it stands for."""

    type: Literal["span"]
    ref: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One message. "developer" is another name of "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | SpanPart, Field(discriminator="type")]]


class StreamOptions(BaseModel):
    """What a stream ends with."""

    include_usage: bool = False


class _Retrieval(BaseModel):
    model_config = ConfigDict(extra="forbid")

    top_k: int = Field(DEFAULT_TOP_K, ge=1, le=MAX_TOP_K)
    where: dict[str, Any] | None = None


class ChatRequest(_Retrieval):
    """Body of `POST /v1/chat/completions`. The default temperature is 0: greedy, as in `CompressedRAG.answer`."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    mode: Mode = "spans"

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_made_here(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in _NEUTRAL.items():
            if data.get(name) is not None and data[name] not in neutral:
                raise RefusalError(400, f"{name}={data[name]!r:.80} is not supported; leave {name} out",
                                   code="unsupported_parameter", param=name)
        return {k: v for k, v in data.items() if k not in _NEUTRAL and k not in _OF_NO_EFFECT}

    @field_validator("stop")
    @classmethod
    def _at_most_four(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > 4:
            raise ValueError(f"expected at most 4 stop strings, got {len(stop)}")
        return stop

    def settings(self, default_max_tokens: int) -> GenerationSettings:
        """How to generate; a sampled answer without a seed gets one by chance."""
        temperature = self.temperature or 0.0
        seed = self.seed if self.seed is not None else secrets.randbits(63) if temperature else 0
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return GenerationSettings(self.max_completion_tokens or self.max_tokens or default_max_tokens, temperature,
                                  1.0 if self.top_p is None else self.top_p, stop, seed)


class RetrieveRequest(_Retrieval):
    """Body of `POST /v1/retrieve`."""

    query: str


def usage_body(usage: PromptUsage, completion_tokens: int) -> dict[str, Any]:
    """OpenAI's usage: positions in the decoder's cache, with our count of what they are beside it."""
    return {
        "prompt_tokens": usage.positions, "completion_tokens": completion_tokens,
        "total_tokens": usage.positions + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached}, "ctxcomp": asdict(usage),
    }


def source_body(source: RetrievedSpan) -> dict[str, Any]:
    """Where an answer comes from."""
    chunk = source.chunk
    return {"id": chunk.id, "document_id": chunk.document_id, "start": chunk.start, "end": chunk.end,
            "score": round(source.score, 6), "metadata": dict(chunk.metadata)}


def reference_body(source: RetrievedSpan, reference: str) -> dict[str, Any]:
    """A retrieved chunk with its reference, for a content part `{"type": "span", "ref": ..., "text": ...}`."""
    return {**source_body(source), "reference": reference, "text": source.chunk.text,
            "num_slots": source.span.num_slots, "num_source_tokens": source.span.num_source_tokens}


class AnswerBody:
    """The bodies of one answer: whole, or in chunks with one id."""

    def __init__(self, model: str, sources: Sequence[RetrievedSpan]) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._sources = [source_body(s) for s in sources]

    def whole(self, text: str, finish_reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {**self._head, "object": "chat.completion", "usage": usage, "sources": self._sources,
                "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}]}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk",
                "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}]}

    def first_chunk(self) -> dict[str, Any]:
        return {**self.chunk({"role": "assistant", "content": ""}), "sources": self._sources}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}
