"""`ctxcomp eval`: what is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctxcomp_rag.cli import app
from ctxcomp_rag.cli_measure import evaluate
from ctxcomp_rag.errors import InputError

NO_MODEL = "/nowhere/a/model"


def test_a_result_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written \(.*\); pass another --out"):
        evaluate(task="home", out=tmp_path, model=NO_MODEL)


@pytest.mark.parametrize("task", ["reconstruction", "perplexity"])
def test_quoting_is_for_tasks_that_ask_questions(task: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"'{task}' asks none; leave it out, or take one of home, squad, .*, needle, "
                                         "summarisation$"):
        evaluate(task=task, quote=True, out=tmp_path / "x.json", model=NO_MODEL)


def test_a_seed_below_zero_is_refused() -> None:
    done = CliRunner().invoke(app, ["eval", "--seed", "-1", "--model", NO_MODEL], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "--seed" in done.output
    assert "greater than or equal to 0" in done.output
