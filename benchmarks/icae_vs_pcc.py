"""Compressors beside each other on the same documents: quality, cost of compression, size.

    python benchmarks/icae_vs_pcc.py DIR DIR... [--model DIR] [--documents 300] [--chunks 1000] [--seed 1]
        [--out benchmarks/results/icae_vs_pcc.json]

DIR is the folder of a saved compressor, or the name of a method of the embedded model. A row is a compressor at a
factor that it makes; FLOPs are those of the matrix products and attention of the encoder, converter included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import home_ground_rows, print_table
from torch.utils.flop_counter import FlopCounterMode

from ctxcomp_rag.backbone import EMBEDDED_MODEL, load_frozen
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import Compressor, possible_factors
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.home_ground import split_corpus
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.pipeline import load_trained_compressor


def cost(compressor: Compressor, chunks: Sequence[Chunk], factor: float) -> dict[str, float]:
    """FLOPs and seconds of compressing 1,000 chunks, scaled from these, and the mean bytes of a span."""
    compressor.compress(chunks[:8], compression_factor=factor)  # what is made on first use
    with FlopCounterMode(display=False) as counter:
        spans = compressor.compress(chunks, compression_factor=factor)
    began = time.perf_counter()
    compressor.compress(chunks, compression_factor=factor)
    seconds = time.perf_counter() - began
    scale = 1000 / len(chunks)
    return {"encoder_gflops_per_1000_chunks": round(scale * counter.get_total_flops() / 1e9, 1),
            "encoder_seconds_per_1000_chunks": round(scale * seconds, 2),
            "bytes_per_chunk": round(sum(s.nbytes for s in spans) / len(spans)),
            "slots_per_chunk": round(sum(s.num_slots for s in spans) / len(spans), 1)}


def rows_of(name: str, compressor: Compressor, chunks: Sequence[Chunk], documents: int,
            seed: int) -> list[dict[str, Any]]:
    """A row for each factor of 4, 8 and 16 that the compressor makes."""
    quality = home_ground_rows(name, compressor, possible_factors(compressor), documents, seed)
    return [{**row, **cost(compressor, chunks, row["factor"])} for row in quality]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressors", nargs="+", metavar="DIR", help="folder of a compressor, or a method's name")
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder of the decoder [default: the embedded one]")
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--chunks", type=int, default=1000, help="chunks that are timed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/icae_vs_pcc.json"))
    args = parser.parse_args()
    backbone = load_frozen(args.model)
    loaded = {name: load_trained_compressor(name, backbone) for name in args.compressors}
    shortest = min(loaded.values(), key=lambda c: c.max_chunk_tokens)  # all are given the same chunks
    chunks = split_corpus(generate_corpus(args.chunks, args.seed, "held_out"), shortest)[: args.chunks]
    rows = [row for name, c in loaded.items() for row in rows_of(name, c, chunks, args.documents, args.seed)]
    print_table(rows)
    write_result(args.out, {"seed": args.seed, "documents": args.documents, "chunks": len(chunks), "rows": rows})
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
