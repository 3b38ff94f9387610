"""The PCC recipe: the paper's stages over the right texts, and an encoder that begins as the decoder itself."""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import load_compressor, load_trained_compressor
from ctxcomp_rag.compressors.icae import ICAECompressor
from ctxcomp_rag.compressors.pcc import PCCCompressor
from ctxcomp_rag.training import BracketedAutoencoding, BracketedContinuation, BracketedQuestion, Stage
from tests.compressors.contract import assert_same_span

RECIPES = Path(__file__).parents[2] / "recipes"
TEXT = "The lamp of Varn is red. " * 20 + "Its keeper is called Osk."


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    kept = sys.modules.pop("train", None)  # the other recipe's
    sys.path.insert(0, str(RECIPES / "pcc"))
    try:
        import train
    finally:
        sys.path.remove(str(RECIPES / "pcc"))
        sys.modules.pop("train", None)
        if kept is not None:
            sys.modules["train"] = kept
    return train


@pytest.fixture(scope="module")
def compressor(recipe: ModuleType) -> PCCCompressor:
    made: PCCCompressor = recipe.make_compressor(load_frozen(dtype=torch.float32, device="cpu"), "embedded",
                                                 segment_tokens=48, rank=4, seed=0)
    return made


@pytest.fixture(scope="module")
def stages(recipe: ModuleType, compressor: PCCCompressor, tmp_path_factory: pytest.TempPathFactory) -> list[Stage]:
    data = tmp_path_factory.mktemp("data")
    asked = [{"question": "Who keeps it? ", "answers": [{"text": "Osk", "answer_start": TEXT.index("Osk")}]}]
    squad = {"data": [{"paragraphs": [{"context": TEXT, "qas": asked}]}]}
    with lzma.open(data / "squad-train-v1.1.json.xz", "wt", encoding="utf-8") as file:
        json.dump(squad, file)
    made: list[Stage] = recipe.make_stages(compressor, argparse.Namespace(
        data=data, documents=9, paragraphs=1, seed=0, batch_size=2, rate=1e-3, rate_warmup=1, warm_up=5, pretrain=6,
        questions=7))
    return made


def test_the_stages_are_the_papers(stages: list[Stage]) -> None:
    weights: list[dict[tuple[type, float | None], float]] = []
    for stage in stages:
        weights.append({})
        for source in stage.sources:
            key = type(source.objective), source.objective.factor
            weights[-1][key] = weights[-1].get(key, 0.0) + source.weight
    factors = {4.0: 0.5, 8.0: 0.3, 16.0: 0.2}
    shares = [{BracketedAutoencoding: 0.5, BracketedContinuation: 0.5},
              {BracketedQuestion: 0.75, BracketedAutoencoding: 0.25}]
    assert weights[0] == {(BracketedAutoencoding, None): 1.0}
    for found, share in zip(weights[1:], shares, strict=True):
        assert found == pytest.approx({(k, f): s * w for k, s in share.items() for f, w in factors.items()})
    assert [s.frozen for s in stages] == [(), ("special_rows",), ("special_rows",)]
    assert [s.steps for s in stages] == [5, 6, 7]


def test_the_warm_up_reads_short_texts(stages: list[Stage], compressor: PCCCompressor) -> None:
    encode = compressor.encoder.tokenizer.encode
    lengths = [[len(encode(e.context)) for e in stage.sources[0].examples] for stage in stages[:2]]
    assert max(lengths[0]) <= 12 < max(lengths[1]) <= 48


def test_squad_is_asked_about_the_piece_with_the_answer(stages: list[Stage]) -> None:
    [example] = stages[2].sources[3].examples
    assert (example.question, example.answer) == ("Who keeps it?", " Osk")
    assert "Osk" in example.context
    assert len(example.context) < len(TEXT)


def test_the_encoder_begins_as_the_decoder(compressor: PCCCompressor) -> None:
    backbone = compressor.backbone
    ids = torch.tensor([backbone.tokenizer.encode("The lamp of Varn is red.")])
    with torch.no_grad():
        torch.testing.assert_close(compressor.encoder.body(input_ids=ids).last_hidden_state,
                                   backbone.model.base_model(input_ids=ids).last_hidden_state, atol=1e-5, rtol=0)


def test_the_encoder_begins_as_that_of_an_icae_compressor(recipe: ModuleType) -> None:
    backbone = load_frozen(dtype=torch.float32, device="cpu")
    icae = load_trained_compressor("icae", backbone)
    assert isinstance(icae, ICAECompressor)
    compressor = recipe.make_compressor(backbone, "embedded", segment_tokens=48, rank=4, seed=0, begin=icae)
    ids = backbone.tokenizer.encode(TEXT)[:48]
    with torch.no_grad():
        torch.testing.assert_close(compressor.memory([ids])[0], icae.encode([ids])[0], atol=1e-4, rtol=0)
    assert torch.equal(compressor.special_rows[1], icae.memory_tokens[icae.config.num_memory_tokens])


def test_what_is_saved_in_half_the_bytes_is_loaded_as_it_was(recipe: ModuleType, compressor: PCCCompressor,
                                                             tmp_path: Path) -> None:
    chunk = Chunk("c", TEXT, 0, len(TEXT), 1)
    recipe.save_halved(compressor, tmp_path)
    again = load_compressor(tmp_path, compressor.backbone)
    assert again.spec.fingerprint == compressor.spec.fingerprint
    assert_same_span(again.compress([chunk])[0], compressor.compress([chunk])[0])
    stored = load_file(tmp_path / "encoder" / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
