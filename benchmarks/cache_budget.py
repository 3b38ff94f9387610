"""Peak memory and time of reading against the length of the input, with and without a cache budget.

    python benchmarks/cache_budget.py [--model NAME] [--lengths 1024,4096,16384] [--budget 512] [--out FILE]

Each measurement runs in a process of its own: the peak is what that process took at most beyond what it took once the
model was loaded and had read a few tokens (resident memory; on a GPU, allocated memory). Without a budget the input
must fit into the decoder's window. The default model is a random one of the Qwen2 architecture, for shape and memory
only.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import print_table
from transformers import Qwen2Config, Qwen2ForCausalLM

from ctxcomp_rag.backbone import Backbone, load_frozen
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, TokenIds
from ctxcomp_rag.evaluation.provenance import write_result

RANDOM = {
    "random-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                    "num_key_value_heads": 2, "vocab_size": 151936},
    "random-tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
                    "num_key_value_heads": 4, "vocab_size": 2048},
}


def decoder(model: str, window: int, budget: int | None) -> FrozenDecoder:
    if model not in RANDOM:
        return FrozenDecoder(load_frozen(model), cache_budget=budget)
    torch.manual_seed(0)
    config = Qwen2Config(**RANDOM[model], max_position_embeddings=window, tie_word_embeddings=True, eos_token_id=0)
    tokenizer = load_frozen().tokenizer.hf  # ids stay below the size of the vocabulary; what they spell is no matter
    return FrozenDecoder(Backbone(Qwen2ForCausalLM(config), tokenizer, model_id=model), cache_budget=budget)


def resident_peak() -> int:
    """Highest resident memory of this process so far, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(model: str, length: int, window: int, budget: int | None, new_tokens: int) -> dict[str, Any]:
    """One row, in this process."""
    reader = decoder(model, window, budget)
    ids = torch.randint(0, int(reader.backbone.config.vocab_size), (length,),
                        generator=torch.Generator().manual_seed(1)).tolist()
    reader.generate([TokenIds(tuple(ids[:8]))], GenerationSettings(max_new_tokens=1))
    before = resident_peak()
    began = time.perf_counter()
    made = reader.generate([TokenIds(tuple(ids))], GenerationSettings(max_new_tokens=new_tokens))
    seconds = time.perf_counter() - began
    return {"length": length, "budget": budget, "peak_mib": round((resident_peak() - before) / 2**20, 1),
            "seconds": round(seconds, 2), "generated": made.completion_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-0.5b", help="random-0.5b, random-tiny, a folder or a hub id")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384")
    parser.add_argument("--window", type=int, default=32768, help="positions of a random model")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cache_budget.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        length, budget = json.loads(args.one)
        print(json.dumps(measure(args.model, length, args.window, budget, args.new_tokens)))
        return
    rows = []
    for length in map(int, args.lengths.split(",")):
        for budget in (args.budget, None):
            command = [sys.executable, __file__, "--model", args.model, "--window", str(args.window), "--new-tokens",
                       str(args.new_tokens), "--one", json.dumps([length, budget])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            last = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
            rows.append(json.loads(last[0]) if last else
                        {"length": length, "budget": budget, "peak_mib": None, "seconds": None, "generated": None})
            if not last:
                print(done.stderr.strip().splitlines()[-1:], file=sys.stderr)
    print_table(rows)
    write_result(args.out, {"model": args.model, "window": args.window, "rows": rows})


if __name__ == "__main__":
    main()
