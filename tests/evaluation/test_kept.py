"""Figures for rules and budgets count what they say, on documents that the rules had to forget most of."""

from __future__ import annotations

import pytest

from ctxcomp_rag.backbone import Backbone, load_frozen
from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor
from ctxcomp_rag.evaluation.kept import (
    CONFIGS,
    score_question_aware,
    score_spans,
    score_text,
    single_document_questions,
)
from ctxcomp_rag.evaluation.systems import Question


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_frozen()


@pytest.fixture(scope="module")
def questions(backbone: Backbone) -> list[Question]:
    return single_document_questions(InfiniPotCompressor(backbone), 4, seed=1)


def test_every_question_is_answered_by_its_only_chunk(questions: list[Question]) -> None:
    assert len({q.chunks[0].document_id for q in questions}) == 4
    assert all(q.answers[0] in q.chunks[0].text for q in questions)


def test_spans_of_a_quarter_take_a_quarter_of_the_positions_and_spans_of_all_answer_as_the_text(
        backbone: Backbone, questions: list[Question]) -> None:
    full = score_text(backbone, questions)
    tokens = sum(q.chunks[0].num_tokens for q in questions) / 4
    assert full.positions == round(tokens, 1)
    maker = InfiniPotCompressor(backbone, CONFIGS["infinipot"])
    whole, quarter = (score_spans("infinipot", maker, questions, f) for f in (1.0, 4.0))
    assert whole.positions == full.positions
    assert whole.exact_match == full.exact_match == 100.0
    assert tokens / 4 <= quarter.positions < tokens / 4 + 1


def test_what_is_kept_for_a_question_answers_it_where_chance_does_not(backbone: Backbone,
                                                                     questions: list[Question]) -> None:
    asked = score_question_aware(backbone, questions, 8.0)
    chance = score_spans("random", InfiniPotCompressor(backbone, CONFIGS["random"]), questions, 8.0)
    assert asked.positions == chance.positions
    assert asked.exact_match > chance.exact_match
