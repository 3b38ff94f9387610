"""Peak memory and time of reading against the length of the input: online within a cache budget, offline into a span
of InfiniPot with a pot of that size, and with the full cache.

    python benchmarks/cache_budget.py [--model NAME] [--lengths 512,1024,2048] [--budget 256] [--out FILE]

Each measurement runs in a process of its own: the peak is what that process took at most beyond what it took once the
model was loaded and had read a few tokens (resident memory; on a GPU, allocated memory). The full cache is left out
where the input does not fit into the decoder's window. The default model is a random one of the Qwen2 architecture
with a small vocabulary, for shape and memory only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import print_table

from ctxcomp_rag.backbone import Backbone, load_frozen
from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor, InfiniPotConfig
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, TokenIds
from ctxcomp_rag.evaluation.bench.shapes import SHAPES, load_shape
from ctxcomp_rag.evaluation.memory import peak_memory
from ctxcomp_rag.evaluation.provenance import write_result

RANDOM = "random-"
MODES = ("budget", "span", "full")


def load(model: str, window: int) -> Backbone:
    """A decoder by name; a random one has the embedded decoder's vocabulary, so that layers and cache are what is seen.
    """
    if not model.startswith(RANDOM):
        return load_frozen(model)
    return load_shape(model.removeprefix(RANDOM), vocab_size=SHAPES["tiny"]["vocab_size"],
                      max_position_embeddings=window)


def measure(model: str, length: int, window: int, budget: int, mode: str) -> dict[str, Any] | None:
    """One row, in this process; None where a full cache does not fit."""
    backbone = load(model, window)
    ids = torch.randint(0, int(backbone.config.vocab_size), (length,),
                        generator=torch.Generator().manual_seed(1)).tolist()
    if mode == "full" and length + 1 >= backbone.max_positions:
        return None
    read = reader(backbone, budget, mode)
    read(ids[:8])
    with peak_memory() as peak:
        began = time.perf_counter()
        read(ids)
        seconds = time.perf_counter() - began
    return {"mode": mode, "length": length, "budget": None if mode == "full" else budget,
            "peak_mib": round(peak.bytes / 2**20, 1), "seconds": round(seconds, 2)}


def reader(backbone: Backbone, budget: int, mode: str) -> Callable[[list[int]], object]:
    """Reads token ids: to the first token of an answer, or into a pot of a quarter of the budget."""
    if mode == "span":
        compressor = InfiniPotCompressor(backbone, InfiniPotConfig(pot_tokens=budget))
        return lambda ids: compressor.distilled(ids, budget // 4)
    decoder = FrozenDecoder(backbone, cache_budget=budget if mode == "budget" else None)
    return lambda ids: decoder.generate([TokenIds(tuple(ids))], GenerationSettings(max_new_tokens=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-0.5b", help="random-0.5b, random-tiny, a folder or a hub id")
    parser.add_argument("--lengths", default="512,1024,2048")
    parser.add_argument("--window", type=int, default=32768, help="positions of a random model")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cache_budget.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        length, mode = json.loads(args.one)
        print(json.dumps(measure(args.model, length, args.window, args.budget, mode)))
        return
    rows = []
    for mode in args.modes.split(","):
        for length in map(int, args.lengths.split(",")):
            command = [sys.executable, __file__, "--model", args.model, "--window", str(args.window), "--budget",
                       str(args.budget), "--one", json.dumps([length, mode])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.strip().splitlines()[-1])
            rows += [row] if row else []
    print_table(rows)
    write_result(args.out, {"model": args.model, "budget": args.budget, "rows": rows})


if __name__ == "__main__":
    main()
