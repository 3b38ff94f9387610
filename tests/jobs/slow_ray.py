"""The job on a Ray cluster of this machine: `make test-ray`. Starting Ray takes half a minute each time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ctxcomp_rag.errors import WorkerError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.jobs.ray_job import require_resources

pytest.importorskip("ray", reason="the extra `ray` is not installed")
ROWS = 600


def precompress(rows: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ctxcomp_rag.cli", "precompress", str(rows), "--out", str(out), "--engine", "ray",
               "--batch-tokens", "64", "--json", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "HF_HUB_OFFLINE": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})


def result_of(job: subprocess.Popen[str]) -> Any:
    said, _ = job.communicate(timeout=1200)
    assert job.returncode == 0
    return json.loads(said)


def actors() -> list[int]:
    """Process ids of the actors that have a SpanWorker."""
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listing.splitlines() if "ray::" in line and "MapBatches" in line]


def wait_for_chunks(out: Path, job: subprocess.Popen[str]) -> int:
    """Chunks in the index, as soon as there are any."""
    while True:
        assert job.poll() is None
        time.sleep(1)
        if (out / "index.json").exists():
            with MemoryIndex.open(out, read_only=True) as memory:
                if len(memory):
                    return len(memory)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"Tower {i} is {i * 7} metres tall."}) + "\n" for i in range(ROWS)),
                    encoding="utf-8")
    return path


def test_a_killed_actor_and_a_killed_driver_lose_nothing(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "kb"
    job = precompress(rows, out)
    committed = wait_for_chunks(out, job)
    job.kill()
    job.wait()
    with MemoryIndex.open(out, read_only=True) as memory:
        assert memory.verify().ok
        assert len(memory) >= committed
        committed = len(memory)
    again = precompress(rows, out)
    while not actors():
        assert again.poll() is None
        time.sleep(0.5)
    os.kill(actors()[0], signal.SIGKILL)
    result = result_of(again)
    assert (result["skipped"], result["added"]) == (committed, ROWS - committed)
    with MemoryIndex.open(out, read_only=True) as memory:
        assert memory.verify().ok
        assert sorted(memory.stats()[k] for k in ("chunks", "documents")) == [ROWS, ROWS]


def test_workers_that_the_cluster_has_no_room_for_are_refused() -> None:
    with pytest.raises(WorkerError, match="expected 3 free CPUs for 3 workers in the Ray cluster, found 2; "
                                          "use --workers 2"):
        require_resources({"CPU": 2.0}, 3)
    with pytest.raises(WorkerError, match="expected 2 free GPUs"):
        require_resources({"CPU": 8.0, "GPU": 1.0}, 2)
    assert require_resources({"CPU": 8.0, "GPU": 2.0}, 2) == {"num_cpus": 1, "num_gpus": 1}
