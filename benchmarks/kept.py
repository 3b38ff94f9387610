"""Questions about single documents whose cache entries are mostly gone, by scoring rule and budget; ICAE beside them.

    python benchmarks/kept.py [--documents 100] [--seed 1] [--factors 2,4,8] [--model DIR] [--out FILE]

Held-out documents of the home ground, one question each. `infinipot_question` makes a span for each question; every
other span is made before any question is known.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import compressor_of, decoder_of, in_processes, print_table

from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor
from ctxcomp_rag.evaluation.kept import (
    CONFIGS,
    QUESTION_AWARE,
    score_question_aware,
    score_spans,
    score_text,
    single_document_questions,
)
from ctxcomp_rag.evaluation.provenance import write_result


def score(job: tuple[str | None, int, int, str, float]) -> dict[str, Any]:
    """One figure of the table: (model, documents, seed, row, factor)."""
    model, documents, seed, name, factor = job
    backbone = decoder_of(model)
    questions = single_document_questions(InfiniPotCompressor(backbone, CONFIGS["nuc"]), documents, seed)
    if name == "full_cache":
        return asdict(score_text(backbone, questions))
    if name == QUESTION_AWARE:
        return asdict(score_question_aware(backbone, questions, factor))
    made = compressor_of(model, backbone) if name == "icae" else InfiniPotCompressor(backbone, CONFIGS[name])
    return asdict(score_spans(name, made, questions, factor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--factors", default="2,4,8")
    parser.add_argument("--model", help="folder with decoder/ and icae/ [default: the embedded model]")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kept.json"))
    args = parser.parse_args()
    factors = [float(f) for f in args.factors.split(",")]
    names = [QUESTION_AWARE, *CONFIGS, "icae"]
    jobs = [("full_cache", 1.0), *((n, f) for n in names for f in factors)]
    scores = in_processes(score, [(args.model, args.documents, args.seed, *j) for j in jobs], args.processes)
    by_row = {(s["name"], s["factor"]): s["exact_match"] for s in scores}
    full = by_row["full_cache", 1.0]
    rows = [{"system": n, **{f"1/{f:g}": by_row[n, f] for f in factors}} for n in names]
    print(f"full cache: {full}")
    print_table(rows)
    write_result(args.out, {"documents": args.documents, "seed": args.seed, "full_cache": full, "rows": rows,
                            "scores": scores})
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
