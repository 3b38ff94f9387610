"""The report: one HTML page without scripts that needs nothing but itself.

Everything that comes from a file is escaped by the template, and the page's own policy forbids scripts, frames and
requests, so that what a document or an answer says is only ever shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ctxcomp_rag import __version__
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.metrics import exact_match
from ctxcomp_rag.evaluation.report import charts
from ctxcomp_rag.evaluation.report.differences import compared
from ctxcomp_rag.evaluation.report.results import FULL_TEXT, NO_CONTEXT, Example, Result, read_result

_COLOURS = 6
_MAX_EXAMPLES = 24
_MAX_BARS = 16  # more than that are in the table of all rows only
_CARD = 8  # systems of an example that are shown at most


def render_report(paths: Sequence[Path]) -> str:
    """The page, as HTML, for result files of `ctxcomp eval` and of benchmarks.

    Raises:
        InputError: there is no file, or one of them is not a result.
    """
    if not paths:
        raise InputError("a report needs at least one result; write one with `ctxcomp eval --out result.json`")
    styles = charts.Styles(_COLOURS)
    styles[FULL_TEXT]  # the first colour, whatever is measured
    sections = [_section(read_result(path), styles) for path in paths]
    env = Environment(loader=PackageLoader("ctxcomp_rag.evaluation.report", "templates"), autoescape=True,
                      undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return env.get_template("page.html.jinja").render(sections=sections, version=__version__, chart_size=charts)


def _section(result: Result, styles: charts.Styles) -> dict[str, Any]:
    settings = list(dict.fromkeys(p.setting for p in result.points))
    return {"result": result, "panels": [_panel(result, s, styles) for s in settings],
            "examples": [_card(e) for e in result.examples[:_MAX_EXAMPLES]], "num_examples": len(result.examples),
            "columns": list(dict.fromkeys(k for row in result.rows for k in row))}


def _panel(result: Result, setting: str, styles: charts.Styles) -> dict[str, Any]:
    """The charts of one setting."""
    points = [p for p in result.points if p.setting == setting]
    if not any(p.series == NO_CONTEXT for p in points):  # it is asked in one setting only: it reads nothing
        points += [p for p in result.points if p.series == NO_CONTEXT]
    return {
        "setting": setting,
        "kept": _kept(result, setting),
        "factor": charts.quality_by_factor(points, result.measure, styles),
        "time": charts.quality_by_time(points, result.measure, styles, lower_is_better=result.lower_is_better),
        "bars": [(name, made) for name, value, label in (
            ("keys and values of a prompt", lambda p: p.cache_bytes, _size),
            ("positions of a prompt", lambda p: p.positions, lambda v: f"{v:g}"),
            ("index, bytes per source token", lambda p: p.index_bytes, lambda v: f"{v:g} B"),
        ) if len(made := charts.bars(points, value, styles, label)) in range(1, _MAX_BARS)],
    }


def _kept(result: Result, setting: str) -> dict[str, Any] | None:
    """What each series keeps of full text at each factor, per cent; None where that cannot be said."""
    points = [p for p in result.points if p.setting == setting]
    full = next((p.quality for p in points if p.series == FULL_TEXT), 0.0)
    compressed = [p for p in points if p.compressed and p.factor is not None]
    if not full or not compressed or result.lower_is_better:
        return None
    shares = {(p.series, p.factor): round(100 * p.quality / full, 1) for p in compressed}
    return {"full": full, "shares": shares, "series": list(dict.fromkeys(p.series for p in compressed)),
            "factors": sorted({p.factor for p in compressed if p.factor})}


def _card(example: Example) -> dict[str, Any]:
    full = example.answers["full_text"]
    said = [(s, t) for s, t in example.answers.items() if s != "no_context"][:_CARD]
    return {"example": example, "said": [
        {"system": system.replace("_", " "), "right": bool(exact_match(text, example.expected)),
         "words": compared(text, full), "empty": not text.strip()} for system, text in said]}


def _size(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
