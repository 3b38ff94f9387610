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


def test_a_streamed_chain(capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.endswith("?") for line in run("langchain_lcel_streaming.py", capsys).splitlines()[::2]] == [True, True]


def test_a_stuff_chain_behind_another_store(capsys: pytest.CaptureFixture[str]) -> None:
    answer, *sources = run("langchain_stuff_chain.py", capsys).splitlines()
    assert "? -> " in answer
    assert len(sources) == 3


def test_a_retrieval_tool_of_an_agent(capsys: pytest.CaptureFixture[str]) -> None:
    found, answer = run("langchain_agent.py", capsys).splitlines()
    assert found == "4 documents found"
    assert "'spans': 4" in answer
    assert "'rejected': {}" in answer


def test_migration_saves_positions(capsys: pytest.CaptureFixture[str]) -> None:
    text, spans = (int(n) for n in re.findall(r"\((\d+) positions\)", run("langchain_migration.py", capsys)))
    assert spans < 0.5 * text


def test_every_block_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.S):
        exec(block, names)
    assert capsys.readouterr().out.count("\n") == 2
