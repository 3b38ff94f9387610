"""Clocks for a machine that others use too.

Wall time on a busy machine says more about the neighbours. With one thread, CPU time is what the work takes: a
program that is interrupted does not pay for it, and no OpenMP barrier spins. Ratios of runs that alternate hold where
absolute times do not: a neighbour's use of caches and memory still slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ctxcomp_rag.evaluation.bench.runs import Run

cpu_seconds: Callable[[], float] = time.process_time
"""Of all threads of this process: reading an index uses threads of its own."""


def one_thread() -> None:
    """From here on torch computes in the calling thread."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Timing:
    """One answer: CPU seconds, wall seconds in brackets of the name.

    Attributes:
        assemble: fetching the spans and laying the prompt out; part of `ttft`.
        ttft: to the first token.
        total: to the last.
        ttft_wall, total_wall: the same by the clock on the wall.
        new_tokens: generated.
        positions: of the prompt.
    """

    assemble: float
    ttft: float
    total: float
    ttft_wall: float
    total_wall: float
    new_tokens: int
    positions: int

    @property
    def per_token(self) -> float:
        """Seconds a token after the first; nan for a single one."""
        return (self.total - self.ttft) / (self.new_tokens - 1) if self.new_tokens > 1 else float("nan")


def clocked(run: Run, new_tokens: int) -> Timing:
    """Do one run."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    run.assemble()
    assembled = cpu_seconds()
    run.first()
    first, first_wall = cpu_seconds(), time.perf_counter()
    for _ in range(new_tokens - 1):
        run.following()
    last, last_wall = cpu_seconds(), time.perf_counter()
    run.finish()
    return Timing(assembled - cpu, first - cpu, last - cpu, first_wall - wall, last_wall - wall, new_tokens,
                  run.positions)
