"""What the decoder made, as LlamaIndex responses."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole

from ctxcomp_rag import ChatPrompt, Generation


def usage_of(prompt: ChatPrompt, made: Generation) -> dict[str, Any]:
    """`usage` counts positions of the decoder, slots included; `ctxcomp` says what they are made of.

    `cached_tokens` are positions that came as stored keys and values, so that no layer computed them.
    """
    positions, completion = made.usage.positions, made.completion_tokens
    return {
        "usage": {"prompt_tokens": positions, "completion_tokens": completion, "total_tokens": positions + completion,
                  "prompt_tokens_details": {"cached_tokens": prompt.cache_read(made.usage)}},
        "finish_reason": made.finish_reason,
        "ctxcomp": {"spans": len(prompt.chunk_ids), "slots": made.usage.slots, "text_tokens": made.usage.text_tokens,
                    "source_tokens": made.usage.source_tokens, "rejected": dict(prompt.rejected)},
    }


def chat_response(text: str, raw: dict[str, Any] | None = None, delta: str | None = None) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), raw=raw, delta=delta,
                        additional_kwargs=raw["usage"] if raw else {})


def completion_response(response: ChatResponse) -> CompletionResponse:
    return CompletionResponse(text=response.message.content or "", raw=response.raw, delta=response.delta,
                              additional_kwargs=response.additional_kwargs)


__all__ = ["chat_response", "completion_response", "usage_of"]
