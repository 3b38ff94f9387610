"""LangChain's own tests of a chat model, on the embedded decoder, offline."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from lc_setup import Setup

from langchain_ctxcomp import ChatCtxcomp


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
    pass


class TestIntegration(_OnTheSharedIndex, ChatModelIntegrationTests):
    @property
    def supports_model_override(self) -> bool:
        return False  # one decoder reads the spans of an index
