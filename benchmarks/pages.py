"""Pages whose tables are filled from benchmarks/results."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    keys = list(rows[0])
    lines = [[*keys], *(["-" if row[k] is None else f"{row[k]}" for k in keys] for row in rows)]
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(keys), *body])


def between(page: str, mark: str, text: str) -> str:
    """The page with the text between <!-- mark --> and the next <!-- end --> replaced."""
    pattern = re.compile(rf"(<!-- {re.escape(mark)} -->).*?(<!-- end -->)", re.S)
    return pattern.sub(lambda found: found[1] + text + found[2], page, count=1)


def fill(description: str | None, page: str, names: Iterable[str],
         filled: Callable[[str, dict[str, Any]], str]) -> None:
    """The command line of a page: `filled` makes it from what it was and from the results of these names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path(page))
    args = parser.parse_args()
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name in names
             if (path := args.results / f"{name}.json").exists()}
    args.page.write_text(filled(args.page.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"{args.page}: {', '.join(found) or 'no result'} filled in")
