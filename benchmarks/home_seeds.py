"""The embedded model on its home ground, other documents for each seed: means, and how far seeds differ.

    python benchmarks/home_seeds.py [--documents 300] [--seeds 11,12,...] [--model DIR] [--compressor NAME] \
        [--processes 2] [--out FILE]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import compressor_of, decoder_of, in_processes, print_table

from ctxcomp_rag.evaluation.home_ground import evaluate_home_ground
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.evaluation.systems import default_systems, quoted_systems
from ctxcomp_rag.retrieval import load_retrieval_encoder


def measure(job: tuple[str | None, str | None, int, int]) -> dict[str, Any]:
    """The report of one seed: (model, compressor, documents, seed)."""
    model, name, documents, seed = job
    compressor = compressor_of(model, decoder_of(model), name)
    systems = [s for s in default_systems() if s.kind in ("text", "spans")]
    report = evaluate_home_ground(compressor, load_retrieval_encoder(), documents=documents, seed=seed,
                                  systems=[*systems, *quoted_systems(systems)], with_bleu=False)
    return {"seed": seed, **asdict(report)}


def spread(values: list[float]) -> str:
    """Mean, and the standard error that the seeds give it."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{fmean(values):.1f} ± {error:.1f}"


def rows_of(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each system: exact match with the right chunk, with retrieved ones, and what these lose."""
    rows = []
    for system in reports[0]["exact_match"]:
        right, retrieved = ([r[key][system] for r in reports] for key in ("exact_match", "exact_match_retrieved"))
        rows.append({"system": system, "em": spread(right), "em_retrieved": spread(retrieved),
                     "points_lost": spread([a - b for a, b in zip(right, retrieved, strict=True)]),
                     "false_answers": spread([r["false_answers"][system] for r in reports])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300, help="of each seed")
    parser.add_argument("--seeds", default="11,12,13,14,15")
    parser.add_argument("--model", help="folder with decoder/ and icae/ [default: the embedded model]")
    parser.add_argument("--compressor", help="name or folder of another compressor of that decoder [default: its icae]")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/home_seeds.json"))
    args = parser.parse_args()
    jobs = [(args.model, args.compressor, args.documents, int(seed)) for seed in args.seeds.split(",")]
    reports = in_processes(measure, jobs, args.processes)
    rows = rows_of(reports)
    print_table(rows)
    recall = spread([r["retrieval_recall"] for r in reports])
    print(f"the right chunk is among the retrieved ones in {recall} %")
    write_result(args.out, {"documents": args.documents, "retrieval_recall": recall, "rows": rows, "seeds": reports})
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
