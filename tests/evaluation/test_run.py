"""One task, several systems, the same hits: what a run reports."""

from __future__ import annotations

import numpy as np
import pytest

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.metrics import exact_match, mean, token_f1
from ctxcomp_rag.evaluation.run import TaskResult, interval, run_task
from ctxcomp_rag.evaluation.tasks import Asked, TaskData
from tests.tiny_models import tiny_backbone

DATA = TaskData(
    (Document("a", "the ship is in the harbour"), Document("b", "the tower is tall"), Document("c", "and the " * 300)),
    (Asked("where is the ship?", ("in the harbour",), ("a",), place=("a", 12, 26)),
     Asked("what is tall?", ("the tower",), ("b",), pool=("b", "c")),
     Asked("what else?", ("nothing",), ("c",))))

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
    return run_task(DATA, compressor, WordVectors(), top_k=2, timed=1, max_new_tokens=6)


def test_every_system_is_asked_in_every_setting_and_no_context_once(result: TaskResult) -> None:
    systems = ["full_text", "4x", "8x", "16x", "truncated_4x"]
    assert [(r.setting, r.system) for r in result.rows] == [
        *(("oracle", s) for s in [*systems, "no_context"]), *(("retrieved", s) for s in systems)]
    assert (result.questions, result.documents) == (3, 3)


def test_scores_are_those_of_the_answers_on_file(result: TaskResult) -> None:
    for row in result.rows:
        said = [a[f"{row.setting}/{row.system}"] for a in result.answers]
        pairs = list(zip(said, [q.answers for q in DATA.asked], strict=True))
        assert row.em == round(100 * mean([exact_match(text, answers) for text, answers in pairs]), 1)
        assert row.f1 == round(100 * mean([token_f1(text, answers) for text, answers in pairs]), 1)
        assert row.f1_interval[0] <= row.f1 <= row.f1_interval[1]


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


def test_the_interval_is_that_of_the_resampled_mean() -> None:
    scores = [0.0] * 50 + [100.0] * 50
    low, high = interval(scores, seed=3)
    assert 38 <= low <= 42  # 50 -+ 1.96 * 50 / sqrt(100)
    assert 58 <= high <= 62
    assert interval([100.0] * 9, seed=0) == (100.0, 100.0)


def test_an_unknown_setting_or_an_empty_task_is_refused() -> None:
    compressor = ICAECompressor(tiny_backbone("llama"), CONFIG)
    with pytest.raises(InputError, match="no setting 'orakel'; expected oracle or retrieved"):
        run_task(DATA, compressor, WordVectors(), settings=["orakel"])
    with pytest.raises(InputError, match="the task has no questions"):
        run_task(TaskData((), ()), compressor, WordVectors())
