"""The most memory that a piece of work takes beyond what was taken when it began."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """`bytes` is set when the work is done."""

    bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure what is done while the context is open, in this process: allocated memory on a GPU, else resident memory.

    Where the system cannot forget an earlier, higher peak (not Linux), a fresh process gives the true figure.
    """
    peak = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated() - before
        return
    before = _now_after_forgetting_the_peak()
    yield peak
    peak.bytes = max(0, _highest() - before)


def _now_after_forgetting_the_peak() -> int:
    try:
        _CLEAR.write_text("5")  # proc(5): resets the peak of the resident set
    except OSError:
        return _highest()
    return _status("VmRSS")


def _highest() -> int:
    return _status("VmHWM") if _STATUS.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    line = next(row for row in _STATUS.read_text(encoding="ascii").splitlines() if row.startswith(name))
    return int(line.split()[1]) * 1024


__all__ = ["Peak", "peak_memory"]
