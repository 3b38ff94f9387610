"""LlamaIndex messages to turns of a `SpanChat`: text stays text, blocks and minted references become spans."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock, ThinkingBlock

from ctxcomp_rag import ChatTurn, InputError, SpanChat, SpanReference, context_places, find_references, new_scope
from llama_index_ctxcomp.blocks import SpanBlock
from llama_index_ctxcomp.minted import ledger_of

_ROLES = {
    MessageRole.SYSTEM: "system", MessageRole.DEVELOPER: "system",
    MessageRole.ASSISTANT: "assistant", MessageRole.CHATBOT: "assistant", MessageRole.MODEL: "assistant",
}  # a tool's output is said to the model by somebody else: user


def read_messages(messages: Sequence[ChatMessage], chat: SpanChat, scope: str | None) -> tuple[list[ChatTurn], str]:
    """Turns, and the scope in which their references are to be resolved.

    References in text are looked for where a synthesizer puts its context (`context_places`), never in what was said
    before. Only with a scope, and only in plain `TextBlock`s.

    Raises:
        InputError: there is something else than text and spans.
    """
    blocks = [b for m in messages for b in m.blocks if isinstance(b, SpanBlock)]
    used = scope or (blocks[0].minted.scope if blocks else new_scope())
    places = context_places(["user" if m.role == MessageRole.USER else _ROLES.get(m.role, "tool") for m in messages])
    turns = []
    for i, message in enumerate(messages):
        content = tuple(c for b in message.blocks for c in _content(b, chat, scope, i in places))
        turns.append(ChatTurn(_ROLES.get(message.role, "user"), content))
    return turns, used


def _content(block: object, chat: SpanChat, scope: str | None, context: bool) -> tuple[str | SpanReference, ...]:
    if isinstance(block, SpanBlock):
        return (SpanReference(block.minted.reference, block.minted.text),)
    if isinstance(block, ThinkingBlock):
        return ()
    if not isinstance(block, TextBlock):
        raise InputError(f"expected messages of text and spans, got a {type(block).__name__}; this decoder reads no "
                         "other content, leave it out")
    if type(block) is not TextBlock or not context:
        return (block.text,)
    return _scanned(block.text, chat, scope)


def _scanned(text: str, chat: SpanChat, scope: str | None) -> tuple[str | SpanReference, ...]:
    ledger = ledger_of(chat)
    if scope is None:
        if any(reference in ledger for reference in find_references(text)[1::2]):
            raise InputError("a reference to a span came as text, but this model was given no scope to resolve it in; "
                             "pass CtxcompLLM(chat, scope=...) the scope of the SpanPostprocessor, or use "
                             "SpanSynthesizer")
        return (text,)
    found = []
    for piece in chat.with_references(text):
        if isinstance(piece, SpanReference) and (minted := ledger.find(piece.reference, scope)) is not None:
            piece = SpanReference(piece.reference, minted.text)
        found.append(piece)
    return tuple(found)


__all__ = ["read_messages"]
