"""From names of rows to results: loads the decoder, makes the spans, measures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ctxcomp_rag.decoding import FrozenDecoder
from ctxcomp_rag.evaluation.bench.clock import one_thread
from ctxcomp_rag.evaluation.bench.report import Progress, RowResult, measure
from ctxcomp_rag.evaluation.bench.rows import LIMIT, RAW, Rows
from ctxcomp_rag.evaluation.bench.shapes import load_shape
from ctxcomp_rag.evaluation.bench.workload import Workload


def run_rows(shape: str, names: Sequence[str], workload: Workload, repeats: int,
             progress: Progress = lambda name: None) -> Iterator[list[RowResult]]:
    """Measure the named rows beside raw text and the question alone, on one thread from here on.

    Yields the results so far after each repeat.

    Raises:
        InputError: no such row or shape.
    """
    one_thread()
    wanted = list(dict.fromkeys([RAW, *names, LIMIT]))
    backbone = load_shape(shape)
    with tempfile.TemporaryDirectory() as folder:
        makes = Rows(backbone, workload, Path(folder))
        rows = []
        for name in wanted:
            progress(f"make {name}")
            rows.append(makes.row(name))
        yield from measure(rows, FrozenDecoder(backbone), workload.new_tokens, repeats, progress)
