"""Extractive text by the real llmlingua and a tiny classifier of random weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast

from ctxcomp_rag.errors import InputError, ModelLoadError
from ctxcomp_rag.evaluation.extractive import LLMLingua2

WORDS = [f"word{i}" for i in range(40)]


class OneEach:
    """A token for every word."""

    def encode(self, text: str) -> list[int]:
        return [0] * len(text.split())


def classifier(folder: Path) -> Path:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForTokenClassification(BertConfig(vocab_size=200, hidden_size=16, num_hidden_layers=1, num_labels=2,
                                              num_attention_heads=2, intermediate_size=32)).save_pretrained(folder)
    return folder


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmlingua", None)
    with pytest.raises(InputError, match=r"pip install 'ctxcomp-rag\[llmlingua\]'"):
        LLMLingua2("model", OneEach())


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    pytest.importorskip("llmlingua", reason="the extra `llmlingua` is not installed")
    with pytest.raises(ModelLoadError, match=r"the LLMLingua-2 model '.*nowhere' cannot be loaded"):
        LLMLingua2(str(tmp_path / "nowhere"), OneEach())


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_the_share_of_words_that_is_kept(factor: float, tmp_path: Path) -> None:
    pytest.importorskip("llmlingua", reason="the extra `llmlingua` is not installed")
    extract = LLMLingua2(str(classifier(tmp_path / "bert-base-multilingual-cased-tiny")), OneEach())
    kept = extract(" ".join(WORDS), factor).split()
    assert kept == sorted(kept, key=WORDS.index)
    assert len(kept) == pytest.approx(len(WORDS) / factor, abs=2)


def test_a_model_whose_words_the_package_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("llmlingua", reason="the extra `llmlingua` is not installed")
    extract = LLMLingua2(str(classifier(tmp_path / "mine")), OneEach())
    with pytest.raises(ModelLoadError, match=r"does not know how words begin in '.*mine'; its folder must be called"):
        extract("word1 word2", 2.0)
