"""The examples run as they stand, and are short."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    path = EXAMPLES / name
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


def test_a_query_engine_with_citations(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run("llama_index_citations.py", capsys)
    assert [line[:3] for line in shown.splitlines()[-3:]] == ["[1]", "[2]", "[3]"]


def test_an_ingestion_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = run("llama_index_ingestion.py", capsys).splitlines()[:3]
    nodes, spans = (int(word) for word in first.split() if word.isdigit())
    assert nodes == spans
    assert int(second.split()[3]) < nodes


def test_every_block_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "lighthouse.txt").write_text("The lighthouse of Brel is 31 metres tall.")
    quick_start, ingestion, other_modes = re.findall(r"```python\n(.*?)```", readme, re.S)
    exec(quick_start, names)
    assert capsys.readouterr().out.endswith("]\n")
    exec(ingestion, names)
    assert len(names["rag"].memory) == 2  # type: ignore[attr-defined]
    exec(other_modes, names)
    assert capsys.readouterr().out.strip()
