"""Fill the tables of docs/infinipot.md from benchmarks/results/*.json; a table without a result stays as it is.

    python benchmarks/infinipot_tables.py [--results benchmarks/results] [--page docs/infinipot.md]
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from common import table

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


def between(page: str, mark: str, text: str) -> str:
    """The page with the text between <!-- mark --> and the next <!-- end --> replaced."""
    pattern = re.compile(rf"(<!-- {re.escape(mark)} -->).*?(<!-- end -->)", re.S)
    return pattern.sub(lambda found: found[1] + text + found[2], page, count=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/infinipot.md"))
    args = parser.parse_args()
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name in ROWS
             if (path := args.results / f"{name}.json").exists()}
    args.page.write_text(filled(args.page.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"{args.page}: {', '.join(found) or 'no result'} filled in")


if __name__ == "__main__":
    main()
