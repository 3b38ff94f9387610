"""The tables of docs/quoting.md, and of nested spans in docs/compressors.md, are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_a_line_has_a_system_answering_freely_and_quoting() -> None:
    import quoting_page

    row = {"setting": "oracle", "system": "4x", "em": 20.0, "f1": 30.0, "f1_interval": [28, 32], "of_full_text": 75.0,
           "positions": 50.0}
    quoted = {**row, "system": "4x_quoted", "em": 28.0, "f1": 38.0, "f1_interval": [36, 40], "of_full_text": 90.0}
    assert quoting_page.english_rows({"rows": [row, quoted, {**row, "system": "no_context"}]}) == [{
        "SQuAD dev": "spans 4x", "chunks": "the right one", "EM / F1 (95 %)": "20.0 / 30.0 (28 to 32)",
        "% of full text": 75.0, "quoting, EM / F1 (95 %)": "28.0 / 38.0 (36 to 40)", "% of full text, quoting": 90.0,
        "positions": 50.0}]
    home = {"exact_match": {"8x": 96.0, "8x_quoted": 99.0}, "exact_match_retrieved": {"8x": 90.0}, "false_answers": {}}
    assert quoting_page.home_rows(home)[2] == {
        "exact match, %": "spans 8x", "the right chunk": 96.0, "the right chunk, quoting": 99.0, "3 retrieved": 90.0,
        "3 retrieved, quoting": None, "false answers": None, "false answers, quoting": None}


def test_points_lost_are_those_of_each_seed() -> None:
    import home_seeds
    import quoting_page

    reports = [{"exact_match": {"8x": right, "8x_quoted": right + 1},
                "exact_match_retrieved": {"8x": 90.0, "8x_quoted": 95.0},
                "false_answers": {"8x": 2.0, "8x_quoted": 1.0}} for right in (96.0, 98.0)]
    rows = home_seeds.rows_of(reports)
    assert rows[0] == {"system": "8x", "em": "97.0 ± 1.0", "em_retrieved": "90.0 ± 0.0", "points_lost": "7.0 ± 1.0",
                       "false_answers": "2.0 ± 0.0"}
    assert quoting_page.seed_rows({"rows": rows}) == [{
        "exact match, %": "spans 8x", "the right chunk": "97.0 ± 1.0", "the right chunk, quoting": "98.0 ± 1.0",
        "3 retrieved": "90.0 ± 0.0", "3 retrieved, quoting": "95.0 ± 0.0", "points lost": "7.0 ± 1.0",
        "points lost, quoting": "3.0 ± 1.0"}]


@pytest.mark.parametrize("page", ["quoting", "compressors"])
def test_the_page_is_what_the_committed_results_say(page: str) -> None:
    import nested_page
    import quoting_page

    names = {"quoting": (quoting_page.HOME, quoting_page.SEEDS, quoting_page.COST, *quoting_page.ENGLISH),
             "compressors": nested_page.RESULTS}[page]
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    results = {name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
               for name in names}
    assert quoting_page.filled(text, results) == text
    for name in names:
        assert f"<!-- {name} -->\n| " in text
