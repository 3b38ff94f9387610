"""Result files in one shape: points (a system's quality and costs), needle grids, and answers side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.metrics import exact_match, mean, normalise
from ctxcomp_rag.records import read_json

MEASURES = {"f1": "F1", "em": "exact match", "exact_match": "exact match", "rouge_l": "ROUGE-L", "bleu": "BLEU",
            "perplexity": "perplexity"}
"""Fields of a row that say how good a system is, the first one found is drawn; all but perplexity are per cent."""

FULL_TEXT, NO_CONTEXT = "full text", "no context"
_FACTOR = re.compile(r"(.*?)_?(\d+(?:\.\d+)?)x(_.+)?")
_FULL = ("full_text", "full_cache")


@dataclass(frozen=True)
class Point:
    """One system in one setting; what was not measured is None.

    Attributes:
        series: what is joined by a line: the systems that differ in their factor only.
        factor: source tokens per slot; None for systems that have none.
        interval: 95 % interval of the quality.
        index_bytes: per source token.
    """

    setting: str
    system: str
    series: str
    factor: float | None
    quality: float
    interval: tuple[float, float] | None = None
    positions: float | None = None
    first_token_ms: float | None = None
    cache_bytes: float | None = None
    index_bytes: float | None = None

    @property
    def compressed(self) -> bool:
        return self.series not in (FULL_TEXT, NO_CONTEXT)

    @property
    def label(self) -> str:
        """The system's name in words, with its factor."""
        name = self.system.replace("_", " ")
        named = self.factor is None or not self.compressed or _FACTOR.fullmatch(self.system)
        return name if named else f"{name} {self.factor:g}x"


@dataclass(frozen=True)
class NeedleGrid:
    """How often a needle was found, per cent, by its depth (rows) and the length of the context (columns).

    Attributes:
        unit: of the lengths, "tokens" or "documents".
        found: by depth and length; None: not measurable.
    """

    reader: str
    unit: str
    depths: tuple[float, ...]
    lengths: tuple[int, ...]
    found: Mapping[tuple[float, int], float | None]


@dataclass(frozen=True)
class Example:
    """A question that full text and some spans answer differently; `answers` is by system."""

    setting: str
    question: str
    expected: tuple[str, ...]
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Result:
    """One result file.

    Attributes:
        measure: name of what `Point.quality` is; "" without points.
        provenance: command, commit, machine and the like, as label and text.
        rows: the file's rows as they are, for the table.
    """

    name: str
    measure: str
    points: tuple[Point, ...]
    needles: tuple[NeedleGrid, ...]
    examples: tuple[Example, ...]
    provenance: Mapping[str, str]
    rows: tuple[Mapping[str, Any], ...]

    @property
    def lower_is_better(self) -> bool:
        return self.measure == MEASURES["perplexity"]


def read_result(path: Path) -> Result:
    """Read one result file.

    Raises:
        InputError: it cannot be read, or has no `rows` to draw.
    """
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
        raise InputError(f"{str(path)!r} is not a result: expected an object with a list of objects in 'rows', as "
                         "`ctxcomp eval --out FILE` and the scripts in benchmarks/ write it")
    scored = _list_of_objects(content.get("scores")) or rows  # benchmarks/kept.py has its points there
    field = next((f for f in MEASURES if any(_number(r.get(f)) is not None for r in scored)), None)
    points = _points(scored, field) if field else []
    answers = _list_of_objects(content.get("answers"))
    return Result(
        str(content.get("task") or path.stem), MEASURES[field] if points and field else "", tuple(points),
        (*_needles(rows), *_asked_needles(answers)), tuple(_examples(answers)), _provenance(content), tuple(rows))


