"""Extractive text by the real llmlingua, where it is installed; its models and tables come from a network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ctxcomp_rag.errors import InputError, ModelLoadError
from ctxcomp_rag.evaluation.extractive import LLMLingua2


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmlingua", None)
    with pytest.raises(InputError, match=r"pip install 'ctxcomp-rag\[llmlingua\]'"):
        LLMLingua2("model")


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    pytest.importorskip("llmlingua", reason="the extra `llmlingua` is not installed")
    with pytest.raises(ModelLoadError, match=r"the LLMLingua-2 model '.*nowhere' cannot be loaded"):
        LLMLingua2(str(tmp_path / "nowhere"))
