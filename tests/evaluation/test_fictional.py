"""What the generator of the fictional knowledge base promises."""

import random
import re

import pytest

from ctxcomp_rag.evaluation.fictional import (
    FACT_KINDS,
    FIXED_WORDS,
    KINDS,
    NOT_STATED,
    FictionalDocument,
    Split,
    generate_corpus,
    generate_document,
    phrasings,
    split_of,
)


@pytest.fixture(scope="module")
def train() -> list[FictionalDocument]:
    return generate_corpus(2000, seed=1, split="train")


@pytest.fixture(scope="module")
def held_out() -> list[FictionalDocument]:
    return generate_corpus(500, seed=2)


def names(documents: list[FictionalDocument]) -> set[str]:
    words = {w for d in documents for w in re.findall(r"\b[A-Z][a-z]+", f"{d.subject} {d.text}")}
    return {word for word in words if word.lower() not in FIXED_WORDS}


def test_table_is_large_enough() -> None:
    assert len(set(KINDS)) >= 14
    assert len(set(FACT_KINDS)) == len(FACT_KINDS) >= 60
    for kind in KINDS:
        assert 5 <= sum(fact.startswith(f"{kind}.") for fact in FACT_KINDS) <= 8
    for fact in FACT_KINDS:
        statements, questions = phrasings(fact)
        assert len(set(statements)) >= 3
        assert len(set(questions)) >= 3
        assert all(re.search(r"\{[SPO]\}", template) for template in statements + questions)


def test_seed_determines_the_corpus() -> None:
    assert generate_corpus(50, seed=7) == generate_corpus(50, seed=7)
    assert generate_corpus(50, seed=7) != generate_corpus(50, seed=8)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_kind_can_be_chosen(split: Split) -> None:
    for kind in KINDS:
        assert generate_document(random.Random(3), split, kind=kind).kind == kind


def test_subjects_and_ids_are_unique(train: list[FictionalDocument]) -> None:
    assert len({d.subject for d in train}) == len({d.id for d in train}) == len(train)
    assert all(re.fullmatch(rf"{d.kind}-\d{{4}}", d.id) for d in train)


def test_held_out_names_never_occur_in_training(
    train: list[FictionalDocument], held_out: list[FictionalDocument]
) -> None:
    assert {split_of(name) for name in names(train)} == {"train"}
    assert {split_of(name) for name in names(held_out)} == {"held_out"}
    assert all(names([document]) for document in train)


def test_text_is_short_plain_and_names_its_subject(train: list[FictionalDocument]) -> None:
    for document in train:
        assert 45 <= len(document.text.split()) <= 110
        assert document.text.replace("£", "").isascii()
        assert document.subject in document.text
        assert not re.search(r"[{}|]|  |\b[Aa] [aeiou]|\b[Aa]n [^aeiouAEIOU]", document.text)


def test_answers_are_verbatim_distinct_and_short(train: list[FictionalDocument]) -> None:
    for document in train:
        answers = [qa.answer for qa in document.questions]
        assert 4 <= len(answers) <= 7
        assert len(set(answers)) == len(answers)
        for answer in answers:
            assert len(re.findall(rf"(?<!\w){re.escape(answer)}(?!\w)", document.text)) == 1
            assert 1 <= len(answer.split()) <= 5


def test_numbers_in_a_document_are_distinct(train: list[FictionalDocument]) -> None:
    for document in train:
        numbers = re.findall(r"\d+(?:[,.:]\d+)*", document.text)
        assert len(set(numbers)) == len(numbers)


def test_questions_name_the_subject(train: list[FictionalDocument]) -> None:
    for document in train:
        for qa in document.questions + document.unanswerable:
            assert document.subject in qa.question
            assert qa.question.endswith("?")
            assert qa.fact in FACT_KINDS
            assert qa.fact.startswith(f"{document.kind}.")


def test_unanswerable_facts_are_not_stated(train: list[FictionalDocument]) -> None:
    for document in train:
        stated = {qa.fact for qa in document.questions}
        assert len({qa.question for qa in document.unanswerable}) == 2
        for qa in document.unanswerable:
            assert qa.answer == NOT_STATED
            assert qa.fact not in stated
