"""A decoder that nobody trained anything for: documents to answers through KV spans, no file but the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctxcomp_rag import CompressedRAG, Document, GenerationSettings
from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor, InfiniPotConfig
from ctxcomp_rag.errors import InputError, UnsupportedModelError
from ctxcomp_rag.index import RetrievedSpan
from ctxcomp_rag.kv.scores import SnapKV
from ctxcomp_rag.pipeline import blended, load_trained_compressor
from ctxcomp_rag.spans import KVSpan, SoftSpan
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
    with CompressedRAG.create(folder, model=model, compressor="infinipot", codec="exact",
                              encoder=LetterCounts()) as rag:
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
            assert hit.span.kept is not None
            assert made.kept is not None
            assert hit.span.kept.equal(made.kept)


def test_answers_are_read_from_spliced_spans_of_all_three_documents(model: Path, folder: Path) -> None:
    with CompressedRAG.open(folder, model=model, encoder=LetterCounts()) as rag:
        answer = rag.answer("How high is the lighthouse?", top_k=3, settings=SHORT)
        assert {s.chunk.document_id for s in answer.sources} == {"varn", "brel", "osk"}
        assert answer.usage.slots == sum(s.span.num_slots for s in answer.sources)
        assert answer.usage.source_tokens == sum(s.chunk.num_tokens for s in answer.sources)
        assert answer.completion_tokens >= 1


def test_a_cache_budget_answers_from_documents_that_do_not_fit_and_keeps_what_the_question_asks(
        model: Path, folder: Path) -> None:
    question = "How high is the lighthouse of Varn?"
    answers = []
    for budget in (None, 160):
        with CompressedRAG.open(folder, model=model, encoder=LetterCounts(), cache_budget=budget) as rag:
            answers.append(rag.answer(question, mode="text", settings=SHORT))
            parts = rag.prompt(question, rag.retrieve(question), "text")
            assert answers[-1].text == rag.decoder.generate(parts, SHORT, question=question).text.strip()
            assert "".join(rag.stream(question, mode="text", settings=SHORT)).strip() == answers[-1].text
    assert answers[0].usage == answers[1].usage
    assert answers[0].usage.positions > 160
    assert answers[0].text != answers[1].text


def test_spans_that_keep_every_token_and_are_blended_wholly_answer_as_the_text_does(model: Path,
                                                                                    tmp_path: Path) -> None:
    question = "How high is it?"
    with CompressedRAG.create(tmp_path / "kb", model=model, compressor="infinipot", budget="1x",
                              encoder=LetterCounts()) as rag:
        rag.index(DOCUMENTS)
        sources = rag.retrieve(question)
        spans, blends = (rag.decoder.logits(rag.prompt(question, sources, blend=b))[-1] for b in (0.0, 1.0))
        text = rag.decoder.logits(rag.prompt(question, sources, "text"))[-1]
        assert rag.answer(question, blend=1.0, settings=SHORT).text == rag.answer(question, mode="text",
                                                                                  settings=SHORT).text
    # each text is cut into tokens on its own here, as its span was
    assert rag.backbone.tokenizer.encode("a. \n\nB") == [i for t in ("a. ", "\n\n", "B")
                                                         for i in rag.backbone.tokenizer.encode(t)]
    torch.testing.assert_close(blends, text, atol=1e-4, rtol=0)
    assert (spans - text).abs().max() > 1e-3


def test_soft_spans_are_not_blended() -> None:
    chunk = Chunk("d", "some text", 0, 9, 2)
    span = SoftSpan(chunk.id, 2, torch.arange(1), 1, torch.zeros(1, 8))
    with pytest.raises(InputError, match=r"only KV spans and pre-rolled ones can be blended, .* is a soft span"):
        blended(RetrievedSpan(chunk, span, 1.0), 0.2)


def test_a_budget_for_a_folder_of_settings_is_refused(model: Path, tmp_path: Path) -> None:
    InfiniPotCompressor(load_frozen(model)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"say how large a span is; leave the budget out"):
        load_trained_compressor(tmp_path, load_frozen(model), "4x")


def test_a_budget_of_everything_answers_as_the_full_text_does(model: Path, tmp_path: Path) -> None:
    with CompressedRAG.create(tmp_path / "kb", model=model, compressor="infinipot", codec="exact",
                              encoder=LetterCounts()) as rag:
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
