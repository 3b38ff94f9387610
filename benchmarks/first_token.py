"""Time to first token from stored KV spans against raw text, as ratios measured in one run, interleaved.

    python benchmarks/first_token.py [--model NAME] [--chunk-tokens 128] [--chunks 1,4] [--factors 1,4] [--out FILE]

The spans lie in an index on disk; reading them from there is part of their time. `--model` may be a random one (see
cache_budget.py), whose times depend on shapes only.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cache_budget import load
from common import print_table

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.chunking import Chunk, Document, split_document
from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor, InfiniPotConfig
from ctxcomp_rag.decoding import FrozenDecoder, Part
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.evaluation.timing import time_to_first_token
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.pipeline import prompt_parts

QUESTION = "How tall is the lighthouse?"


def chunks_of(backbone: Backbone, count: int, tokens: int) -> list[Chunk]:
    """Chunks of one long text of fictional documents, each of about so many tokens."""
    corpus = generate_corpus(2 + count * tokens // 60, 1, "held_out")
    text = "\n\n".join(d.text for d in corpus)
    return split_document(Document("corpus", text), backbone.tokenizer, max_tokens=tokens)[:count]


def stored(backbone: Backbone, chunks: list[Chunk], factor: float, folder: Path) -> MemoryIndex:
    """An index of the chunks' spans, to be closed by the caller; vectors play no part here."""
    config = InfiniPotConfig(chunk_tokens=2048, compression_factor=factor)
    compressor = InfiniPotCompressor(backbone, config.repeating())
    index = MemoryIndex.create(folder, compressor.spec, vector_size=1, retrieval_encoder="none", codec="exact")
    index.add(chunks, compressor.compress(chunks), np.ones((len(chunks), 1), np.float32), spec=compressor.spec)
    return index


def from_index(backbone: Backbone, index: MemoryIndex, chunks: list[Chunk]) -> list[Part]:
    return prompt_parts(backbone, QUESTION, [[r.span] for r in index.get([c.id for c in chunks])])


def measure(backbone: Backbone, count: int, tokens: int, factors: list[float], repeats: int) -> list[dict[str, Any]]:
    """Rows for one number of chunks: raw text, then spans at each factor."""
    decoder, chunks = FrozenDecoder(backbone), chunks_of(backbone, count, tokens)
    prompts: dict[str, Any] = {"text": prompt_parts(backbone, QUESTION, [[c.text] for c in chunks])}
    with tempfile.TemporaryDirectory() as scratch:
        indices = [stored(backbone, chunks, f, Path(scratch) / f"{f:g}") for f in factors]
        for factor, index in zip(factors, indices, strict=True):
            prompts[f"kv_spans_{factor:g}x"] = partial(from_index, backbone, index, chunks)
        times = time_to_first_token(decoder, prompts, repeats=repeats)
        for index in indices:
            index.close()
    return [{"chunks": count, "source_tokens": sum(c.num_tokens for c in chunks), "prompt": name,
             "first_token_ms": round(1000 * seconds, 2), "times_faster": round(times["text"] / seconds, 2)}
            for name, seconds in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, random-0.5b, random-tiny, a folder or a hub id")
    parser.add_argument("--chunk-tokens", type=int, default=128)
    parser.add_argument("--chunks", default="1,4,8")
    parser.add_argument("--factors", default="1,4")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/first_token.json"))
    args = parser.parse_args()
    backbone = load(args.model, 32768)
    factors = [float(f) for f in args.factors.split(",")]
    rows = [row for count in map(int, args.chunks.split(","))
            for row in measure(backbone, count, args.chunk_tokens, factors, args.repeats)]
    print_table(rows)
    write_result(args.out, {"model": args.model, "repeats": args.repeats, "rows": rows})
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
