"""Where batches are compressed on this machine: in a thread beside the caller's, or in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import InputError, WorkerError
from ctxcomp_rag.jobs.worker import LoadingSpanWorker, SpanWorker, WorkerSettings, chunks_to_table

if TYPE_CHECKING:
    import pyarrow as pa

_DEATHS = 3
"""Times that workers may die without a batch done in between: then it is not bad luck."""


class Workers(ABC):
    """Batches in, tables of spans out, in any order."""

    depth: int
    """Batches to have submitted at a time, so that no worker waits."""

    @property
    @abstractmethod
    def in_flight(self) -> int:
        """Batches submitted and not yet returned."""

    @abstractmethod
    def submit(self, batch: Sequence[Chunk]) -> None:
        """Have a batch compressed; returns at once."""

    @abstractmethod
    def finished(self, timeout: float) -> list[pa.Table]:
        """Results since the last call (see `SpanWorker`), after at most `timeout` seconds; [] if there are none.

        Raises:
            WorkerError: workers died again and again.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Drop the batches that no worker has begun."""

    @abstractmethod
    def close(self) -> None:
        """Let the workers end."""


class _PoolWorkers(Workers):
    def __init__(self, pool: Callable[[], Executor], run: Callable[[pa.Table], pa.Table], size: int) -> None:
        self._make_pool, self._run, self.depth = pool, run, size + 1
        self._pool: Executor | None = None
        self._running: dict[Future[Any], pa.Table] = {}
        self._deaths = 0

    @property
    def in_flight(self) -> int:
        return len(self._running)

    def submit(self, batch: Sequence[Chunk]) -> None:
        self._submit(chunks_to_table(batch))

    def _submit(self, table: pa.Table) -> None:
        self._pool = self._pool or self._make_pool()
        try:
            self._running[self._pool.submit(self._run, table)] = table
        except BrokenExecutor:
            self._after_a_death([table])

    def finished(self, timeout: float) -> list[pa.Table]:
        results: list[pa.Table] = []
        lost: list[pa.Table] = []
        for future in wait(self._running, timeout, FIRST_COMPLETED).done:
            error = future.exception()
            if error is not None and not isinstance(error, BrokenExecutor):
                if results:
                    break  # what is done comes first, the error with the next call
                raise error
            table = self._running.pop(future)
            if error is None:
                results.append(future.result())
            else:
                lost.append(table)
        self._deaths = 0 if results else self._deaths
        if lost:
            self._after_a_death(lost)
        return results

    def _after_a_death(self, lost: list[pa.Table]) -> None:
        lost = [*lost, *self._running.values()]  # a pool that broke finishes nothing more
        self._running.clear()
        self.close()
        self._deaths += 1
        if self._deaths == _DEATHS:
            raise WorkerError(f"worker processes died {_DEATHS} times without finishing a batch (killed, or out of "
                              "memory?). What was committed is kept: use fewer --workers or a smaller --batch-tokens "
                              "and run the same command again")
        for table in lost:
            self._submit(table)

    def cancel(self) -> None:
        for future in [f for f in self._running if f.cancel()]:
            del self._running[future]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


class ThreadWorker(_PoolWorkers):
    """A thread that compresses while the caller's reads and writes; the compressor is the caller's."""

    def __init__(self, worker: SpanWorker) -> None:
        super().__init__(lambda: ThreadPoolExecutor(1, "ctxcomp-worker"), worker, 1)


class ProcessWorkers(_PoolWorkers):
    """Processes with a compressor each: they share the cores evenly, and the GPUs in turn.

    Raises:
        InputError: fewer than one worker.
    """

    def __init__(self, settings: WorkerSettings, size: int) -> None:
        if size < 1:
            raise InputError(f"expected at least one worker, got {size}")
        context = multiprocessing.get_context("spawn")  # a forked child of a process with threads may hang

        def make() -> Executor:
            return ProcessPoolExecutor(size, context, _begin, (settings, context.Value("i", 0), size))

        super().__init__(make, _compress, size)


_settings: WorkerSettings | None = None
_worker: SpanWorker | None = None


def _begin(settings: WorkerSettings, started: Any, size: int) -> None:
    """In a new process: decide which cores and which device are its own."""
    global _settings
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the job decides what is finished
    with started.get_lock():
        number = started.value
        started.value += 1
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    _settings = replace(settings, device=settings.device or device_of(number, torch.cuda.device_count()))


def device_of(number: int, gpus: int) -> str | None:
    """The device of the worker with this number; None (the default one) where there is no choice."""
    return f"cuda:{number % gpus}" if gpus > 1 else None


def _compress(batch: pa.Table) -> pa.Table:
    global _worker
    if _worker is None:  # not in `_begin`: what is raised there is lost
        assert _settings is not None
        _worker = LoadingSpanWorker(_settings)
    return _worker(batch)
