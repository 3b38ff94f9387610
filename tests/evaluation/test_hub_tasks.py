"""Tasks in the formats of the Hugging Face hub, read from folders and files of the same form; and generated ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.tasks import task_named
from ctxcomp_rag.evaluation.tasks.gsm8k import last_number
from ctxcomp_rag.evaluation.tasks.incontext import SHOTS

TRIVIA = {"question": "Where is the tower?", "answer": {"value": "Varn", "aliases": ["Varn", "", "City of Varn"]},
          "entity_pages": {"wiki_context": ["Nothing here.", "The tower of varn is tall.", " "]}}
NQ = {"question": {"text": "how tall is it"},
      "document": {"tokens": {"token": ["<P>", "It", "is", "31", "metres", "tall", "</P>"],
                              "is_html": [True, False, False, False, False, False, True]}},
      "annotations": {"short_answers": [{"start_token": [3], "end_token": [5]}, {"start_token": [], "end_token": []}]}}
GSM = {"question": "Two and three?", "answer": "2 + 3 = 5\n#### 5"}
SST = {"sentence": "a fine film ", "label": 1}
WSC = {"text": "The lamp fell on Osk because it was old.", "span1_text": "lamp", "span2_text": "it", "label": 1}
NEWS = {"article": "A lamp fell. Nobody was hurt.", "highlights": "Lamp falls."}


def folder(path: Path, **splits: list[dict[str, Any]]) -> Path:
    """A data set as `datasets` reads it from a folder: a JSON lines file for each split."""
    path.mkdir()
    for split, records in splits.items():
        (path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return path


def test_triviaqa_needs_the_page_that_states_an_answer_and_takes_aliases(tmp_path: Path) -> None:
    data = task_named("triviaqa").load(folder(tmp_path / "t", validation=[TRIVIA]), 5, 0)
    [asked] = data.asked
    assert asked.answers == ("Varn", "City of Varn")
    assert [d.text for d in data.documents] == ["Nothing here.", "The tower of varn is tall."]
    assert asked.place is not None
    name, begin, end = asked.place
    assert next(d for d in data.documents if d.id == name).text[begin:end] == "varn"


def test_natural_questions_are_read_without_markup_and_asked_where_they_have_a_short_answer(tmp_path: Path) -> None:
    without = {**NQ, "annotations": {"short_answers": [{"start_token": [], "end_token": []}]}}
    data = task_named("nq").load(folder(tmp_path / "n", validation=[NQ, without]), 5, 0)
    [asked], [document] = data.asked, data.documents
    assert document.text == "It is 31 metres tall "
    assert asked.answers == ("31 metres",)
    assert asked.place is not None
    assert document.text[asked.place[1] : asked.place[2]] == "31 metres"


@pytest.mark.parametrize(("name", "record", "shown", "answer"), [
    ("gsm8k", GSM, "Question: Two and three?\n2 + 3 = 5\n#### 5", "5"),
    ("sst2", SST, "Review: a fine film\nSentiment:\npositive", "positive"),
    ("wsc", WSC, 'The lamp fell on Osk because it was old.\nDoes "it" stand for "lamp"?\nyes', "yes"),
])
def test_examples_in_the_context_are_solved_and_come_from_the_training_split(
        name: str, record: dict[str, Any], shown: str, answer: str, tmp_path: Path) -> None:
    split = "test" if name == "gsm8k" else "validation"
    data = task_named(name).load(folder(tmp_path / "d", train=[record] * 20, **{split: [record] * 3}), 2, 0)
    assert [d.text for d in data.documents] == [shown] * SHOTS
    assert [a.answers for a in data.asked] == [(answer,)] * 2
    assert all(a.gold == tuple(d.id for d in data.documents) for a in data.asked)
    assert data.measures == ("em",)
    # of one file, the lines that are shown are not asked
    lines = tmp_path / "d" / "train.jsonl"
    again = task_named(name).load(lines, 5, 0)
    assert len(again.documents) == SHOTS
    assert len(again.asked) == 5
    lines.write_text(json.dumps(record))
    with pytest.raises(InputError, match=f"shows {SHOTS} solved examples; expected more than {SHOTS} records"):
        task_named(name).load(lines, 5, 0)


@pytest.mark.parametrize(("text", "number"), [("so 3 + 4 = 7", "7"), ("#### 1,234", "1234"), ("-2.5 it is", "-2.5"),
                                              (" none ", "none")])
def test_an_arithmetic_answer_is_its_last_number(text: str, number: str) -> None:
    assert last_number(text) == number


def test_summaries_are_asked_of_the_article(tmp_path: Path) -> None:
    data = task_named("summarisation").load(folder(tmp_path / "s", validation=[NEWS]), 5, 0)
    assert data.documents[0].text == NEWS["article"]
    assert data.asked[0].answers == (NEWS["highlights"],)
    assert data.measures == ("rouge1", "rouge2", "rouge_l")


def test_a_needle_stands_at_every_depth_of_every_length() -> None:
    data = task_named("needle").load(None, 9, 3)
    texts = {d.id: d.text for d in data.documents}
    assert {(a.about["documents"], a.about["depth"]) for a in data.asked} == {
        (float(n), d) for n in (2, 4, 8) for d in (0.0, 0.5, 1.0)}
    for asked in data.asked:
        hay = [texts[i] for i in asked.gold]
        at = round(asked.about["depth"] * (len(hay) - 1))
        assert asked.answers[0] in hay[at]
    assert data == task_named("needle").load(None, 9, 3)


def test_a_text_is_cut_into_what_is_read_and_what_follows(tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(40))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}))
    data = task_named("perplexity").load(tmp_path, 5, 0)
    assert text.startswith(data.documents[0].text + data.asked[0].answers[0])
    assert data.ask == "continue"
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "short"}))
    with pytest.raises(InputError, match="expected texts of at least 80 characters"):
        task_named("perplexity").load(tmp_path, 5, 0)
    with pytest.raises(InputError, match=r"pass --data with texts\.jsonl"):
        task_named("perplexity").load(None, 5, 0)


def test_reconstruction_reads_generated_texts_or_your_own(tmp_path: Path) -> None:
    assert len(task_named("reconstruction").load(None, 3, 0).documents) == 3
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": " "}))
    with pytest.raises(InputError, match="line 1: the text is empty"):
        task_named("reconstruction").load(tmp_path, 3, 0)


@pytest.mark.parametrize("name", ["triviaqa", "nq", "gsm8k", "sst2", "wsc", "summarisation"])
def test_without_network_a_data_set_says_what_to_pass(name: str) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(.*\); pass --data with a .jsonl file or a folder"):
        task_named(name).load(None, 1, 0)


@pytest.mark.parametrize(("name", "record", "message"), [
    ("triviaqa", {**TRIVIA, "answer": "Varn"}, "record 0: expected dict in 'answer', got str"),
    ("nq", {k: v for k, v in NQ.items() if k != "document"}, "expected a field 'document'"),
    ("summarisation", {"article": "x"}, "expected a field 'summary', found 'article'"),
    ("summarisation", {"article": "x", "highlights": " "}, "record 0: the question .* has no answer to compare with"),
])
def test_a_record_of_another_form_is_named(name: str, record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        task_named(name).load(folder(tmp_path / "d", validation=[record]), 1, 0)


@pytest.mark.parametrize(("name", "record", "message"), [
    ("gsm8k", {"question": "x", "answer": "5"}, "expected the result after '####'"),
    ("sst2", {"sentence": "x", "label": -1}, "expected a label from 0 to 1, got -1; hidden labels"),
])
def test_a_solution_that_cannot_be_scored_is_named(name: str, record: dict[str, Any], message: str,
                                                   tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join([json.dumps(record)] * 10))
    with pytest.raises(InputError, match=message):
        task_named(name).load(tmp_path / "x.jsonl", 2, 0)
