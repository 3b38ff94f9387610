"""Assembling a prompt again and again: five spans read from the index on disk, checked, and laid out.

`median_ms`: what the rows hold beside their spans is in memory, as for every query but the first that finds a chunk.
`first_ms`: it is read from the table each time.

    python benchmarks/assembly.py [--shape 135m] [--repeats 200] [--out benchmarks/results/assembly.json]

In `ctxcomp bench` every assembly comes after a long prompt that has emptied the processor's caches; here nothing stands
between them. One thread; wall time, since reading an index waits for threads of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import print_table

from ctxcomp_rag.decoding import FrozenDecoder, Part, TokenIds
from ctxcomp_rag.evaluation.bench.clock import one_thread
from ctxcomp_rag.evaluation.bench.offline import Offline, Stored
from ctxcomp_rag.evaluation.bench.runs import SplicedRun
from ctxcomp_rag.evaluation.bench.shapes import load_shape
from ctxcomp_rag.evaluation.bench.workload import Workload
from ctxcomp_rag.evaluation.provenance import write_result


def milliseconds(work: Callable[[], object], repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - began))
    return taken


def milliseconds_anew(stored: Stored, run: SplicedRun, repeats: int) -> list[float]:
    """Of assemblies by an index that has just been opened."""
    taken = []
    for _ in range(repeats):
        stored.index._table = stored.index._table.uncached()
        taken += milliseconds(run.assemble, 1)
    return taken


def measure(name: str, stored: Stored, decoder: FrozenDecoder, question: list[int], repeats: int) -> dict[str, Any]:
    def parts() -> list[Part]:
        return [*stored.spans(), TokenIds(question)]

    run = SplicedRun(decoder, parts, 1)
    milliseconds(run.assemble, 5)
    taken = milliseconds(run.assemble, repeats)
    return {"row": name, "median_ms": round(median(taken), 2), "best_ms": round(min(taken), 2),
            "first_ms": round(median(milliseconds_anew(stored, run, repeats)), 2),
            "reading_ms": round(median(milliseconds(stored.spans, repeats)), 2),
            "kilobytes": round(5 * stored.bytes_per_chunk / 1e3, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "assembly.json")
    args = parser.parse_args()
    one_thread()
    backbone, workload = load_shape(args.shape), Workload()
    decoder, question = FrozenDecoder(backbone), workload.question_ids(int(backbone.config.vocab_size))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        offline = Offline(backbone, workload, Path(folder))
        rows = [measure("soft-16x", offline.soft(16), decoder, question, args.repeats),
                measure("infinipot-kv-4x", offline.infinipot(4), decoder, question, args.repeats)]
    print_table(rows)
    write_result(args.out, {"shape": args.shape, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
