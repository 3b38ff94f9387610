"""Compressing offline with ICAE at the official setting, 512 tokens to 128 slots: ours, the floor, the official code.

    python benchmarks/compress_speed.py [--shape 0.5b] [--checkout FOLDER] [--texts 3] [--repeats 3] [--out FILE]

`floor` is the bare decoder without head, cache or LoRA over as many rows. `official` is getao/icae (v2,
`ICAE._compress`) out of a checkout, unchanged, with weights, memory tokens and LoRA rank of ours; without a checkout it
is a stand-in that computes the same way: one segment at a time through the PEFT model as a whole, so with the
language-model head over every row, a KV cache and the hidden states of all layers. Its slots have to equal ours. CPU
time on one thread, each text by all three in turn, ratios within a text, then their median.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import print_table
from torch import Tensor

from ctxcomp_rag.compressors.icae import ICAECompressor
from ctxcomp_rag.evaluation.bench.clock import one_thread
from ctxcomp_rag.evaluation.bench.offline import timed
from ctxcomp_rag.evaluation.bench.peer_drivers.checkout import commit_of
from ctxcomp_rag.evaluation.bench.peer_drivers.icae import REPOSITORY, official_icae
from ctxcomp_rag.evaluation.bench.report import conditions
from ctxcomp_rag.evaluation.bench.shapes import load_shape
from ctxcomp_rag.evaluation.bench.workload import Workload
from ctxcomp_rag.evaluation.provenance import write_result


def encoder_rows(icae: ICAECompressor, ids: list[int]) -> Tensor:
    """Rows (1, len(ids) + num_memory_tokens, hidden_size) that the encoder reads."""
    memory = icae.memory_tokens[: icae.config.num_memory_tokens]
    return torch.cat([icae.backbone.embed(torch.tensor(ids)), memory])[None]


def stand_in(icae: ICAECompressor, ids: list[int]) -> Tensor:
    """Slots (num_memory_tokens, hidden_size) of one segment."""
    made = icae.encoder(inputs_embeds=encoder_rows(icae, ids), output_hidden_states=True)
    slots: Tensor = made.hidden_states[-1][0, len(ids) :]
    return slots


def official_code(icae: ICAECompressor, checkout: Path, decoder: Any) -> Callable[[list[int]], Tensor]:
    """Token ids of one segment -> slots (num_memory_tokens, hidden_size), by the code of the checkout."""
    slots = icae.config.num_memory_tokens
    theirs = official_icae(checkout, decoder, slots, int(icae.config.compression_factor), icae.config.lora_rank)
    theirs.memory_token_embed.weight.data[:slots] = icae.memory_tokens[:slots]
    return lambda ids: theirs._compress(torch.tensor([ids]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.5b")
    parser.add_argument("--checkout", type=Path, help="a clone of https://github.com/getao/icae")
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/compress_speed_SHAPE.json")
    args = parser.parse_args()
    one_thread()
    icae = ICAECompressor(load_shape(args.shape))
    body = icae.backbone.model.base_model
    texts = Workload(chunks=args.texts).chunk_ids(int(icae.backbone.config.vocab_size))
    official = (official_code(icae, args.checkout, load_shape(args.shape).model) if args.checkout is not None
                else partial(stand_in, icae))
    seconds: dict[str, list[float]] = {"ours": [], "floor": [], "official": []}
    for _ in range(args.repeats):
        for ids in texts:
            (ours,), one = timed(lambda ids=ids: icae.encode([ids]))
            rows = encoder_rows(icae, ids)
            _, two = timed(lambda rows=rows: body(inputs_embeds=rows, use_cache=False))
            theirs, three = timed(lambda ids=ids: official(ids))
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
            for taken, spent in zip(seconds.values(), (one, two, three), strict=True):
                taken.append(spent)

    def ratio(above: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(above, seconds["ours"], strict=True)), 3)

    tokens = len(texts[0])
    compared = "stand-in" if args.checkout is None else f"{REPOSITORY} {commit_of(args.checkout)}"
    rows = [{"row": name, "tokens_per_s": round(tokens / statistics.median(taken), 1), "time_over_ours": ratio(taken)}
            for name, taken in seconds.items()]
    print_table(rows)
    write_result(args.out or Path(f"benchmarks/results/compress_speed_{args.shape}.json"),
                 {"shape": args.shape, "official": compared, "segment_tokens": tokens,
                  "slots": icae.config.num_memory_tokens, "lora_rank": icae.config.lora_rank, "texts": args.texts,
                  "repeats": args.repeats, "conditions": conditions(), "rows": rows})


if __name__ == "__main__":
    main()
