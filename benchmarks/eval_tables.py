"""Fill the tables of docs/evaluation.md from `ctxcomp eval`'s results; a table without a result stays as it is.

    python benchmarks/eval_tables.py [--results benchmarks/results] [--page docs/evaluation.md]
"""

from __future__ import annotations

from typing import Any

from pages import between, fill, table

RESULTS = ("eval_home", "eval_squad", "eval_hotpotqa")


def filled(page: str, results: dict[str, Any]) -> str:
    """The page with the tables of the results that there are."""
    for name, result in results.items():
        page = between(page, name, f"\n{table(merged(result['rows']))}\n")
        page = between(page, name.replace("eval", "recall"), f" {result['retrieval_recall']} ")
    return page


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each system, its two settings side by side; costs are those of the right chunks."""
    of = {(row["setting"], row["system"]): row for row in rows}
    lines = []
    for system in dict.fromkeys(row["system"] for row in rows):
        right, retrieved = of["oracle", system], of.get(("retrieved", system))
        low, high = right["f1_interval"]
        lines.append({
            "system": system,
            "EM / F1 (95 %)": f"{right['em']} / {right['f1']} ({low} to {high})",
            "% of full text": right["of_full_text"],
            "EM / F1, 3 retrieved": f"{retrieved['em']} / {retrieved['f1']}" if retrieved else None,
            "% of its full text": retrieved["of_full_text"] if retrieved else None,
            "positions": right["positions"],
            "cache, KiB": round(right["cache_bytes"] / 1024),
            "first token, ms": right["first_token_ms"],
            "in all, ms": right["total_ms"],
            "answers a second": right["answers_per_second"],
            "index bytes a token": right["index_bytes"],
        })
    return lines


if __name__ == "__main__":
    fill(__doc__, "docs/evaluation.md", RESULTS, filled)
