"""The tables of docs/evaluation.md are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def _row(setting: str, system: str, em: float, kept: float | None) -> dict[str, Any]:
    return {"setting": setting, "system": system, "em": em, "f1": em + 1, "f1_interval": [em - 1, em + 2],
            "of_full_text": kept, "positions": 33.5, "cache_bytes": 2048, "first_token_ms": 1.5, "total_ms": 9.0,
            "answers_per_second": 7.0, "index_bytes": 3.0}


def test_a_line_has_a_system_in_both_settings_and_costs_of_the_right_chunks() -> None:
    import eval_tables

    retrieved = {**_row("retrieved", "4x", 30.0, 90.0), "positions": 99.0}
    rows = [_row("oracle", "4x", 40.0, 80.0), _row("oracle", "no_context", 1.0, None), retrieved]
    made = eval_tables.filled(PAGE, {"eval_squad": {"rows": rows, "retrieval_recall": 81.5}})
    assert "<!-- recall_squad --> 81.5 <!-- end -->" in made
    assert "| 4x | 40.0 / 41.0 (39.0 to 42.0) | 80.0 | 30.0 / 31.0 | 90.0 | 33.5 | 2 | 1.5 | 9.0 | 7.0 | 3.0 |" in made
    assert "| no_context | 1.0 / 2.0 (0.0 to 3.0) | - | - | - | 33.5 | 2 | 1.5 | 9.0 | 7.0 | 3.0 |" in made


def test_the_page_is_what_the_committed_results_say() -> None:
    import eval_tables

    results = {name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
               for name in eval_tables.RESULTS}
    for result in results.values():
        assert {row["system"] for row in result["rows"]} >= {
            "no_context", "full_text", "truncated_4x", "extractive_4x", "4x", "pcc_4x", "infinipot_4x", "4x_int8",
            "mixed_4x"}
    assert eval_tables.filled(PAGE, results) == PAGE
