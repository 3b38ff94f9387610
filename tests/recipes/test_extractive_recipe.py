"""The extractor's recipe: what is asked about is kept, and the package reads what the recipe writes."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from ctxcomp_rag.evaluation.extractive import LLMLingua2
from tests.evaluation.test_extractive import OneEach

SCRIPT = Path(__file__).parents[2] / "recipes" / "extractive" / "train.py"
TEXT = "The lamp of Varn is red and was lit by Osk in 1794. It rained."


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = spec_from_file_location("extractive_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_are_kept_and_words_that_a_question_shares(recipe: ModuleType) -> None:
    asked = (TEXT, [("Who lit the lamp?", "Osk"), ("When was the lamp lit?", "1794")])
    ranges = recipe.kept_ranges(asked, {"the", "was", "who", "when"})
    assert sorted(TEXT[first:last] for first, last in ranges) == ["1794", "Osk", "lamp", "lit"]


def test_a_token_is_kept_where_it_meets_a_range(recipe: ModuleType) -> None:
    assert recipe.labels([(0, 0), (0, 3), (3, 6), (7, 9), (0, 0)], [(4, 7)]) == [-100, 0, 1, 0, -100]


def test_the_commonest_words_in_lower_case(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "COMMON", 1)
    assert recipe.commonest(["The one, the other", "and the last"]) == {"the"}


def test_a_run_that_goes_on_keeps_its_vocabulary(recipe: ModuleType, tmp_path: Path) -> None:
    first = recipe.make_tokenizer(["one two three"] * 9, tmp_path, 60)
    again = recipe.make_tokenizer(["other words"] * 9, tmp_path, 80)
    assert again.get_vocab() == first.get_vocab()


def test_the_package_keeps_what_the_trained_extractor_learned_to_keep(tmp_path: Path) -> None:
    """Thirty steps on paragraphs whose every question is about the same two words."""
    pytest.importorskip("llmlingua", reason="the extra `llmlingua` is not installed")
    fillers = [f"Filler sentence number{n} says nothing." for n in range(40)]
    asked = [{"question": "What is the lamp?", "answers": [{"text": "Osk"}]}]
    paragraphs = [{"context": f"{a} The lamp is Osk. {b}", "qas": asked}
                  for a, b in zip(fillers, fillers[7:], strict=False)]
    with lzma.open(tmp_path / "squad-train-v1.1.json.xz", "wt", encoding="utf-8") as file:
        json.dump({"data": [{"paragraphs": paragraphs}]}, file)
    sizes = ["--documents", "0", "--steps", "30", "--batch-size", "8", "--hidden-size", "64", "--layers", "1"]
    subprocess.run([sys.executable, SCRIPT, "--data", tmp_path, "--out", tmp_path / "out", *sizes,
                    "--vocab-size", "400"], check=True, capture_output=True)
    extract = LLMLingua2(str(tmp_path / "out" / "bert-base-multilingual-cased-squad"), OneEach())
    assert "Osk" in extract(paragraphs[3]["context"], 6.0).split()


def test_the_script_explains_itself() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "which words of a text to keep" in done.stdout
    assert "--documents" in done.stdout
