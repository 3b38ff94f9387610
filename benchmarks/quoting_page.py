"""Fill docs/quoting.md from the results of home_ground.py, home_seeds.py, quoting_cost.py and two runs of
`ctxcomp eval --quote`.

    python benchmarks/quoting_page.py [--results benchmarks/results] [--page docs/quoting.md]
"""

from __future__ import annotations

from typing import Any

from pages import between, fill, table

HOME, SEEDS, COST, NESTED = "home_ground", "home_seeds", "quoting_cost", "_nested"
ENGLISH = ("squad_dev_4x", "squad_dev_retrieved")
LABELS = {"full_text": "full text", "4x": "spans 4x", "8x": "spans 8x", "16x": "spans 16x",
          "truncated_4x": "text cut to 4x"}


def filled(page: str, results: dict[str, Any]) -> str:
    """The page with the tables of the results that there are, of the nested compressor too (`nested_page.py`)."""
    for name, result in results.items():
        rows_of = {HOME: home_rows, SEEDS: seed_rows, COST: cost_rows}.get(name.removesuffix(NESTED), english_rows)
        page = between(page, name, f"\n{table(rows_of(result))}\n")
    return page


def home_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """By system: exact match and false answers, freely and quoting."""
    measures = {"the right chunk": "exact_match", "3 retrieved": "exact_match_retrieved",
                "false answers": "false_answers"}
    return [{"exact match, %": label,
             **{f"{title}{', quoting' * (suffix != '')}": result[key].get(system + suffix)
                for title, key in measures.items() for suffix in ("", "_quoted")}}
            for system, label in LABELS.items()]


def seed_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """By system: exact match over the seeds, and what three retrieved chunks lose of it, freely and quoting."""
    of = {row["system"]: row for row in result["rows"]}
    measures = {"the right chunk": "em", "3 retrieved": "em_retrieved", "points lost": "points_lost"}
    return [{"exact match, %": label, **{f"{title}{', quoting' * (suffix != '')}": of[system + suffix][key]
                                         for title, key in measures.items() for suffix in ("", "_quoted")}}
            for system, label in LABELS.items() if system in of]


def english_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """By setting and system: EM / F1 and the share of the full text's F1, freely and quoting."""
    of = {(r["setting"], r["system"]): r for r in result["rows"]}
    rows = []
    for setting, system in of:
        if system in LABELS:
            free, quoted = of[setting, system], of[setting, f"{system}_quoted"]
            rows.append({
                "SQuAD dev": LABELS[system], "chunks": {"oracle": "the right one"}.get(setting, "3 retrieved"),
                "EM / F1 (95 %)": scores(free), "% of full text": free["of_full_text"],
                "quoting, EM / F1 (95 %)": scores(quoted), "% of full text, quoting": quoted["of_full_text"],
                "positions": free["positions"]})
    return rows


def scores(row: dict[str, Any]) -> str:
    low, high = row["f1_interval"]
    return f"{row['em']} / {row['f1']} ({low} to {high})"


def cost_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What picking a token takes, beside a step of the decoder."""
    return [*result["rows"], {**dict.fromkeys(result["rows"][0]), "picking": "the decoder's step",
                              "median, us": result["step_us"]}]


if __name__ == "__main__":
    fill(__doc__, "docs/quoting.md", (HOME, SEEDS, COST, *ENGLISH), filled)
