"""Workers on a Ray cluster: `SpanWorker` under Ray Data's `map_batches` with a pool of actors (extra `ray`).

The driver reads, plans and commits; the cluster compresses. Nothing is kept there: a killed actor's batch is run again
by Ray, and what a killed driver had not committed is done again by the next run.

Batches travel in rounds, each one Ray dataset with a block a batch, so that results come back, and are committed, batch
by batch. Actors load their compressor once a round; rounds grow, so that loading is a small part of a long job.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import InputError, WorkerError
from ctxcomp_rag.jobs.worker import LoadingSpanWorker, WorkerSettings, chunks_to_table
from ctxcomp_rag.jobs.workers import Workers

if TYPE_CHECKING:
    import pyarrow as pa

_FIRST_ROUND, _LAST_ROUND, _GROWTH = 16, 4096, 4  # batches an actor
_GATHER_SECONDS = 1.0  # a round is not started while batches still come in faster than this
_FAILED_ROUNDS = 3


class RayWorkers(Workers):
    """Actors of the cluster that RAY_ADDRESS names, or of a new one on this machine. One GPU each where there are any.

    Raises:
        InputError: the extra is not installed, or fewer than one worker.
        WorkerError: the cluster has not enough free CPUs or GPUs; Ray itself would wait for ever.
    """

    def __init__(self, settings: WorkerSettings, size: int) -> None:
        if size < 1:
            raise InputError(f"expected at least one worker, got {size}")
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise InputError("the engine ray needs Ray: run pip install 'ctxcomp-rag[ray]'") from error
        self._own_cluster = not ray.is_initialized()
        if self._own_cluster:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        try:
            self._needs = require_resources(ray.available_resources(), size)
        except WorkerError:
            self.close()
            raise
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        self._settings, self._size = settings.with_absolute_paths(), size
        self._round_size = _FIRST_ROUND * size
        self._unreturned: dict[int, tuple[pa.Table, set[str]]] = {}  # batch number -> table, ids that are missing
        self._batch_of: dict[str, int] = {}
        self._number = 0
        self._waiting: list[int] = []
        self._last_submit = 0.0
        self._results: queue.Queue[pa.Table | BaseException | None] = queue.Queue()
        self._round: threading.Thread | None = None
        self._fruitless = 0
        self._cancelled = False

    @property
    def depth(self) -> int:  # type: ignore[override]
        return 2 * self._round_size

    @property
    def in_flight(self) -> int:
        return self._results.qsize() if self._cancelled else len(self._unreturned)

    def submit(self, batch: Sequence[Chunk]) -> None:
        self._number += 1
        self._unreturned[self._number] = chunks_to_table(batch), {c.id for c in batch}
        self._batch_of |= {c.id: self._number for c in batch}
        self._waiting.append(self._number)
        self._last_submit = time.monotonic()

    def finished(self, timeout: float) -> list[pa.Table]:
        gathered = len(self._waiting) >= self._round_size or time.monotonic() - self._last_submit > _GATHER_SECONDS
        if self._round is None and self._waiting and gathered and not self._cancelled:
            self._begin_round()
        results: list[pa.Table] = []
        try:
            while True:
                item = self._results.get(timeout=0 if results else timeout)
                if item is None or isinstance(item, BaseException):
                    self._end_round(item)
                else:
                    results.append(self._booked(item))
        except queue.Empty:
            return results

    def _booked(self, result: pa.Table) -> pa.Table:
        self._fruitless = 0
        for chunk_id in result["chunk_id"].to_pylist():
            number = self._batch_of.pop(chunk_id, None)
            if number is not None:
                missing = self._unreturned[number][1]
                missing.discard(chunk_id)
                if not missing:
                    del self._unreturned[number]
        return result

    def _begin_round(self) -> None:
        tables = [self._unreturned[number][0] for number in self._waiting]
        self._waiting = []
        self._round = threading.Thread(target=self._run_round, args=(tables,), name="ctxcomp-ray", daemon=True)
        self._round.start()

    def _run_round(self, tables: list[pa.Table]) -> None:
        import ray.data

        try:
            # a block a batch: a round never merges into one block that one actor compresses and nobody commits
            spans = ray.data.from_arrow(tables).map_batches(
                LoadingSpanWorker, fn_constructor_args=(self._settings,), batch_size=None, batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=self._size), **self._needs)
            for result in spans.iter_batches(batch_size=None, batch_format="pyarrow"):
                self._results.put(result)
            self._results.put(None)
        except BaseException as error:
            self._results.put(error)

    def _end_round(self, error: BaseException | None) -> None:
        self._round = None
        self._round_size = min(_GROWTH * self._round_size, _LAST_ROUND * self._size)
        again = [number for number in self._unreturned if number not in set(self._waiting)]
        self._waiting = again + self._waiting
        if again:
            self._fruitless += 1
            if self._fruitless == _FAILED_ROUNDS:
                raise WorkerError(f"Ray gave nothing back {_FAILED_ROUNDS} times, at last because: {error}. What was "
                                  "committed is kept: look at Ray's logs, then run the same command again")

    def cancel(self) -> None:
        self._cancelled = True  # a round cannot be cut short: what has come back by now is what is finished

    def close(self) -> None:
        import ray

        if self._own_cluster:
            ray.shutdown()


def require_resources(free: Mapping[str, float], size: int) -> dict[str, Any]:
    """What each of `size` actors asks for: a CPU, and a GPU where the cluster has any.

    Args:
        free: resource -> how much of it nobody uses.

    Raises:
        WorkerError: there is not enough for all of them.
    """
    gpus = free.get("GPU", 0)
    for name, there in (("CPU", free.get("CPU", 0)), *([("GPU", gpus)] if gpus else [])):
        if there < size:
            raise WorkerError(f"expected {size} free {name}s for {size} workers in the Ray cluster, found {there:g}; "
                              f"use --workers {max(1, int(there))}, or add machines to the cluster")
    return {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
