"""LangChain's own tests of a chat model, on the embedded decoder, offline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from lc_setup import PROMPT, QUESTIONS, Setup

from ctxcomp_rag import SpanChat
from langchain_ctxcomp import ChatCtxcomp, SpanPrompt
from langchain_ctxcomp.scope import SCOPE_KEY

CONFIG: Any = {"configurable": {SCOPE_KEY: "standard tests"}}


class _OnTheSharedIndex:
    """The model is named by its index, as a user names it; all of them share one decoder."""

    @pytest.fixture(autouse=True)
    def _name_the_index(self, setup: Setup) -> None:
        type(self).folder = str(setup.rag.memory.path)  # type: ignore[attr-defined]

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatCtxcomp

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"index": type(self).folder}  # type: ignore[attr-defined]


class TestUnit(_OnTheSharedIndex, ChatModelUnitTests):
    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        folder: str = type(self).folder  # type: ignore[attr-defined]
        return {"CTXCOMP_INDEX": folder}, {}, {"index": folder}


class TestIntegration(_OnTheSharedIndex, ChatModelIntegrationTests):
    """What is skipped needs what this decoder has not: tools, structured output, images, a network to record. And
    another model for one call: one decoder reads the spans of an index."""

    @pytest.fixture(autouse=True)
    def _share_spans(self, setup: Setup) -> None:
        type(self).setup_ = setup  # type: ignore[attr-defined]

    @property
    def supports_model_override(self) -> bool:
        return False

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input", "cache_creation_input"],
                "stream": ["cache_read_input", "cache_creation_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        return self._prerolled(stream)[1]

    def invoke_with_cache_creation_input(self, *, stream: bool = False) -> AIMessage:
        return self._prerolled(stream)[0]

    def _prerolled(self, stream: bool) -> list[AIMessage]:
        """The same question twice, over spans that are kept as keys and values from the first time on."""
        setup: Setup = type(self).setup_  # type: ignore[attr-defined]
        chat = SpanChat(setup.rag.backbone, setup.rag.memory, references=setup.chat.references, prerolled_bytes=2**24)
        found = setup.store.as_retriever().invoke(QUESTIONS[0], config=CONFIG)
        message = SpanPrompt(PROMPT).invoke({"context": found, "question": QUESTIONS[0]})
        model = ChatCtxcomp(chat, max_tokens=4)
        said = [sum_of(model.stream(message, config=CONFIG)) if stream else model.invoke(message, config=CONFIG)
                for _ in range(2)]
        chat.scheduler.close()
        assert all(m.usage_metadata for m in said)
        return said


def sum_of(chunks: Iterator[AIMessageChunk]) -> AIMessageChunk:
    whole = next(chunks)
    for chunk in chunks:
        whole += chunk
    return whole
