"""LangChain messages to turns of a `SpanChat`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage

from ctxcomp_rag import ChatTurn, InputError, SpanReference, context_places

_SEPARATOR = "\n\n"


Content = str | SpanReference


def read_messages(messages: Sequence[BaseMessage], scan: Callable[[str], tuple[Content, ...]] | None
                  ) -> list[ChatTurn]:
    """Turns with alternating roles; neighbours of one role become one turn, as chat templates expect.

    Args:
        scan: finds references in plain text; used where a chain puts its context (`context_places`), never on what was
            said before.

    Raises:
        InputError: there is something else than text and spans.
    """
    roles = [_role(message) for message in messages]
    human = [isinstance(message, HumanMessage) for message in messages]
    places = context_places([r if r != "user" or h else "tool" for r, h in zip(roles, human, strict=True)])
    turns: list[ChatTurn] = []
    for i, message in enumerate(messages):
        content = tuple(c for block in _blocks(message) for c in _content(block, scan if i in places else None))
        role = roles[i]
        if not human[i] and role != "system":
            content = tuple(_refused(c) for c in content)
        if turns and turns[-1].role == role:
            turns[-1] = ChatTurn(role, (*turns[-1].content, _SEPARATOR, *content))
        else:
            turns.append(ChatTurn(role, content))
    if not any(turn.content for turn in turns):
        raise InputError("expected a message with text or spans, got none")
    return turns


def without_system(turns: Sequence[ChatTurn]) -> list[ChatTurn]:
    """The system message at the head of the first user message, for templates that have no such role."""
    system = [t for t in turns if t.role == "system"]
    rest = [t for t in turns if t.role != "system"]
    head = tuple(c for t in system for c in (*t.content, _SEPARATOR))
    if not rest or rest[0].role != "user":
        return [ChatTurn("user", head[:-1]), *rest]
    return [ChatTurn("user", (*head, *rest[0].content)), *rest[1:]]


def _refused(content: Content) -> Content:
    """Our parts put no span into what a model or a tool said."""
    if isinstance(content, str):
        return content
    return SpanReference("", content.reference if content.text is None else content.text)


def _role(message: BaseMessage) -> str:
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, AIMessage):
        return "assistant"
    if isinstance(message, ChatMessage) and message.role in ("system", "assistant"):
        return message.role
    return "user"  # a tool's output is said to the model by somebody else


def _blocks(message: BaseMessage) -> list[Any]:
    return [message.content] if isinstance(message.content, str) else list(message.content)


def _content(block: Any, scan: Callable[[str], tuple[Content, ...]] | None) -> tuple[Content, ...]:
    if isinstance(block, str):
        return scan(block) if scan else (block,) if block else ()
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text" and isinstance(block.get("text"), str):
        return _content(block["text"], scan)
    if kind == "span" and isinstance(block.get("ref"), str):
        text = block.get("text")
        return (SpanReference(block["ref"], text if isinstance(text, str) else None),)
    if kind in ("reasoning", "thinking", "tool_call", "tool_use"):
        return ()
    raise InputError(f"expected messages of text and spans, got a block of type {kind!r}; this decoder reads no other "
                     "content, leave it out")


__all__ = ["read_messages", "without_system"]