def _points(rows: Sequence[Mapping[str, Any]], field: str) -> list[Point]:
    points = []
    for row in rows:
        name = row.get("system", row.get("name"))
        if not isinstance(name, str):
            continue
        series, factor = _place(name, _number(row.get("factor")))
        interval = row.get(f"{field}_interval")
        span = tuple(map(_number, interval)) if isinstance(interval, list) else ()
        costs = {f: _number(row.get(f)) for f in ("positions", "first_token_ms", "cache_bytes", "index_bytes")}
        for setting, key in ((str(row.get("setting", "")), field), ("retrieved", f"{field}_retrieved")):
            quality = _number(row.get(key))
            if quality is not None:
                low_high = span if key == field and len(span) == 2 and None not in span else None
                points.append(Point(setting, name, series, factor, quality, low_high, **costs))  # type: ignore[arg-type]
    return points


def _place(system: str, factor: float | None) -> tuple[str, float | None]:
    """The series and factor of a system, by its name where the row does not say: "truncated_4x", "4x_int8"."""
    if system in _FULL:
        return FULL_TEXT, 1.0
    if system == "no_context":
        return NO_CONTEXT, None
    found = _FACTOR.fullmatch(system)
    if found is None:
        return system.replace("_", " "), factor
    series = " ".join(part.strip("_") for part in (found[1] or "spans", found[3] or "") if part)
    return series.replace("_", " "), factor or float(found[2])


def _needles(rows: Sequence[Mapping[str, Any]]) -> list[NeedleGrid]:
    found: dict[str, dict[tuple[float, int], float | None]] = {}
    for row in rows:
        depth, tokens = _number(row.get("depth")), _number(row.get("tokens"))
        reader = row.get("reader", row.get("system"))
        if isinstance(reader, str) and depth is not None and tokens is not None and "found" in row:
            found.setdefault(reader, {})[depth, int(tokens)] = _number(row["found"])
    return [_grid(reader, "tokens", cells) for reader, cells in found.items()]


def _asked_needles(answers: Sequence[Mapping[str, Any]]) -> list[NeedleGrid]:
    """Of `ctxcomp eval --task needle`: the share of the questions at each place that a system answers exactly."""
    found: dict[str, dict[tuple[float, int], list[float]]] = {}
    for answer in answers:
        depth, documents = _number(answer.get("depth")), _number(answer.get("documents"))
        if depth is None or documents is None:
            continue
        for setting, said in _by_setting(answer).items():
            for system, text in said.items():
                cells = found.setdefault(f"{setting}: {system}", {})
                cells.setdefault((depth, int(documents)), []).append(exact_match(text, _accepted(answer)))
    return [_grid(reader, "documents", {place: round(100 * mean(hits), 1) for place, hits in cells.items()})
            for reader, cells in found.items()]


def _grid(reader: str, unit: str, cells: Mapping[tuple[float, int], float | None]) -> NeedleGrid:
    return NeedleGrid(reader.replace("_", " "), unit, tuple(sorted({d for d, _ in cells})),
                      tuple(sorted({n for _, n in cells})), cells)


def _by_setting(answer: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What each system said in each setting."""
    said: dict[str, dict[str, str]] = {}
    for key, text in answer.items():
        setting, slash, system = key.partition("/")
        if slash and isinstance(text, str):
            said.setdefault(setting, {})[system] = text
    return said


def _accepted(answer: Mapping[str, Any]) -> tuple[str, ...]:
    expected = answer.get("expected", "")
    return tuple(map(str, expected)) if isinstance(expected, list) else (str(expected),)


def _examples(answers: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Those where spans and full text differ by more than case, punctuation and articles."""
    examples = []
    for answer in answers:
        for setting, said in _by_setting(answer).items():
            full = said.get("full_text")
            spans = [t for s, t in said.items() if s != "no_context" and not s.startswith("truncated")]
            if full is not None and any(normalise(t) != normalise(full) for t in spans):
                examples.append(Example(setting, str(answer.get("question", "")), _accepted(answer), said))
    return examples


def _provenance(content: Mapping[str, Any]) -> dict[str, str]:
    named = {k: str(content[k]) for k in ("command", "commit", "version", "date", "seed", "questions", "samples",
                                          "retrieval_recall") if content.get(k) not in (None, "")}
    machine = content.get("machine")
    return {**named, **({"machine": ", ".join(f"{k} {v}" for k, v in machine.items())}
                        if isinstance(machine, dict) else {})}


def _list_of_objects(value: Any) -> list[Mapping[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
