"""The report: failures by reason, one JSON and one HTML file that stand alone."""

from __future__ import annotations

import json
from pathlib import Path

from ctxcomp_rag.jobs.report import Progress, failures_by_reason, write_report

FAILURES = {
    "kb/a.txt": "binary file kb/a.txt: expected UTF-8 text, but byte 0 is 0x00; convert it",
    "kb/b.txt": "binary file kb/b.txt: expected UTF-8 text, but byte 17 is 0xff; convert it",
    "d<1>": "document 'd<1>' has no text; give it text or leave it out",
}


def test_reasons_that_differ_in_names_and_numbers_are_one() -> None:
    kinds = failures_by_reason(FAILURES)
    assert [(k.count, list(k.examples)) for k in kinds] == [(2, ["kb/a.txt", "kb/b.txt"]), (1, ["d<1>"])]
    assert kinds[0].reason == "binary file ... expected UTF-... text, but byte ... is ...; convert it"


def test_both_files_say_the_same_and_the_page_needs_nothing_else(tmp_path: Path) -> None:
    report = {"out": "kb", "documents": 7, "failures": FAILURES, "stopped": True, "replaced": ["x"]}
    as_json, as_html = write_report(tmp_path / "new" / "job.html", report, [Progress(3, 40, 999, 1, 2.0)])
    assert (as_json.name, as_html.name) == ("job.json", "job.html")
    read = json.loads(as_json.read_text(encoding="utf-8"))
    assert read["failures_by_reason"][0]["count"] == 2
    assert read["progress"][0]["source_tokens"] == 40
    page = as_html.read_text(encoding="utf-8")
    assert "d&lt;1&gt;" in page
    assert "<1>" not in page
    assert "Stopped before it was done" in page
    assert not any(link in page for link in ("http", "src=", "<script", "<link"))
