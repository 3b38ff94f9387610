"""A decoder that nobody trained anything for: documents to answers through KV spans, no file but the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctxcomp_rag import CompressedRAG, Document, GenerationSettings
from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor, InfiniPotConfig
from ctxcomp_rag.compressors.kv_scores import SnapKV
from ctxcomp_rag.errors import UnsupportedModelError
from ctxcomp_rag.pipeline import load_trained_compressor
from ctxcomp_rag.spans import KVSpan
from tests.tiny_models import LetterCounts, save_tiny

DOCUMENTS = [
    Document("varn", "The lighthouse of Varn was built in 1871. It is 31 metres high and its stairs are red."),
    Document("brel", "Brel is a village of potters. Every spring its market sells blue bowls and nothing else."),
    Document("osk", "The river Osk freezes in January, so the ferry to Osk rests until the first of March."),
]
SHORT = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "kb"
    with CompressedRAG.create(folder, model=model, compressor="infinipot", encoder=LetterCounts()) as rag:
        report = rag.index(DOCUMENTS)
        assert (report.documents, report.chunks, report.added) == (3, 3, 3)
        assert report.slots == pytest.approx(report.source_tokens / 4, abs=3)
        assert rag.index(DOCUMENTS).added == 0
    return folder


def test_stored_spans_are_the_compressors_own_bit_for_bit(model: Path, folder: Path) -> None:
    maker = load_trained_compressor("infinipot", load_frozen(model))
    with CompressedRAG.open(folder, model=model, encoder=LetterCounts()) as rag:
        assert rag.memory.spec.fingerprint == maker.spec.fingerprint
        hits = rag.retrieve(DOCUMENTS[1].text, top_k=3)
        assert hits[0].chunk.document_id == "brel"
        for hit, made in zip(hits, maker.compress([h.chunk for h in hits]), strict=True):
            assert isinstance(hit.span, KVSpan)
            assert isinstance(made, KVSpan)
            assert hit.span.keys.equal(made.keys)
            assert hit.span.values.equal(made.values)


def test_answers_are_read_from_spliced_spans_of_all_three_documents(model: Path, folder: Path) -> None:
    with CompressedRAG.open(folder, model=model, encoder=LetterCounts()) as rag:
        answer = rag.answer("How high is the lighthouse?", top_k=3, settings=SHORT)
        assert {s.chunk.document_id for s in answer.sources} == {"varn", "brel", "osk"}
        assert answer.usage.slots == sum(s.span.num_slots for s in answer.sources)
        assert answer.usage.source_tokens == sum(s.chunk.num_tokens for s in answer.sources)
        assert answer.completion_tokens >= 1


def test_a_budget_of_everything_answers_as_the_full_text_does(model: Path, tmp_path: Path) -> None:
    with CompressedRAG.create(tmp_path / "kb", model=model, compressor="infinipot", encoder=LetterCounts()) as rag:
        rag.index(DOCUMENTS[:1], factor=1.0)
        [source] = rag.retrieve("lighthouse", top_k=1)
        # the span stands first here, as it does not see what is before it: positions and attention are then the text's
        text, spans = (rag.decoder.logits([part, "\n\nHow high?"])
                       for part in (source.chunk.text, source.span))
    torch.testing.assert_close(spans, text[-len(spans) :], atol=1e-4, rtol=0)


def test_a_folder_of_saved_settings_can_be_named_too(model: Path, tmp_path: Path) -> None:
    backbone = load_frozen(model)
    config = InfiniPotConfig(num_slots=6, rule=SnapKV(window=3))
    InfiniPotCompressor(backbone, config).save_pretrained(tmp_path / "snap")
    loaded = load_trained_compressor(tmp_path / "snap", backbone)
    assert isinstance(loaded, InfiniPotCompressor)
    assert loaded.config == config
    with CompressedRAG.create(tmp_path / "kb", model=model, compressor=tmp_path / "snap",
                              encoder=LetterCounts()) as rag:
        assert rag.index(DOCUMENTS).slots == 18


def test_a_decoder_that_cannot_have_kv_spans_is_refused_before_an_index_is_made(tmp_path: Path) -> None:
    model = save_tiny("gpt2", tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="no rotary embedding"):
        CompressedRAG.create(tmp_path / "kb", model=model, compressor="infinipot", encoder=LetterCounts())
    assert not (tmp_path / "kb").exists()
