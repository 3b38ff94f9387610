"""Scores against values worked out by hand."""

from __future__ import annotations

import pytest

from ctxcomp_rag.evaluation.metrics import names_kept, numbers_kept, rouge
from ctxcomp_rag.evaluation.scoring import MEASURES, score


def test_rouge_is_the_overlap_of_words_pairs_and_the_longest_run() -> None:
    said, wanted = "the red lamp fell", ["the lamp fell", "unrelated words"]
    assert rouge(said, wanted, "rouge1") == pytest.approx(2 * (3 / 4) * 1 / (3 / 4 + 1))
    assert rouge(said, wanted, "rouge2") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert rouge(said, wanted, "rougeL") == pytest.approx(2 * (3 / 4) * 1 / (3 / 4 + 1))


def test_numbers_and_names_count_only_where_they_are_exact() -> None:
    text = "Lit in 1904, the Varn tower is 31.5 metres; Osk Hale of Varn paid 1,200 pounds."
    assert numbers_kept("1904 and 31.5, not 1,300", [text]) == pytest.approx(2 / 3)
    assert names_kept("Varn and Hale", [text]) == pytest.approx(2 / 4)  # Varn, Osk, Hale, Varn
    assert numbers_kept("x", ["no digits"]) is None
    assert names_kept("x", ["Only a beginning."]) is None


@pytest.mark.parametrize("measure", [*MEASURES, "bleu"])
def test_what_is_right_scores_100_and_what_is_not_0(measure: str) -> None:
    texts = [f"The Varn tower number {i} was lit by Osk Hale in 1904" for i in range(4)]
    references = [(t,) for t in texts]
    assert score(measure, texts, references, seed=1) == (100.0, (100.0, 100.0))
    value, (low, high) = score(measure, ["zzz"] * 4, references, seed=1)
    assert (value, low, high) == (0.0, 0.0, 0.0)


def test_the_interval_of_bleu_is_drawn_by_the_seed() -> None:
    said = ["the red lamp of the old tower fell down", "nothing like it at all in here", "the lamp is red"] * 3
    wanted = [("the red lamp of the tower fell down",), ("some other words stand here",), ("the lamp is red",)] * 3
    once, again = score("bleu", said, wanted, 1), score("bleu", said, wanted, 1)
    assert once == again
    assert once[1][0] < once[0] < once[1][1]
