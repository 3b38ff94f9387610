"""Results of `ctxcomp eval` and of the benchmarks as one page to look at."""

from ctxcomp_rag.evaluation.report.page import render_report

__all__ = ["render_report"]
