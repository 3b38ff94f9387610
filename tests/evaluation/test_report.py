"""The report: what it draws is what the files say, it needs nothing but itself, and it shows untrusted text as text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ctxcomp_rag.cli import app
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.report import render_report
from ctxcomp_rag.evaluation.report.charts import BOTTOM, LEFT, RIGHT, TOP, Styles, bars, nice_ticks
from ctxcomp_rag.evaluation.report.charts import quality_by_factor as by_factor
from ctxcomp_rag.evaluation.report.charts import quality_by_time as by_time
from ctxcomp_rag.evaluation.report.differences import Words, compared
from ctxcomp_rag.evaluation.report.results import Point, read_result

# counts of kills and figures of one large index have no rows, and nothing to draw
RESULTS = [path for path in sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
           if "rows" in json.loads(path.read_text())]


def row(system: str, f1: float, **more: Any) -> dict[str, Any]:
    return {"setting": "oracle", "system": system, "em": 0.0, "f1": f1, **more}


ROWS = [row("full_text", 80.0, first_token_ms=30.0, cache_bytes=4096, positions=100.0),
        row("4x", 60.0, f1_interval=[50.0, 70.0], first_token_ms=10.0, cache_bytes=2048, positions=50.0),
        row("16x", 20.0, first_token_ms=12.0, cache_bytes=1024, positions=25.0),
        row("truncated_4x", 30.0), row("4x_int8", 55.0), row("no_context", 5.0)]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\""
ANSWERS = [{"question": EVIL, "expected": ["the red lamp"], "oracle/full_text": "A red lamp", "oracle/4x": EVIL,
            "oracle/no_context": "x", "oracle/truncated_4x": "a red lamp"},
           {"question": "same?", "expected": ["yes"], "oracle/full_text": "Yes.", "oracle/4x": "yes"}]
RESULT = {"task": EVIL, "command": "ctxcomp eval", "commit": "abc", "machine": {"cpu_count": 2}, "seed": 1,
          "rows": ROWS, "answers": ANSWERS}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT))
    return path


def test_rows_become_points_with_series_and_factor(file: Path) -> None:
    result = read_result(file)
    assert result.measure == "F1"
    assert [(p.series, p.factor, p.quality) for p in result.points] == [
        ("full text", 1.0, 80.0), ("spans", 4.0, 60.0), ("spans", 16.0, 20.0), ("truncated", 4.0, 30.0),
        ("spans int8", 4.0, 55.0), ("no context", None, 5.0)]
    assert result.points[1].interval == (50.0, 70.0)
    assert result.provenance == {"command": "ctxcomp eval", "commit": "abc", "seed": "1", "machine": "cpu_count 2"}


def test_answers_that_differ_by_more_than_articles_and_case_are_examples(file: Path) -> None:
    [example] = read_result(file).examples
    assert (example.question, example.expected) == (EVIL, ("the red lamp",))
    assert set(example.answers) == {"full_text", "4x", "no_context", "truncated_4x"}


def test_differing_words_are_marked_against_the_full_text() -> None:
    assert compared("the red boat, sunk", "A red boat") == (
        Words("the red boat,", False), Words("sunk", True))
    assert compared("", "x") == ()


def test_marks_stand_where_the_values_are() -> None:
    points = [Point("", "full_text", "full text", 1.0, 100.0), Point("", "4x", "spans", 4.0, 50.0, (25.0, 75.0)),
              Point("", "16x", "spans", 16.0, 0.0)]
    chart = by_factor(points, "F1", Styles(6))
    assert chart is not None
    [line] = chart.lines
    first, second = line.marks
    assert (first.y, second.y) == ((TOP + BOTTOM) / 2, BOTTOM)
    assert (first.low, first.high) == (BOTTOM - 0.25 * (BOTTOM - TOP), BOTTOM - 0.75 * (BOTTOM - TOP))
    assert LEFT < first.x < second.x < RIGHT
    assert [t.label for t in chart.x_ticks] == ["4x", "16x"]
    assert [(r.y, r.label) for r in chart.rules] == [(TOP, "full text 100")]


def test_the_frontier_holds_what_nothing_beats_in_both() -> None:
    def at(name: str, quality: float, ms: float) -> Point:
        return Point("", name, name, None, quality, first_token_ms=ms)

    points = [at("slow", 50.0, 40.0), at("quick", 20.0, 10.0), at("beaten", 15.0, 20.0), at("good", 40.0, 20.0)]
    chart = by_time(points, "F1", Styles(6))
    assert chart is not None
    at_ = {line.name: (line.marks[0].x, line.marks[0].y) for line in chart.lines}
    corners = [p for p in chart.frontier if p in at_.values()]
    assert corners == [at_["quick"], at_["good"], at_["slow"]]
    assert by_time(points[:1], "F1", Styles(6)) is None


def test_no_label_covers_another_and_one_without_room_is_left_out() -> None:
    points = [Point("", f"a{i}", f"a long name {i}", None, 50.0, first_token_ms=50.0 + i / 10) for i in range(30)]
    chart = by_time(points, "F1", Styles(6))
    assert chart is not None
    shown = [m for line in chart.lines for m in line.marks if m.label]
    assert 1 < len(shown) < 30
    for one in shown:
        width = 5 * len(one.label)
        assert not [o for o in shown if o is not one and abs(o.label_y - one.label_y) < 9
                    and one.label_x - width < o.label_x < one.label_x + width]


def test_bars_are_shares_of_the_largest() -> None:
    points = [Point("", "a", "a", None, 0.0, positions=20.0), Point("", "b", "b", None, 0.0),
              Point("", "c", "c", None, 0.0, positions=5.0)]
    made = bars(points, lambda p: p.positions, Styles(6), str)
    assert [(b.system, b.share) for b in made] == [("a", 100.0), ("c", 25.0)]


@pytest.mark.parametrize(("low", "high", "ticks"), [(0, 100, [0, 20, 40, 60, 80, 100]),
                                                    (0, 0.31, [0, 0.1, 0.2, 0.3, 0.4]),
                                                    (0, 0, [0, 0.2])])
def test_ticks_are_round_and_enclose_the_range(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == ticks


def test_a_series_has_one_style_and_colours_return_with_other_shapes() -> None:
    styles = Styles(3)
    given = [styles[name] for name in "abcdef"]
    assert styles["a"] == given[0]
    assert len(set(given)) == 6
    assert [s.colour for s in given] == [0, 1, 2, 0, 1, 2]


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_untrusted_text_stays_text_and_the_page_asks_for_nothing(file: Path) -> None:
    text = render_report([file])
    assert "&lt;script&gt;alert(1)" in text
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "link", "object", "form", "base", "foreignobject"}
    attributes = [(name, value or "") for _, attrs in page.tags for name, value in attrs.items()]
    assert not [a for a in attributes if a[0].startswith("on")]
    assert all(value.startswith("#") for name, value in attributes if name in ("href", "src"))
    assert not re.search(r"url\(|@import|https?://", text)
    policy = next(a for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy["content"] or "")


def test_the_page_is_for_phones_and_for_both_colour_schemes(file: Path) -> None:
    text = render_report([file])
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "@media (prefers-color-scheme: dark)" in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_every_result_on_file_is_drawn(path: Path) -> None:
    content = json.loads(path.read_text())
    text = render_report([path])
    assert f"<bdi>{content.get('task', path.stem)}</bdi>" in text
    assert text.count("<tr><td>") == len(content["rows"])


def test_needles_become_a_grid() -> None:
    path = next(p for p in RESULTS if p.stem == "needle")
    rows = json.loads(path.read_text())["rows"]
    grids = {g.reader: g for g in read_result(path).needles}
    assert {g.unit for g in grids.values()} == {"tokens"}
    assert {r["reader"].replace("_", " ") for r in rows} == set(grids)
    for r in rows:
        assert grids[r["reader"].replace("_", " ")].found[r["depth"], r["tokens"]] == r["found"]


def test_needles_that_eval_asked_for_become_grids_of_depth_and_documents(tmp_path: Path) -> None:
    said = {"retrieved/4x": "31", "oracle/no_context": ""}
    answers = [{"question": "?", "expected": ["31 m"], "depth": depth, "documents": length, "oracle/4x": text, **said}
               for depth, length, text in [(0.0, 2.0, "The 31 m."), (0.0, 2.0, "7 m"), (0.5, 2.0, "7 m"),
                                           (0.0, 8.0, "31 m")]]
    path = tmp_path / "needle.json"
    path.write_text(json.dumps({"task": "needle", "rows": ROWS, "answers": [*answers, *ANSWERS]}))
    grids = {g.reader: g for g in read_result(path).needles}
    assert set(grids) == {"oracle: 4x", "retrieved: 4x", "oracle: no context"}
    grid = grids["oracle: 4x"]
    assert (grid.unit, grid.depths, grid.lengths) == ("documents", (0.0, 0.5), (2, 8))
    assert grid.found == {(0.0, 2): 50.0, (0.5, 2): 0.0, (0.0, 8): 100.0}
    assert set(grids["retrieved: 4x"].found.values()) == {0.0}
    assert "columns: documents of context" in render_report([path])


@pytest.mark.parametrize(("content", "message"), [
    ("{", "is not JSON"), ("[]", "is not a result: expected an object with a list of objects in 'rows'"),
    ('{"rows": []}', "is not a result"), ('{"rows": [1]}', "is not a result")])
def test_a_file_that_is_no_result_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=message):
        render_report([tmp_path / "x.json"])


def test_values_that_are_not_numbers_are_not_drawn(tmp_path: Path) -> None:
    rows = [{"system": "4x", "f1": float("nan"), "em": "high"}, {"system": 3, "f1": 2.0}, {"system": "8x", "f1": True}]
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    result = read_result(tmp_path / "x.json")
    assert (result.points, result.measure) == ((), "")
    assert "high" in render_report([tmp_path / "x.json"])


def test_the_command_writes_the_page(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages" / "report.html"
    done = CliRunner().invoke(app, ["report", str(file), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output) == {"out": str(out), "results": 1, "bytes": out.stat().st_size}
