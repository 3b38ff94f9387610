"""Decoding on the home ground: what drafts from the sources save, and what int8 linear layers change.

    python benchmarks/decode.py [--documents 40] [--seed 1] [--factor 4] [--out benchmarks/results/decode.json]

Held-out documents, one chunk each: a question answered from its span, and its text read out of its span. CPU time on
one thread, plain and drafted in turn.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from common import print_table

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, Part, enclosed, reconstruction_prompt
from ctxcomp_rag.decoding.lookup import generate_drafted
from ctxcomp_rag.evaluation.bench.clock import cpu_seconds, one_thread
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.home_ground import chunk_with, split_corpus
from ctxcomp_rag.evaluation.metrics import exact_match
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.pipeline import load_trained_compressor, prompt_parts


def compared(decoder: FrozenDecoder, tasks: list[tuple[list[Part], str]], new_tokens: int, what: str) -> dict[str, Any]:
    """One row: plain greedy answers beside drafted ones."""
    settings = GenerationSettings(max_new_tokens=new_tokens)
    seconds = {"plain": 0.0, "drafted": 0.0}
    tokens = passes = drafted = accepted = different = 0
    for number, (parts, source) in enumerate(tasks):
        began = cpu_seconds()
        plain = decoder.generate(parts, settings)
        middle = cpu_seconds()
        found = generate_drafted(decoder, parts, [source], settings)
        if number:  # the first one warms up
            seconds["plain"] += middle - began
            seconds["drafted"] += cpu_seconds() - middle
        different += plain.token_ids != found.generation.token_ids
        tokens += plain.completion_tokens
        passes, drafted, accepted = passes + found.passes, drafted + found.drafted, accepted + found.accepted
    return {"task": what, "answers": len(tasks), "tokens": tokens, "passes": passes, "drafted": drafted,
            "accepted": accepted, "tokens_a_pass": round((tokens - len(tasks)) / max(1, passes), 2),
            "times_faster": round(seconds["plain"] / seconds["drafted"], 2), "different_answers": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--factor", type=float, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.json"))
    args = parser.parse_args()
    one_thread()
    backbone = load_frozen()
    compressor = load_trained_compressor("icae", backbone)
    corpus = generate_corpus(args.documents, args.seed, "held_out")
    chunks = split_corpus(corpus, compressor)
    asked = [entry.questions[0] for entry in corpus]
    right = [chunk_with(q.answer, d.id, chunks) for q, d in zip(asked, corpus, strict=True)]
    spans = compressor.compress(right, compression_factor=args.factor)
    decoder = FrozenDecoder(backbone)
    answers = [(prompt_parts(backbone, q.question, [enclosed(s, compressor.spec)], compressor.spec), c.text)
               for q, s, c in zip(asked, spans, right, strict=True)]
    readings = [(reconstruction_prompt(s, compressor.spec), c.text) for s, c in zip(spans, right, strict=True)]
    rows = [compared(decoder, answers, 32, "answer"),
            compared(decoder, readings[: len(readings) // 4], 128, "read out")]
    print_table(rows)
    small = FrozenDecoder(backbone.accelerated(int8=True))
    texts = {name: [which.generate(parts, GenerationSettings(max_new_tokens=32)).text for parts, _ in answers]
             for name, which in (("float32", decoder), ("int8", small))}
    em = {name: round(100 * sum(exact_match(t, [q.answer]) for t, q in zip(given, asked, strict=True)) / len(asked), 1)
          for name, given in texts.items()}
    changed = sum(a != b for a, b in zip(texts["float32"], texts["int8"], strict=True))
    print(f"exact match {em}, {changed} of {len(asked)} answers differ in int8")
    write_result(args.out, {"seed": args.seed, "factor": args.factor, "rows": rows, "exact_match": em,
                            "answers_changed_by_int8": changed})


if __name__ == "__main__":
    main()
