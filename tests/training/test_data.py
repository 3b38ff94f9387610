"""Texts and questions as examples: none is lost without a word, and none shares text with what is held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.training import Example, passages
from ctxcomp_rag.training.config import DataConfig, HeldOutConfig, SourceConfig, StageConfig, TrainConfig
from ctxcomp_rag.training.data import load_examples
from ctxcomp_rag.training.examples import examples_digest
from ctxcomp_rag.training.run import hold_out
from tests.tiny_models import tiny_backbone

TOKENIZER = tiny_backbone("llama").tokenizer
WORDS = [f"w{i:03}" for i in range(400)]
"""No two alike, so that a word says which characters of the text it is."""


def words(examples: Sequence[Example]) -> set[str]:
    return {word for e in examples for word in (e.context + e.continuation).split()}


def config(data: dict[str, DataConfig], held_out: HeldOutConfig) -> TrainConfig:
    sources = [SourceConfig("autoencoding", name) for name in data if name != held_out.data]
    return TrainConfig("out", data, [StageConfig("one", 1, sources)], held_out=held_out)


def test_every_piece_of_a_text_is_a_passage_and_the_last_has_nothing_that_follows() -> None:
    text = " ".join(f"The lamp number {i} is red." for i in range(12))
    found = passages([text], TOKENIZER, 24)
    assert "".join(e.context for e in found) == text
    assert [e.continuation for e in found] == [*(e.context for e in found[1:]), ""]
    assert all(text[start:].startswith(e.context) for e in found for _, start in [e.cut_from or ("", -1)])


def test_a_text_of_one_piece_is_a_passage_and_one_of_white_space_is_none() -> None:
    assert passages(["Short.", " \n", "Osk"], TOKENIZER, 24) == [Example("Short."), Example("Osk")]


def test_white_space_at_the_end_of_a_text_neither_follows_nor_is_a_passage() -> None:
    found = passages(["The lamp of Varn is red." + "\n" * 60], TOKENIZER, 24)
    assert [e for e in found if not e.context.strip() or e.continuation] == []
    assert found[0].context.startswith("The lamp")


def test_where_an_example_was_cut_from_is_not_part_of_its_digest() -> None:
    example = Example("a", " b", "c", "d")
    assert examples_digest([example]) == examples_digest([Example("a", " b", "c", "d", cut_from=("e", 5))])
    # as runs of earlier versions recorded it, so that they can go on
    assert examples_digest([example]) == "5c47348651b2fd1c5431c59c2f44d38370fb523a86984c815658477287995393"


def test_texts_and_questions_that_give_no_example_are_counted(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps({"context": c, "question": "Who?", "answer": "Osk"})
                                                    for c in ("long " * 60, "Osk.", "long " * 70, "Osk!", "Osk?")))
    asked = DataConfig("questions", str(tmp_path / "asked.jsonl"))
    found, left_out = load_examples(asked, TOKENIZER, 40)
    assert [e.context for e in found] == ["Osk.", "Osk!", "Osk?"]
    assert left_out == 2
    limited = DataConfig("questions", str(tmp_path / "asked.jsonl"), limit=2)
    assert load_examples(limited, TOKENIZER, 40) == (found[:2], 2)
    (tmp_path / "a.txt").write_text("Short.")
    assert load_examples(DataConfig(path=str(tmp_path / "a.txt")), TOKENIZER, 40) == ([Example("Short.")], 0)


@pytest.mark.parametrize("held", ["short", "long"])
def test_no_source_trains_on_text_that_is_held_out_however_it_is_cut(held: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(WORDS))
    path = str(tmp_path / "a.txt")
    data = {"short": DataConfig(path=path, context_tokens=50), "long": DataConfig(path=path, context_tokens=230)}
    examples = {name: load_examples(d, TOKENIZER, 512)[0] for name, d in data.items()}
    left, kept = hold_out(config(data, HeldOutConfig(held, examples=2)), examples)
    assert kept == examples[held][-2:]
    assert {name: words(some) & words(kept) for name, some in left.items()} == {"short": set(), "long": set()}
    least = len(WORDS) - len(words(kept)) - 2 * len(examples["long"][0].context.split())
    assert len(words(left["short"])) >= least  # what lies beside is trained on


def test_a_held_out_text_is_not_asked_about_either(tmp_path: Path) -> None:
    """Whether the question's context is the whole text, a part of the held-out piece, or holds it."""
    text = " ".join(WORDS[:30])
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Another text, of another lamp."}) + "\n"
                                      + json.dumps({"text": text}))
    contexts = [text, " ".join(WORDS[8:20]), f"Before. {text} After.", "Quite another text."]
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps({"context": c, "question": "Who?", "answer": c[:4]})
                                                    for c in contexts))
    data = {"texts": DataConfig(path=str(tmp_path / "a.jsonl")),
            "asked": DataConfig("questions", str(tmp_path / "asked.jsonl"))}
    examples = {name: load_examples(d, TOKENIZER, 512)[0] for name, d in data.items()}
    left, kept = hold_out(config(data, HeldOutConfig("texts", examples=1)), examples)
    assert [e.context for e in kept] == [text]
    assert [e.context for e in left["asked"]] == ["Quite another text."]


def test_a_few_held_out_words_do_not_hold_out_every_text_that_has_them() -> None:
    data = {"texts": DataConfig(path="a"), "asked": DataConfig("questions", "b")}
    examples = {"texts": [Example("Long ago."), Example("Osk")], "asked": [Example("Osk keeps it."), Example("Osk")]}
    left, _ = hold_out(config(data, HeldOutConfig("texts", examples=1)), examples)
    assert left == {"texts": [Example("Long ago.")], "asked": [Example("Osk keeps it.")]}


def test_a_data_set_that_is_only_held_out_may_be_held_out_whole() -> None:
    data = {"held": DataConfig(path="a"), "texts": DataConfig(path="b")}
    examples = {"held": [Example("Osk")], "texts": [Example("Another.")]}
    left, kept = hold_out(config(data, HeldOutConfig("held")), examples)
    assert (left, kept) == ({"held": [], "texts": [Example("Another.")]}, [Example("Osk")])


ASKED = {"question": "Who?", "answers": [{"text": "Osk"}]}


@pytest.mark.parametrize(("content", "message"), [
    ([], "is not SQuAD: expected an object with 'data'"),
    ({"data": {}}, r"squad.json: expected list in 'data', got dict"),
    ({"data": ["x"]}, "squad.json, article 0: expected an object, got str"),
    ({"data": [{}]}, "squad.json, article 0: expected a field 'paragraphs', found none"),
    ({"data": [{"paragraphs": ["x"]}]}, "article 0, paragraph 0: expected an object, got str"),
    ({"data": [{"paragraphs": [{"context": "Osk.", "qas": ["x"]}]}]}, "question 0: expected an object, got str"),
    ({"data": [{"paragraphs": [{"context": 3, "qas": [ASKED]}]}]}, "paragraph 0: expected text in 'context', got 3"),
    ({"data": [{"paragraphs": [{"context": "Osk.", "qas": [{**ASKED, "answers": "Osk"}]}]}]},
     "paragraph 0, question 0: expected list in 'answers', got str"),
    ({"data": [{"paragraphs": [{"context": "Osk.", "qas": [{**ASKED, "answers": ["Osk"]}]}]}]},
     "paragraph 0, question 0, answer 0: expected an object, got str"),
])
def test_a_squad_file_of_another_form_is_named_with_the_place(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        load_examples(DataConfig("squad", str(path)), TOKENIZER, 40)
