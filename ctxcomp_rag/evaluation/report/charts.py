"""Points as pictures: the geometry of the page's SVG charts. Colours, lines and words are the template's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ctxcomp_rag.evaluation.report.results import FULL_TEXT, NO_CONTEXT, Point

WIDTH, HEIGHT = 380, 260
"""Units of every chart; as wide as a phone, so that words stay legible there."""
LEFT, RIGHT, TOP, BOTTOM = 44, 366, 14, 216
_LETTER, _LINE = 5.4, 13.0  # width and height of a label's letters


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A point of a chart; `low`, `high` are the ends of its interval, `title` what is said when it is pointed at."""

    x: float
    y: float
    title: str
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """Marks joined by a line."""

    name: str
    style: Style
    marks: tuple[Mark, ...]
    joined: bool = True


@dataclass(frozen=True)
class Rule:
    """A horizontal line across the chart."""

    y: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart with axes. `frontier` is a path of (x, y) that no point lies beyond."""

    x_name: str
    y_name: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    rules: tuple[Rule, ...] = ()
    frontier: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Style:
    """Numbers of a colour and of a shape of mark."""

    colour: int
    shape: int


@dataclass
class Styles:
    """Styles of series, the same all over the page, given out in the order in which they are asked for.

    Colours come round again with another shape.
    """

    number: int
    given: dict[str, Style] = field(default_factory=dict)

    def __getitem__(self, series: str) -> Style:
        turn, colour = divmod(len(self.given), self.number)
        return self.given.setdefault(series, Style(colour, (colour + turn) % self.number))


def quality_by_factor(points: Sequence[Point], measure: str, styles: Styles) -> Chart | None:
    """Quality against factor (logarithmic), a line for each series; full text and no context as rules."""
    drawn = [p for p in points if p.factor is not None and p.series not in (FULL_TEXT, NO_CONTEXT)]
    if not drawn:
        return None
    factors = sorted({p.factor for p in drawn if p.factor})
    x = _scale(math.log2(min(factors)), math.log2(max(factors)), LEFT + 20, RIGHT - 20)
    y, y_ticks = _quality_axis(points)
    lines = []
    for series in dict.fromkeys(p.series for p in drawn):
        own = sorted((p for p in drawn if p.series == series), key=lambda p: p.factor or 0)
        marks = [Mark(x(math.log2(p.factor or 1)), y(p.quality), _said(p, measure),
                      low=y(p.interval[0]) if p.interval else None, high=y(p.interval[1]) if p.interval else None)
                 for p in own]
        lines.append(Line(series, styles[series], tuple(marks)))
    rules = [Rule(y(p.quality), f"{p.series} {p.quality:g}") for p in points if p.series in (FULL_TEXT, NO_CONTEXT)]
    ticks = tuple(Tick(x(math.log2(f)), f"{f:g}x") for f in factors)
    return Chart("source tokens per slot", measure, ticks, y_ticks, tuple(lines), tuple(rules))


def quality_by_time(points: Sequence[Point], measure: str, styles: Styles, *, lower_is_better: bool = False
                    ) -> Chart | None:
    """Quality against time to first token, with the frontier of those that nothing beats in both."""
    drawn = [p for p in points if p.first_token_ms is not None]
    if len(drawn) < 2:
        return None
    y, y_ticks = _quality_axis(points)
    times = [p.first_token_ms or 0 for p in drawn]
    ticks = nice_ticks(0, max(times) * 1.05)
    x = _scale(0, ticks[-1], LEFT, RIGHT)
    placed: list[tuple[float, float, float, float]] = [(x(t) - 5, y(p.quality) - 5, x(t) + 5, y(p.quality) + 5)
                                                       for p, t in zip(drawn, times, strict=True)]
    lines = []
    for series in dict.fromkeys(p.series for p in drawn):
        marks = []
        for p in (p for p in drawn if p.series == series):
            at = x(p.first_token_ms or 0), y(p.quality)
            label = p.series if p.factor is None or p.series == FULL_TEXT else f"{p.factor:g}x"
            place = _free_place(*at, label, placed)
            marks.append(Mark(*at, _said(p, measure), label, *place) if place else Mark(*at, _said(p, measure)))
        lines.append(Line(series, styles[series], tuple(marks), joined=False))
    sign = -1 if lower_is_better else 1
    frontier: list[tuple[float, float]] = []
    best = -math.inf
    for p in sorted(drawn, key=lambda p: (p.first_token_ms or 0, -sign * p.quality)):
        if sign * p.quality > best:
            frontier += [(x(p.first_token_ms or 0), frontier[-1][1])] if frontier else []
            frontier.append((x(p.first_token_ms or 0), y(p.quality)))
            best = sign * p.quality
    return Chart("time to first token, ms", measure, tuple(Tick(x(t), f"{t:g}") for t in ticks), y_ticks, tuple(lines),
                 frontier=tuple(frontier))


@dataclass(frozen=True)
class Bar:
    """A quantity as a share of the largest one, per cent."""

    system: str
    style: Style
    share: float
    label: str


def bars(points: Sequence[Point], value: Callable[[Point], float | None], styles: Styles,
         label: Callable[[float], str]) -> tuple[Bar, ...]:
    """One bar for each system that has the value, in the points' order."""
    known = [(p, v) for p in points if (v := value(p)) is not None]
    largest = max((v for _, v in known), default=0.0)
    return tuple(Bar(p.label, styles[p.series], round(100 * v / largest, 1) if largest else 0.0,
                     label(v)) for p, v in known)


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose the range; about `wanted` of them."""
    raw = (high - low or abs(high) or 1.0) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _quality_axis(points: Sequence[Point]) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    values = [v for p in points for v in (p.quality, *(p.interval or ()))]
    ticks = nice_ticks(0, max(*values, 1e-9, 1e-9))
    y = _scale(0, ticks[-1], BOTTOM, TOP)
    return y, tuple(Tick(y(t), f"{t:g}") for t in ticks)


def _scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    size = high - low
    return lambda value: round(begin + (end - begin) * ((value - low) / size if size else 0.5), 1)


def _free_place(x: float, y: float, label: str, taken: list[tuple[float, float, float, float]]
                ) -> tuple[float, float] | None:
    """Left end of the baseline of a label beside (x, y) that covers no other, added to `taken`; None where there is no
    room: labels over each other say less than the legend."""
    width = _LETTER * len(label)
    tried = [(x + dx, y + dy) for dy in (4.0, -8.0, 17.0, -21.0, 30.0) for dx in (8.0, -8.0 - width, -width / 2)]
    inside = [(a, b) for a, b in tried if a >= LEFT and a + width <= WIDTH and b - 9 >= TOP - 4 and b <= BOTTOM]
    for a, b in inside:
        box = a, b - _LINE + 3, a + width, b + 3
        if not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken):
            taken.append(box)
            return round(a, 1), round(b, 1)
    return None


def _said(p: Point, measure: str) -> str:
    interval = f" ({p.interval[0]:g} to {p.interval[1]:g})" if p.interval else ""
    wait = f", first token after {p.first_token_ms:g} ms" if p.first_token_ms is not None else ""
    return f"{p.label}: {measure} {p.quality:g}{interval}{wait}"
