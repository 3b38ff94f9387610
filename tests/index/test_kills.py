"""kill -9 at any moment loses nothing that was acknowledged. `make kill-tests` does the same fifty times."""

from __future__ import annotations

import time
from pathlib import Path

from tests.index.kills import kill_writers


def test_kill_9_loses_nothing_that_was_acknowledged(path: Path) -> None:
    report = kill_writers(path, kills=4, seed=int(time.time()))
    assert (report.kills, report.lost, report.duplicated, report.complaints) == (4, 0, 0, [])
    assert report.chunks > 0
