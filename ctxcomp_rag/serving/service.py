"""From a chat request to a prompt: retrieve for the last question, or splice the spans that were referred to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctxcomp_rag.chat import ChatTurn, Content, SpanChat, SpanReference, context_places, with_references
from ctxcomp_rag.decoding import Message, Part
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index import RetrievedSpan
from ctxcomp_rag.pipeline import CompressedRAG
from ctxcomp_rag.serving.protocol import ChatMessage, ChatRequest


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prompt, and the retrieved chunks it was made from (none where the spans were referred to)."""

    parts: Sequence[Part]
    sources: tuple[RetrievedSpan, ...]


class SpanService:
    """One index and its decoder's tokenizer and embeddings, for all tenants. Blocking; to be called from threads.

    Args:
        canonical_order: splice retrieved spans in the order of their documents instead of by score, so that the same
            set of spans is the same prefix: what an engine's prefix cache needs to hit.
    """

    def __init__(self, rag: CompressedRAG, *, canonical_order: bool = False) -> None:
        self.rag, self.canonical_order = rag, canonical_order
        self.chat = SpanChat(rag.backbone, rag.memory, compressor=rag.compressor, on_invalid="raise")

    def retrieve(self, query: str, top_k: int, where: Mapping[str, Any] | None) -> list[RetrievedSpan]:
        """The nearest chunks, best first, with what others have committed to the index by now."""
        if not self.rag.memory.is_writer:
            self.rag.memory.refresh()
        return self.rag.retrieve(query, top_k=top_k, where=where)

    def references(self, sources: Sequence[RetrievedSpan], tenant: str) -> list[str]:
        """A reference to each chunk, good for this tenant only."""
        return [self.chat.references.mint(s.chunk.id, _scope(tenant)) for s in sources]

    def prepare(self, request: ChatRequest, tenant: str) -> Prepared:
        """The prompt of a chat request.

        Raises:
            SpanReferenceError: a reference is forged, expired, of another tenant, or no longer in the index.
            InputError: the last message is no question, or a field is not usable.
        """
        turns = _turns(request.messages)
        if any(isinstance(c, SpanReference) for turn in turns for c in turn.content):
            return Prepared(self.chat.prompt(turns, _scope(tenant), on_error="raise").parts, ())
        *said, last = [(turn.role, "".join(map(str, turn.content))) for turn in turns]
        if last[0] != "user":
            raise InputError(f"expected the last message to be the user's question, got one of role {last[0]!r}")
        question = last[1]
        sources = [] if request.mode == "none" else self.retrieve(question, request.top_k, request.where)
        if self.canonical_order:
            sources.sort(key=lambda s: (s.chunk.document_id, s.chunk.start, s.chunk.id))
        parts = self.rag.prompt(question, sources, request.mode,
                                history=[Message(role, (text,)) for role, text in said if text])
        return Prepared(parts, tuple(sources))


def _scope(tenant: str) -> str:
    return f"tenant:{tenant}"


def _turns(messages: Sequence[ChatMessage]) -> list[ChatTurn]:
    """Messages as turns. References in text count where a chain puts its context, never in what was said before."""
    roles = ["system" if m.role == "developer" else m.role for m in messages]
    places = context_places(roles)
    return [ChatTurn(role, _content(m, place in places)) for place, (role, m) in enumerate(zip(roles, messages,
                                                                                               strict=True))]


def _content(message: ChatMessage, may_refer: bool) -> tuple[Content, ...]:
    if isinstance(message.content, str):
        return with_references(message.content) if may_refer else (message.content,)
    content: list[Content] = []
    for part in message.content:
        if part.type == "text":
            content += with_references(part.text) if may_refer else (part.text,)
        elif message.role == "assistant":
            raise InputError("expected span parts in messages of the user or the system, got one in an answer")
        else:
            content.append(SpanReference(part.ref, part.text))
    return tuple(content)
