"""The parts of InfiniPot's benchmarks, on the smallest sizes there are."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_a_full_cache_has_no_row_where_it_does_not_fit_and_bounded_reading_has() -> None:
    import cache_budget

    rows = {mode: cache_budget.measure("random-tiny", 400, 256, 128, mode) for mode in cache_budget.MODES}
    assert rows["full"] is None
    for mode in ("budget", "span"):
        row = rows[mode]
        assert row is not None
        assert (row["mode"], row["length"], row["budget"]) == (mode, 400, 128)
    assert cache_budget.measure("random-tiny", 100, 256, 128, "full") is not None


def test_stored_spans_are_timed_from_the_index_beside_the_text_of_the_same_chunks() -> None:
    import cache_budget
    import first_token

    backbone = cache_budget.load("random-tiny", 1024)
    rows = first_token.measure(backbone, 2, 64, [1.0, 4.0], 1)
    assert [r["prompt"] for r in rows] == ["text", "kv_spans_1x", "kv_spans_4x"]
    assert rows[0]["times_faster"] == 1.0
    assert all(r["chunks"] == 2 and 64 < r["source_tokens"] <= 128 for r in rows)


def test_the_page_gets_the_tables_of_the_results_that_there_are_and_keeps_the_others() -> None:
    import infinipot_tables

    page = (ROOT / "docs" / "infinipot.md").read_text(encoding="utf-8")
    rows = [{"system": "infinipot", "1/4": 91.25}, {"system": "nuc", "1/4": None}]
    results = {"kept": {"full_cache": 98.7, "rows": rows}}
    made = infinipot_tables.filled(page, results)
    assert "| system | 1/4 |\n|---|---|\n| infinipot | 91.25 |\n| nuc | - |\n<!-- end -->" in made
    assert "full cache: <!-- full --> 98.7 <!-- end -->" in made
    for mark in infinipot_tables.ROWS:
        assert made.count(f"<!-- {mark} -->") == 1
    assert infinipot_tables.filled(made, results) == made
    assert infinipot_tables.filled(page, {}) == page
