"""Leakage: what both sides have is found, and the data that we train and measure on have nothing in common."""

from __future__ import annotations

import pytest

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.leakage import ngram_overlap, shared_subjects

TRAIN = ["One two three four five six.", "Nothing of it."]


def by_hand(train: list[str], held_out: list[str], n: int) -> tuple[int, int]:
    """(leaking texts, shared n-grams) by comparing everything with everything."""
    def grams(text: str) -> set[str]:
        words = text.lower().replace(".", "").split()
        return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}

    seen = set().union(*map(grams, train))
    return sum(bool(grams(t) & seen) for t in held_out), len(set().union(*map(grams, held_out)) & seen)


def test_shared_ngrams_are_found_whatever_their_case_and_punctuation() -> None:
    held_out = ["so TWO, three four five then", "five four three two", "two three four seven"]
    found = ngram_overlap(TRAIN, held_out, n=3)
    assert (found.texts, found.leaking, found.shared) == (3, 2, 2)
    assert found.examples == ("three four five", "two three four")


def test_it_equals_the_comparison_of_everything_with_everything() -> None:
    train = [d.text for d in generate_corpus(6, 0, "train")]
    held_out = [d.text for d in generate_corpus(6, 1, "held_out")]
    plain = [[" ".join(w for w in "".join(c for c in t.lower() if c.isalnum() or c == " ").split()
                       if w not in ("a", "an", "the")) for t in side] for side in (train, held_out)]
    for n in (1, 2, 4):
        found = ngram_overlap(train, held_out, n)
        assert (found.leaking, found.shared) == by_hand(*plain, n)


def test_a_short_text_leaks_only_where_all_of_it_is_there() -> None:
    assert ngram_overlap(TRAIN, ["three four"], n=13).leaking == 1
    assert ngram_overlap(TRAIN, ["three five"], n=13).leaking == 0
    with pytest.raises(InputError, match="at least one word, got 0"):
        ngram_overlap(TRAIN, ["x"], n=0)


def test_no_held_out_subject_is_ever_trained_on() -> None:
    train, held_out = generate_corpus(300, 0, "train"), generate_corpus(300, 1, "held_out")
    assert shared_subjects(train, held_out) == ()
    assert shared_subjects(train, train[:2]) == tuple(sorted({d.subject for d in train[:2]}))
