"""Scores: the SQuAD v1.1 definitions, and BLEU by sacrebleu."""

from __future__ import annotations

import pytest

from ctxcomp_rag.evaluation.metrics import bleu, exact_match, mean, normalise, token_f1


@pytest.mark.parametrize(("prediction", "references", "em", "f1"), [
    ("The Eiffel Tower.", ["eiffel tower"], 1.0, 1.0),
    ("eiffel tower in Paris", ["Eiffel Tower"], 0.0, 2 * 0.5 * 1.0 / 1.5),
    ("1904", ["in 1904", "1904"], 1.0, 1.0),
    ("blue", ["red"], 0.0, 0.0),
    ("", ["red"], 0.0, 0.0),
])
def test_exact_match_and_f1_follow_squad(prediction: str, references: list[str], em: float, f1: float) -> None:
    assert exact_match(prediction, references) == em
    assert token_f1(prediction, references) == pytest.approx(f1)


def test_normalisation_drops_case_punctuation_and_articles() -> None:
    assert normalise("  An  apple, a pear; THE end!") == "apple pear end"


def test_bleu_is_100_for_equal_texts_and_falls_with_every_difference() -> None:
    pytest.importorskip("sacrebleu", reason="the extra `eval` is not installed")
    reference = "The lighthouse on the northern cape was lit for the first time in 1904."
    assert bleu([reference], [reference]) == pytest.approx(100.0)
    assert 20 < bleu([reference.replace("1904", "1905")], [reference]) < 100


def test_the_mean_of_nothing_is_zero() -> None:
    assert (mean([]), mean([1.0, 0.0])) == (0.0, 0.5)
