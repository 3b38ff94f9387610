"""Tasks: what a file must hold, and the sentence for one that does not."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.tasks import TASKS, task_named

SQUAD = {"data": [{"title": "T", "paragraphs": [
    {"context": "The tower is 31 metres tall.", "qas": [
        {"question": " How tall is it? ", "answers": [{"text": "31 metres", "answer_start": 13},
                                                     {"text": "31", "answer_start": 13}]}]},
    {"context": "Nobody lives there.", "qas": [
        {"question": "Who lives there?", "answers": [{"text": "Nobody", "answer_start": 0}]}]}]}]}
HOTPOT = {"id": "h1", "question": "Which city?", "answer": "Tulsa", "supporting_facts": {"title": ["A", "C"]},
          "context": {"title": ["A", "B", "C"], "sentences": [["One.", " Two."], ["Three."], ["In Tulsa."]]}}


def written(path: Path, *records: Any) -> Path:
    text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return path


def test_squad_gives_paragraphs_and_questions_with_the_place_of_the_answer(tmp_path: Path) -> None:
    data = task_named("squad").load(written(tmp_path / "squad.json.xz", SQUAD), limit=10, seed=0)
    asked = {q.question: q for q in data.asked}
    tall = asked["How tall is it?"]
    assert tall.answers == ("31 metres", "31")
    assert tall.place is not None
    document = next(d for d in data.documents if d.id == tall.place[0])
    assert document.text[tall.place[1] : tall.place[2]] == "31 metres"
    assert {d.text for d in data.documents} == {p["context"] for p in SQUAD["data"][0]["paragraphs"]}


def test_a_limit_draws_by_the_seed_and_brings_only_the_documents_it_needs(tmp_path: Path) -> None:
    path = written(tmp_path / "squad.json", SQUAD)
    draws = {seed: task_named("squad").load(path, limit=1, seed=seed) for seed in range(8)}
    assert {d.asked[0].question for d in draws.values()} == {"How tall is it?", "Who lives there?"}
    assert all(tuple(x.id for x in d.documents) == d.asked[0].gold for d in draws.values())
    assert draws[3] == task_named("squad").load(path, limit=1, seed=3)


def test_hotpotqa_searches_its_own_paragraphs_and_needs_the_supporting_ones(tmp_path: Path) -> None:
    data = task_named("hotpotqa").load(written(tmp_path / "h.jsonl", HOTPOT), limit=5, seed=0)
    (asked,) = data.asked
    assert [d.text for d in data.documents] == ["A: One. Two.", "B: Three.", "C: In Tulsa."]
    assert asked.gold == (data.documents[0].id, data.documents[2].id)
    assert asked.pool == tuple(d.id for d in data.documents)


def test_own_questions_are_lines_of_question_answer_context(tmp_path: Path) -> None:
    path = written(tmp_path / "questions.jsonl", {"question": "a?", "answer": "b", "context": "a is b"}, "",
                   {"question": "c?", "answers": ["d", "e"], "context": ["x", "c is d"]})
    data = task_named("jsonl").load(tmp_path, limit=9, seed=0)
    asked = {q.question: q for q in data.asked}
    assert asked["a?"].answers == ("b",)
    assert asked["a?"].pool == ()
    assert asked["c?"].answers == ("d", "e")
    assert len(asked["c?"].pool) == 2
    assert path.exists()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_a_file_ends_where_json_lines_end(end: str, tmp_path: Path) -> None:
    context = "One\u2028two\x85three"  # separators of lines that may stand in a string of JSON
    record = {"question": "what?", "answer": "two", "context": context}
    path = tmp_path / "own.jsonl"
    path.write_bytes((json.dumps(record, ensure_ascii=False) + end).encode() * 2 + b"{}" + end.encode())
    with pytest.raises(InputError, match=r"own\.jsonl line 3: expected a field"):
        task_named("jsonl").load(path, 3, seed=0)
    path.write_bytes((json.dumps(record, ensure_ascii=False) + end).encode() * 2)
    assert {d.text for d in task_named("jsonl").load(path, 2, seed=0).documents} == {context}


def test_the_home_ground_needs_no_file_and_states_its_answers() -> None:
    data = task_named("home").load(None, limit=5, seed=1)
    texts = {d.id: d.text for d in data.documents}
    assert all(q.answers[0] in texts[q.gold[0]] for q in data.asked)


@pytest.mark.parametrize(("name", "message"), [
    ("squat", "there is no task 'squat'; did you mean squad?"),
    ("zzz", "there is no task 'zzz'; expected one of home, squad, hotpotqa, jsonl, triviaqa, nq"),
])
def test_a_misspelt_task_is_answered_with_the_nearest_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        task_named(name)


@pytest.mark.parametrize("name", sorted(name for name, task in TASKS.items() if task.file and name != "reconstruction"))
def test_a_task_without_its_file_says_which_one_it_reads(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"pass --data with {TASKS[name].file}"):
        TASKS[name].load(None, 1, 0)
    with pytest.raises(InputError, match=f"expected {TASKS[name].file} for task '{name}'"):
        TASKS[name].load(tmp_path / "nowhere", 1, 0)


@pytest.mark.parametrize(("record", "message"), [
    ("{", "line 1 is not JSON"),
    ("[]", "line 1: expected an object, got list"),
    ({"question": "a?", "context": "x"}, "line 1: expected a field 'answer', found 'question', 'context'"),
    ({"question": "a?", "answer": 3, "context": "x"}, "line 1: expected str in 'answer', got int"),
    ({"question": "a?", "answer": " ", "context": "x"}, "line 1: the question 'a\\?' has no answer to compare with"),
    ({"question": " ", "answer": "b", "context": "x"}, r"^q\.jsonl line 1: a question is empty"),
    ({"answer": "b", "context": "x"}, r"^q\.jsonl line 1: expected a field 'question'"),
    ({"question": "a?", "answers": ["", "31 m"], "context": "x"}, r"^q\.jsonl line 1: one of the answers .* is blank"),
    ({"question": "a?", "answers": [None], "context": "x"}, r"^q\.jsonl line 1: expected texts in 'answers', got None"),
    ({"question": "a?", "answers": ["b", 3], "context": "x"}, "line 1: expected texts in 'answers', got 3; put it in"),
    ({"question": "a?", "answers": [], "context": "x"}, "line 1: the question 'a\\?' has no answer to compare with"),
    ({"question": "a?", "answer": "b", "context": ["x", ""]}, "line 1: expected text in 'context'"),
    ({"question": "a?", "answer": "b"}, "expected a field 'context'"),
])
def test_a_record_that_cannot_be_used_is_named_with_its_line(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        task_named("jsonl").load(written(tmp_path / "q.jsonl", record), 5, 0)


@pytest.mark.parametrize(("content", "message"), [
    (b"\xff\xfe", "cannot be read .* expected UTF-8 JSON, plain or .xz"),
    (b"{}", "is not SQuAD: expected an object with a list 'data'"),
    (b"{", "is not JSON"),
])
def test_a_file_that_is_not_squad_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        task_named("squad").load(path, 5, 0)


PLACE = r"^squad\.json article 0, paragraph 0, question 1: "


@pytest.mark.parametrize(("qa", "message"), [
    ({"question": "?", "answers": [{"text": "31", "answer_start": "two"}]}, "expected int in 'answer_start', got str"),
    ({"question": "who?", "answers": []}, "the question 'who\\?' has no answer to compare with; give it one, or leave"),
    ({"question": "who?", "answers": ["31"]}, "expected an object, got str"),
    ({"question": "who?", "answers": [{"text": "31"}, {"text": " "}]}, "one of the answers .* is blank"),
    ({"question": " ", "answers": [{"text": "31"}]}, "a question is empty"),
    (["who?"], "expected an object, got list"),
])
def test_a_question_of_squad_that_cannot_be_used_is_named_with_its_place(qa: Any, message: str, tmp_path: Path) -> None:
    paragraph = SQUAD["data"][0]["paragraphs"][0]
    content = {"data": [{"paragraphs": [{**paragraph, "qas": [*paragraph["qas"], qa]}]}]}
    with pytest.raises(InputError, match=PLACE + message):
        task_named("squad").load(written(tmp_path / "squad.json", content), 5, 0)


def test_an_answer_without_a_place_in_squad_is_asked_of_the_whole_paragraph(tmp_path: Path) -> None:
    qas = [{"question": "who?", "answers": [{"text": "31"}]}]
    content = {"data": [{"paragraphs": [{"context": "31 of them", "qas": qas}]}]}
    [asked] = task_named("squad").load(written(tmp_path / "squad.json", content), 5, 0).asked
    assert (asked.gold, asked.place) == (("squad/0/0",), None)


def test_a_task_names_the_files_that_it_reads(tmp_path: Path) -> None:
    squad = written(tmp_path / "squad-dev-v1.1.json.xz", SQUAD)
    assert task_named("squad").files(tmp_path) == task_named("squad").files(squad) == [squad]
    assert task_named("home").files(squad) == task_named("needle").files(None) == []
    assert task_named("gsm8k").files(squad) == task_named("gsm8k").files(tmp_path) == [squad]
    assert task_named("nq").files(Path("somebody/natural_questions")) == []  # an id of the hub
