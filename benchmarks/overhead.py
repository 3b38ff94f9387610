"""What this package adds to the bare model: time to first token of a spliced prompt over that of the same rows or cache
entries ready in memory, in a `DynamicCache` of transformers, which copies its entries once as it takes the first token.

    python benchmarks/overhead.py [--shape 0.5b] [--rows soft-4x,...] [--pairs 10] [--out FILE]

`ctxcomp bench` has the same column, from as many pairs as it has repeats; two runs of the same work differ by more than
what is to be seen here. Pairs take turns in who comes first. CPU time on one thread; the median of the ratios and the
middle half of them.

`beside_ms` does not depend on such pairs: assembling, and writing stored entries and the question's into the cache,
each alone and again and again (the processor's caches are warm), less what the ideal's cache takes for the latter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import print_table
from transformers import DynamicCache

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding.batching import append
from ctxcomp_rag.decoding.cache import new_cache
from ctxcomp_rag.decoding.splice import CachedRun
from ctxcomp_rag.evaluation.bench.clock import clocked, one_thread
from ctxcomp_rag.evaluation.bench.offline import timed
from ctxcomp_rag.evaluation.bench.report import conditions
from ctxcomp_rag.evaluation.bench.rows import Row, Rows
from ctxcomp_rag.evaluation.bench.runs import SplicedRun, bare_cache
from ctxcomp_rag.evaluation.bench.shapes import load_shape
from ctxcomp_rag.evaluation.bench.workload import Workload
from ctxcomp_rag.evaluation.provenance import write_result

ROWS = "soft-4x,soft-16x,soft-64x,prerolled-4x,prerolled-16x,infinipot-kv-4x,infinipot-kv-16x"


def milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """CPU time, the median; the first time warms up."""
    return 1000 * statistics.median([timed(work)[1] for _ in range(repeats + 1)][1:])


def beside(row: Row, backbone: Backbone) -> float:
    """Milliseconds that a row takes outside the model's pass, over those of its ideal."""
    run = row.start()
    assert isinstance(run, SplicedRun)
    assembling = milliseconds(run.assemble)
    prompt = run.request.prompt
    stored = [r for r in prompt.runs if isinstance(r, CachedRun)]
    if not stored:
        return assembling
    entries = sum(r.num_entries for r in stored)
    question = torch.zeros(1, backbone.num_kv_heads, prompt.length - entries, backbone.head_dim, dtype=backbone.dtype)
    caches = iter([bare_cache(backbone, entries) for _ in range(21)])  # each takes the question once

    def take(cache: DynamicCache) -> None:
        for layer in range(len(cache.layers)):
            cache.update(question, question, layer)

    def enter() -> None:
        cache = new_cache(backbone, prompt.length)
        append(stored, cache, backbone)
        take(cache)

    return assembling + milliseconds(enter) - milliseconds(lambda: take(next(caches)))


def measure(row: Row, pairs: int, backbone: Backbone) -> dict[str, object]:
    """Ratios of one row, whose runs have to have an ideal."""
    assert row.ideal is not None
    taken: dict[bool, list[float]] = {False: [], True: []}
    assembling = []
    for pair in range(pairs + 1):
        for ours in (pair % 2 == 0, pair % 2 == 1):
            timing = clocked(row.start() if ours else row.ideal(), 1)
            taken[ours].append(timing.ttft)
            assembling += [1000 * timing.assemble] if ours else []
    ratios = [100 * (a / b - 1) for a, b in zip(taken[True][1:], taken[False][1:], strict=True)]  # the first warms up
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"row": row.name, "overhead_%": round(middle, 1), "middle_half_%": f"{low:.1f} to {high:.1f}",
            "ttft_s": round(statistics.median(taken[True][1:]), 3),
            "ideal_s": round(statistics.median(taken[False][1:]), 3),
            "assemble_ms": round(statistics.median(assembling[1:]), 1), "beside_ms": round(beside(row, backbone), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.5b")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/overhead_SHAPE.json")
    args = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        backbone = load_shape(args.shape)
        makes = Rows(backbone, Workload(), Path(folder))
        chosen = [makes.row(name) for name in args.rows.split(",")]
        bare = [row.name for row in chosen if row.ideal is None]
        if bare or args.pairs < 2:
            parser.error(f"expected rows of spans, and 2 pairs or more, got {', '.join(bare) or args.pairs}")
        rows = [measure(row, args.pairs, backbone) for row in chosen]
    print_table(rows)
    write_result(args.out or Path(f"benchmarks/results/overhead_{args.shape}.json"),
                 {"shape": args.shape, "pairs": args.pairs, "conditions": conditions(), "rows": rows})


if __name__ == "__main__":
    main()
