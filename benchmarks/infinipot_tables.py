"""Fill the tables of docs/infinipot.md from benchmarks/results/*.json; a table without a result stays as it is.

    python benchmarks/infinipot_tables.py [--results benchmarks/results] [--page docs/infinipot.md]
"""

from __future__ import annotations

from typing import Any

from pages import between, fill, table

ROWS = {"kept": "rows", "needle": "means", "memory_embedded": "rows", "memory_random_0.5b": "rows",
        "first_token": "rows", "first_token_random_0.5b": "rows"}


def filled(page: str, results: dict[str, Any]) -> str:
    """The page with the tables of the results that there are."""
    for name, key in ROWS.items():
        if name in results:
            page = between(page, name, f"\n{table(results[name][key])}\n")
    if "kept" in results:
        page = between(page, "full", f" {results['kept']['full_cache']} ")
    return page


if __name__ == "__main__":
    fill(__doc__, "docs/infinipot.md", ROWS, filled)
