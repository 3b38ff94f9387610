"""Prompts that take documents with references: as blocks, or as text for chains that only know text."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from langchain_core.runnables.config import ensure_config

from ctxcomp_rag import InputError, find_references
from langchain_ctxcomp.chunks import REFERENCE_KEY

SPAN_DOCUMENT_PROMPT: BasePromptTemplate[str] = PromptTemplate.from_template("{" + REFERENCE_KEY + "}")
"""For `create_stuff_documents_chain(..., document_prompt=SPAN_DOCUMENT_PROMPT)` behind a `SpanDocumentCompressor`. The
model needs `ChatCtxcomp(..., allow_text_references=True)`."""


class SpanPrompt(RunnableSerializable[dict[str, Any], PromptValue]):
    """A chat prompt whose `{context}` is a list of documents: each becomes a block, its span or, without one, its text.

    References are taken from `Document` objects only; text that spells one stays text.

    Args:
        prompt: names the context in one or more of its messages, e.g. "{context}\\n\\nQuestion: {question}".
        context_variable: the name of the documents' variable.
    """

    prompt: ChatPromptTemplate
    context_variable: str = "context"

    def __init__(self, prompt: ChatPromptTemplate, **kwargs: Any) -> None:
        super().__init__(prompt=prompt, **kwargs)  # type: ignore[call-arg]
        if self.context_variable not in prompt.input_variables:
            raise InputError(f"expected a prompt with the variable {self.context_variable!r}, got one with "
                             f"{sorted(prompt.input_variables)}")

    def invoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> PromptValue:
        return self._call_with_config(self._expand, input, ensure_config(config), run_type="prompt")

    def _expand(self, input: dict[str, Any]) -> PromptValue:
        documents = input.get(self.context_variable)
        if not isinstance(documents, Sequence) or not all(isinstance(d, Document) for d in documents):
            raise InputError(f"expected a list of documents in {self.context_variable!r}, got "
                             f"{type(documents).__name__}; connect a retriever to it")
        mark = secrets.token_hex(16)  # nothing that a user wrote can spell it
        messages = self.prompt.format_messages(**{**input, self.context_variable: mark})
        return ChatPromptValue(messages=[_with_blocks(m, mark, documents) for m in messages])


def _with_blocks(message: BaseMessage, mark: str, documents: Sequence[Document]) -> BaseMessage:
    given: list[Any] = [message.content] if isinstance(message.content, str) else list(message.content)
    blocks: list[Any] = []
    for block in given:
        text = block if isinstance(block, str) else block.get("text") if block.get("type") == "text" else None
        if not isinstance(text, str) or mark not in text:
            blocks.append({"type": "text", "text": block} if isinstance(block, str) else block)
            continue
        for i, piece in enumerate(text.split(mark)):
            if i:
                blocks += _context(documents)
            if piece:
                blocks.append({"type": "text", "text": piece})
    if blocks == [{"type": "text", "text": message.content}]:
        return message
    return message.model_copy(update={"content": blocks})


def _context(documents: Sequence[Document]) -> list[dict[str, str]]:
    blocks: list[dict[str, str]] = []
    for document in documents:
        if blocks:
            blocks.append({"type": "text", "text": "\n\n"})
        reference = document.metadata.get(REFERENCE_KEY)  # the text itself where a document has no span
        text = document.page_content
        if isinstance(reference, str) and find_references(reference) == ["", reference, ""]:
            blocks.append({"type": "span", "ref": reference, "text": text})
        else:
            blocks.append({"type": "text", "text": text})
    return blocks


__all__ = ["SPAN_DOCUMENT_PROMPT", "SpanPrompt"]
