"""The embedded model on held-out documents of its home ground.

    python benchmarks/home_ground.py [--documents 300] [--seed 1] [--model DIR] [--compressor NAME] \
        [--out benchmarks/results/home_ground.json]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from common import compressor_of, decoder_of, print_table

from ctxcomp_rag.compressors import possible_factors
from ctxcomp_rag.evaluation.home_ground import evaluate_home_ground
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.evaluation.systems import PREROLLED, default_systems, quoted_systems
from ctxcomp_rag.retrieval import load_retrieval_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", help="folder with decoder/ and icae/ [default: the embedded model]")
    parser.add_argument("--compressor", help="name or folder of another compressor of that decoder [default: its icae]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/home_ground.json"))
    args = parser.parse_args()
    compressor = compressor_of(args.model, decoder_of(args.model), args.compressor)
    systems = default_systems(possible_factors(compressor))
    systems += [p for p in PREROLLED if any(s.factor == p.factor and s.kind == "spans" for s in systems)]
    systems += quoted_systems(default_systems(possible_factors(compressor)))
    report = evaluate_home_ground(compressor, load_retrieval_encoder(), documents=args.documents, seed=args.seed,
                                  systems=systems)
    result = asdict(report)
    rows = [{"system": name, "em": report.exact_match[name], "em_retrieved": report.exact_match_retrieved.get(name),
             "false_answers": report.false_answers.get(name)} for name in report.exact_match]
    print_table(rows)
    print(f"reconstruction BLEU at {possible_factors(compressor)[0]:g}x: {report.reconstruction_bleu}")
    print(f"written to {args.out}")
    write_result(args.out, {"seed": args.seed, **result, "rows": rows})


if __name__ == "__main__":
    main()
