"""What it saves that the text before the first span is read once: prefill without its entries over prefill with them.

    python benchmarks/prefix.py [--shape 135m] [--heads 4,32,256] [--pairs 7] [--out FILE]

Five spans of 32 slots and a question of 64 tokens, random weights; CPU time of one thread, pairs interleaved.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from common import print_table

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding import Part, TokenIds, splice
from ctxcomp_rag.decoding.batching import prefill
from ctxcomp_rag.decoding.prefix import PrefixCache
from ctxcomp_rag.evaluation.bench.clock import one_thread
from ctxcomp_rag.evaluation.bench.shapes import load_shape
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.spans import KVSpan, MemorySpan, SoftSpan

SPANS, SLOTS, SOURCE_TOKENS = 5, 32, 512
QUESTION = TokenIds(tuple(range(1, 65)))


def spans_of(kind: str, backbone: Backbone) -> list[MemorySpan]:
    places = torch.arange(SLOTS)
    if kind == "soft":
        return [SoftSpan("s", SOURCE_TOKENS, places, SLOTS, torch.randn(SLOTS, backbone.hidden_size))] * SPANS
    shape = (int(backbone.config.num_hidden_layers), backbone.num_kv_heads, SLOTS, backbone.head_dim)
    return [KVSpan("s", SOURCE_TOKENS, places, SLOTS, torch.randn(shape), torch.randn(shape))] * SPANS


@torch.inference_mode()
def times_faster(parts: list[Part], backbone: Backbone, pairs: int) -> float:
    """Median over the pairs."""
    def seconds(prefixes: PrefixCache | None) -> float:
        began = time.thread_time()
        prefill([splice(parts, backbone)], backbone, prefixes)
        return time.thread_time() - began

    known = PrefixCache(backbone)
    seconds(known)
    return float(np.median([seconds(None) / seconds(known) for _ in range(pairs)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--heads", default="4,32,256", help="tokens before the first span")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prefix.json"))
    args = parser.parse_args()
    one_thread()
    backbone = load_shape(args.shape)
    rows = [{"head": tokens, **{kind: round(times_faster(
        [TokenIds(tuple(range(tokens))), *spans_of(kind, backbone), QUESTION], backbone, args.pairs), 2)
        for kind in ("soft", "kv")}} for tokens in map(int, args.heads.split(","))]
    print_table(rows)
    write_result(args.out, {"shape": args.shape, "pairs": args.pairs, "rows": rows})


if __name__ == "__main__":
    main()
