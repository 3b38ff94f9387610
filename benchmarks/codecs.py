"""What storing spans in fewer bytes costs the embedded model: error, moved answers, exact match; the size of latents.

    python benchmarks/codecs.py [--compressor icae] [--factor 4] [--chunks 64] [--documents 100] [--seed 1]
        [--out benchmarks/results/codecs_icae.json]

`ctxcomp codecs` on an index of generated documents, then held-out documents of the home ground, one question each,
with the right chunk. The codecs that learn do so from other documents. `latent`: bytes of a chunk's span as the
encoder's memory and after the up-projection, for an encoder of the embedded model's size (192) and a decoder of
hidden size 896, both untrained: bytes do not depend on training.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cache_budget import load
from common import print_table

from ctxcomp_rag.backbone import EMBEDDED_MODEL, load_frozen
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.compressors.pcc import PCCCompressor, PCCConfig, load_encoder
from ctxcomp_rag.decoding import FrozenDecoder
from ctxcomp_rag.evaluation.codecs import exact_match_by_codec, measure_codecs
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.home_ground import split_corpus
from ctxcomp_rag.evaluation.kept import single_document_questions
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.evaluation.systems import Comparison
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.index.codecs import codec_named
from ctxcomp_rag.index.rows import span_to_bytes
from ctxcomp_rag.pipeline import load_trained_compressor


def measured(compressor: Compressor, chunks: Sequence[Chunk], factor: float, sample: int) -> list[dict[str, Any]]:
    """`ctxcomp codecs` on an exact index of the chunks."""
    with tempfile.TemporaryDirectory() as scratch, \
            MemoryIndex.create(Path(scratch) / "kb", compressor.spec, vector_size=1, retrieval_encoder="none",
                               codec="exact") as index:
        index.add(chunks, compressor.compress(chunks, compression_factor=factor),
                  np.ones((len(chunks), 1), np.float32), spec=compressor.spec)
        return [c.__dict__ for c in measure_codecs(index, compressor.backbone, sample=sample).costs]


def latent_bytes(chunks: Sequence[Chunk], factor: float) -> list[dict[str, Any]]:
    """Bytes of a stored span of a chunk, before and after the up-projection."""
    pcc = PCCCompressor(load("random-0.5b", 2048), load_encoder(EMBEDDED_MODEL),
                        PCCConfig(segment_tokens=128, slots_per_segment=round(128 / factor)))
    spans = {"latent (192)": pcc.remember(chunks), "soft (896)": pcc.compress(chunks)}
    return [{"span": name, "codec": codec,
             "bytes_per_chunk": round(sum(len(span_to_bytes(s, codec_named(codec))) for s in some) / len(some))}
            for name, some in spans.items() for codec in ("exact", "int8", "rotated2")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compressor", default="icae", help="method of the embedded model, or folder of a compressor")
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    compressor = load_trained_compressor(args.compressor, load_frozen())
    others = split_corpus(generate_corpus(256 + args.chunks, args.seed + 1, "held_out"), compressor)
    rows = measured(compressor, others, args.factor, args.chunks)
    questions = single_document_questions(compressor, args.documents, args.seed)
    matched = exact_match_by_codec(Comparison(compressor, FrozenDecoder(compressor.backbone)), questions, others[:256],
                                   args.factor)
    rows = [{**{k: v if isinstance(v, str) else float(f"{v:.3g}") for k, v in r.items()},
             "exact_match": matched[r["codec"]]} for r in rows]
    latent = latent_bytes(others[: args.chunks], args.factor) if compressor.spec.kind == "soft" else []
    print_table(rows)
    if latent:
        print_table(latent)
    out = args.out or Path(f"benchmarks/results/codecs_{Path(args.compressor).name}.json")
    write_result(out, {"factor": args.factor, "chunks": args.chunks, "documents": args.documents, "seed": args.seed,
                       "rows": rows, "latent": latent})
    print(f"written to {out}")


if __name__ == "__main__":
    main()
