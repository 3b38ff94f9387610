"""One task, several systems, the same hits: what a run reports."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ctxcomp_rag.chunking import Document, split_document
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor
from ctxcomp_rag.decoding import FrozenDecoder, TokenIds, enclosed
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.metrics import exact_match, mean, token_f1
from ctxcomp_rag.evaluation.run import TaskResult, run_task
from ctxcomp_rag.evaluation.scoring import interval
from ctxcomp_rag.evaluation.systems import System, default_systems, further_systems
from ctxcomp_rag.evaluation.tasks import Asked, TaskData
from tests.tiny_models import tiny_backbone

DATA = TaskData(
    (Document("a", "the ship is in the harbour"), Document("b", "the tower is tall"), Document("c", "and the " * 300)),
    (Asked("where is the ship?", ("in the harbour",), ("a",), place=("a", 12, 26)),
     Asked("what is tall?", ("the tower",), ("b",), pool=("b", "c")),
     Asked("what else?", ("nothing",), ("c",))), answer_tokens=6)

CONFIG = ICAEConfig(num_memory_tokens=1, segment_tokens=64, slots="proportional", slot_positions="consecutive",
                    delimiters=("reconstruct",), lora_rank=2)


class WordVectors:
    """Texts that share words are near each other."""

    def encode(self, texts: list[str]) -> np.ndarray:
        words = ["ship", "tower", "tall", "harbour", "and"]
        return np.array([[3.0 * t.count(w) for w in words] + [0.01] for t in texts], np.float32)


@pytest.fixture(scope="module")
def result() -> TaskResult:
    compressor = ICAECompressor(tiny_backbone("llama"), CONFIG)
    return run_task(DATA, compressor, WordVectors(), top_k=2, timed=1)


def test_every_system_is_asked_in_every_setting_and_no_context_once(result: TaskResult) -> None:
    systems = ["full_text", "4x", "8x", "16x", "truncated_4x"]
    assert [(r.setting, r.system) for r in result.rows] == [
        *(("oracle", s) for s in [*systems, "no_context"]), *(("retrieved", s) for s in systems)]
    assert (result.questions, result.documents) == (3, 3)


def test_scores_are_those_of_the_answers_on_file(result: TaskResult) -> None:
    for row in result.rows:
        said = [a[f"{row.setting}/{row.system}"] for a in result.answers]
        pairs = list(zip(said, [q.answers for q in DATA.asked], strict=True))
        assert row.scores["em"] == round(100 * mean([exact_match(text, answers) for text, answers in pairs]), 1)
        assert row.scores["f1"] == round(100 * mean([token_f1(text, answers) for text, answers in pairs]), 1)
        assert row.intervals["f1"][0] <= row.scores["f1"] <= row.intervals["f1"][1]


def test_a_prompt_that_does_not_fit_the_window_is_counted_and_scored_as_wrong(result: TaskResult) -> None:
    rows = {(r.setting, r.system): r for r in result.rows}
    assert rows["oracle", "full_text"].too_long == 1
    assert rows["oracle", "16x"].too_long == 0
    assert result.answers[2]["oracle/full_text"] == ""


def test_retrieval_looks_in_the_questions_own_pool(result: TaskResult) -> None:
    """"nothing" stands nowhere, so two of three answers can be found."""
    assert result.retrieval_recall == round(200 / 3, 1)


def test_spans_take_fewer_positions_than_their_text(result: TaskResult) -> None:
    rows = {r.system: r for r in result.rows if r.setting == "retrieved"}
    assert rows["16x"].positions < rows["8x"].positions < rows["4x"].positions < rows["full_text"].positions
    assert rows["truncated_4x"].positions == rows["4x"].positions
    assert rows["16x"].cache_bytes < rows["full_text"].cache_bytes


def test_what_a_system_that_quotes_keeps_is_of_the_full_text_quoted() -> None:
    torch.manual_seed(0)
    compressor = ICAECompressor(tiny_backbone("llama"), CONFIG)
    data = replace(DATA, asked=(replace(DATA.asked[0], answers=("the ship", "harbour", "in", "is", "the")),))
    systems = default_systems([4]) + further_systems({}, [4], quote=True)
    result = run_task(data, compressor, WordVectors(), settings=["oracle"], systems=systems, timed=1)
    rows = {r.system: r for r in result.rows}
    quoted = rows["full_text_quoted"]
    assert quoted.of_full_text == (100.0 if quoted.scores["f1"] else None)
    for name in ("4x_quoted", "truncated_4x_quoted"):
        of = quoted.scores["f1"] and round(100 * rows[name].scores["f1"] / quoted.scores["f1"], 1)
        assert rows[name].of_full_text == (of or (0.0 if quoted.scores["f1"] else None))
        assert rows[name].positions == rows[name.removesuffix("_quoted")].positions


def test_the_interval_is_that_of_the_resampled_mean() -> None:
    scores = [0.0] * 50 + [100.0] * 50
    low, high = interval(scores, seed=3)
    assert 38 <= low <= 42  # 50 -+ 1.96 * 50 / sqrt(100)
    assert 58 <= high <= 62
    assert interval([100.0] * 9, seed=0) == (100.0, 100.0)


@pytest.mark.parametrize(("answers", "place", "given"), [
    (("harbour",), (84, 91), [1]),  # the chunk of the place, although others state the answer too
    (("osk. the tower",), (216, 230), [2, 3]),  # a border cuts the place: both sides of it
    (("osk. the tower", "Tall"), (216, 230), [3, 4]),  # where it is cut, another accepted answer is stated whole
    (("nothing",), (900, 907), [0, 1, 2, 3, 4]),  # the place is not in the document
])
def test_the_oracle_gives_the_chunk_of_the_answers_place_else_those_that_state_it_else_its_parts(
        answers: tuple[str, ...], place: tuple[int, int], given: list[int]) -> None:
    compressor = ICAECompressor(tiny_backbone("llama"), CONFIG)
    document = Document("d", "the ship lies in the harbour of osk. " * 6 + "the tower of varn is tall. " * 6)
    chunks = split_document(document, compressor.backbone.tokenizer, max_tokens=CONFIG.segment_tokens)
    assert [c.end for c in chunks] == [73, 147, 221, 329, 384]
    read: list[str] = []

    def extractor(text: str, factor: float) -> str:
        read.append(text)
        return text

    data = TaskData((document, *DATA.documents), (Asked("where?", answers, ("a", "d"), place=("d", *place)),))
    run_task(data, compressor, WordVectors(), settings=["oracle"], timed=0,
             systems=[System("extractive", "extractive", 4.0, extractor=extractor)])
    assert read == [chunks[i].text for i in given]


def test_an_unknown_setting_or_an_empty_task_is_refused() -> None:
    compressor = ICAECompressor(tiny_backbone("llama"), CONFIG)
    with pytest.raises(InputError, match="no setting 'orakel'; expected oracle or retrieved"):
        run_task(DATA, compressor, WordVectors(), settings=["orakel"])
    with pytest.raises(InputError, match="the task has no questions"):
        run_task(TaskData((), ()), compressor, WordVectors())


def test_codecs_mixed_prompts_extracts_and_further_compressors_read_the_same_hits() -> None:
    torch.manual_seed(0)
    compressor = ICAECompressor(tiny_backbone("llama"), CONFIG)
    other = InfiniPotCompressor(tiny_backbone("llama"))
    systems = default_systems([4]) + further_systems({"pot": other}, [4], codecs=["int8"], mixed=True,
                                                     extractor=lambda text, factor: text[: int(len(text) / factor)])
    result = run_task(DATA, compressor, WordVectors(), settings=["retrieved"], systems=systems, top_k=2, timed=0)
    rows = {r.system: r for r in result.rows}
    assert list(rows) == ["full_text", "4x", "truncated_4x", "no_context", "pot_4x", "4x_int8", "mixed_4x",
                          "extractive_4x"]
    assert rows["4x"].positions == rows["4x_int8"].positions == rows["pot_4x"].positions
    assert rows["4x"].positions < rows["mixed_4x"].positions < rows["full_text"].positions
    assert rows["extractive_4x"].positions < rows["full_text"].positions
    stored = {name: r.index_bytes for name, r in rows.items()}
    assert stored["no_context"] is stored["truncated_4x"] is None
    assert (stored["4x_int8"] or 0) < (stored["4x"] or 0) < (stored["pot_4x"] or 0)
    assert (stored["extractive_4x"] or 0) < (stored["full_text"] or 0)
    assert (rows["4x"].docs_per_second or 0) > 0
    assert rows["4x_int8"].docs_per_second is None  # its spans were there


def test_texts_are_read_out_of_spans_only() -> None:
    compressor = ICAECompressor(tiny_backbone("llama"), CONFIG)
    data = replace(DATA, documents=DATA.documents[:2], ask="repeat", measures=("bleu", "rouge_l", "numbers", "names"))
    result = run_task(data, compressor, WordVectors(), systems=default_systems([2, 4]))
    assert [(r.setting, r.system) for r in result.rows] == [("oracle", "2x"), ("oracle", "4x")]
    assert result.questions == 2
    assert [a["expected"] for a in result.answers] == [[d.text] for d in data.documents]
    assert set(result.rows[0].scores) == {"bleu", "rouge_l", "numbers", "names"}


def test_perplexity_is_that_of_the_decoders_logits() -> None:
    compressor = ICAECompressor(tiny_backbone("llama"), CONFIG)
    follows = " and the tower is tall"
    data = TaskData(DATA.documents[:1], (Asked("Go on.", (follows,), ("a",)),), ("perplexity",), ask="continue")
    result = run_task(data, compressor, WordVectors(), systems=default_systems([4]))
    decoder = FrozenDecoder(compressor.backbone)
    ids = compressor.backbone.tokenizer.encode(follows)
    chunk = split_document(DATA.documents[0], compressor.backbone.tokenizer, max_tokens=64)[0]
    prompts = {"full_text": [chunk.text], "4x": enclosed(compressor.compress([chunk])[0], compressor.spec)}
    rows = {r.system: r.scores["perplexity"] for r in result.rows}
    for name, parts in prompts.items():
        logits = decoder.logits([*parts, TokenIds(tuple(ids))])[-len(ids) - 1 : -1].log_softmax(-1)
        nats = -sum(float(row[i]) for row, i in zip(logits, ids, strict=True)) / len(ids)
        assert rows[name] == pytest.approx(math.exp(nats), rel=1e-3)
    assert set(rows) == {"full_text", "4x", "truncated_4x", "no_context"}


def test_rows_are_flat_in_json(result: TaskResult) -> None:
    content = json.loads(json.dumps(result.to_json()))
    row = content["rows"][1]
    assert (row["setting"], row["system"], row["factor"]) == ("oracle", "4x", 4)
    assert row["em_interval"] == list(result.rows[1].intervals["em"])
    assert {"em", "f1", "first_token_ms", "total_ms", "answers_per_second", "index_bytes", "docs_per_second",
            "cache_bytes", "positions", "of_full_text"} <= row.keys()
