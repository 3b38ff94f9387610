"""What it costs to hold an answer to its sources: picking a token freely and quoting, beside the decoder's step.

    python benchmarks/quoting_cost.py [--documents 60] [--seed 1] [--out benchmarks/results/quoting_cost.json]

The embedded model answers questions about generated documents from spans at 4x, three chunks each, in turn freely and
quoting; what picking took is measured where tokens are picked.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import print_table

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.home_ground import split_corpus
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.evaluation.systems import Comparison, Question, System
from ctxcomp_rag.pipeline import load_trained_compressor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quoting_cost.json"))
    args = parser.parse_args()
    compressor = load_trained_compressor("icae", load_frozen())
    decoder, settings = FrozenDecoder(compressor.backbone), GenerationSettings(max_new_tokens=24)
    comparison = Comparison(compressor, decoder, settings)
    rng = random.Random(args.seed)
    corpus = generate_corpus(args.documents, args.seed, "held_out")
    chunks = split_corpus(corpus, compressor)
    asked = [Question(rng.choice(d.questions).question, (), tuple(rng.sample(chunks, 3))) for d in corpus]
    picking: dict[str, list[float]] = {"free": [], "quoting": []}
    steps: list[float] = []
    for question in asked:
        parts = comparison.prompt(System("4x", "spans", 4.0), question)
        quoted = replace(settings, quote_from=tuple(c.text for c in question.chunks))
        for name, chosen in (("free", settings), ("quoting", quoted)):
            request = decoder.request(parts, chosen)
            loop = decoder.loop()
            loop.admit([request])
            take = request.progress.take

            def timed(logits: torch.Tensor, sampler: object, name: str = name, take=take) -> int | None:  # type: ignore[no-untyped-def]
                began = time.perf_counter()
                token = take(logits, sampler)
                picking[name].append(time.perf_counter() - began)
                return token  # type: ignore[no-any-return]

            request.progress.take = timed  # type: ignore[method-assign]
            while loop.rows:
                began, before = time.perf_counter(), len(picking[name])
                loop.advance()
                steps.append(time.perf_counter() - began - sum(picking[name][before:]))
    rows = [{"picking": name, "tokens": len(seconds), "median, us": round(1e6 * statistics.median(seconds)),
             "95 %, us": round(1e6 * sorted(seconds)[int(0.95 * len(seconds))])} for name, seconds in picking.items()]
    print_table(rows)
    step = round(1e6 * statistics.median(steps))
    print(f"the decoder's step, median: {step} us")
    write_result(args.out, {"seed": args.seed, "documents": args.documents, "rows": rows, "step_us": step})


if __name__ == "__main__":
    main()
