"""Precompression as a job: documents of any number into an index, on the cores of one machine or on a Ray cluster."""

from ctxcomp_rag.jobs.job import BATCH_TOKENS, precompress
from ctxcomp_rag.jobs.report import IndexReport, Progress, write_report
from ctxcomp_rag.jobs.stopping import Stop, stop_on_signals
from ctxcomp_rag.jobs.worker import LoadingSpanWorker, SpanWorker, WorkerSettings
from ctxcomp_rag.jobs.workers import ProcessWorkers, ThreadWorker, Workers

__all__ = [
    "BATCH_TOKENS",
    "IndexReport",
    "LoadingSpanWorker",
    "ProcessWorkers",
    "Progress",
    "SpanWorker",
    "Stop",
    "ThreadWorker",
    "WorkerSettings",
    "Workers",
    "precompress",
    "stop_on_signals",
    "write_report",
]
