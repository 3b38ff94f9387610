"""How much one decoder gives to 1, 4 and 16 callers at once, through the scheduler that the server uses.

    python benchmarks/callers.py [--callers 1,4,16] [--requests 48] [--tokens 32] [--rounds 3] [--out FILE]

Every caller asks, waits for its streamed answer, and asks again (spans of three retrieved chunks, greedy, answers of
one length). The numbers of callers take turns, round by round, so that a busy machine slows all alike; the medians of
the rounds are compared. Tokens per CPU second leave out what the machine did for others meanwhile. Every streamed
answer is compared with that of the same request alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import print_table
from tqdm import tqdm

from ctxcomp_rag import CompressedRAG, Document, FrozenDecoder, GenerationSettings, Part, RequestScheduler
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.provenance import write_result

_SPEEDS = {"per_second": "tokens_per_second", "per_cpu_second": "tokens_per_cpu_second"}


def one_round(decoder: FrozenDecoder, prompts: list[list[Part]], settings: GenerationSettings, callers: int,
              requests: int, expected: list[str]) -> dict[str, float]:
    """Figures of one round; `wrong` counts streamed answers that differ from those of the request alone."""
    waits: list[float] = []

    def ask(number: int) -> bool:
        began, first = time.perf_counter(), 0.0
        text = ""
        for piece in scheduler.submit(prompts[number % len(prompts)], settings).pieces():
            first = first or time.perf_counter() - began
            text += piece
        waits.append(first)
        return text != expected[number % len(prompts)]

    with RequestScheduler(decoder, max_batch=callers) as scheduler, ThreadPoolExecutor(callers) as pool:
        wall, cpu = time.perf_counter(), time.process_time()
        wrong = sum(pool.map(ask, range(requests)))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = requests * settings.max_new_tokens
    return {"per_second": tokens / wall, "per_cpu_second": tokens / cpu, "wrong": wrong,
            "first_piece_ms": 1000 * statistics.median(waits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=lambda s: [int(n) for n in s.split(",")], default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=48, help="of each round")
    parser.add_argument("--tokens", type=int, default=32, help="of every answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "callers.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpus = generate_corpus(24, seed=9)
    settings = GenerationSettings(args.tokens)
    rounds: dict[int, list[dict[str, float]]] = {n: [] for n in args.callers}
    with tempfile.TemporaryDirectory() as folder, CompressedRAG.create(folder) as rag:
        rag.index(Document(d.id, d.text) for d in corpus)
        questions = [d.questions[0].question for d in corpus]
        prompts = [rag.prompt(q, rag.retrieve(q)) for q in questions]
        decoder = FrozenDecoder(rag.backbone, end_ids=[-1])  # answers of one length
        expected = [decoder.generate(p, settings).text for p in prompts]
        for _ in tqdm(range(args.rounds), unit="round"):
            for callers in args.callers:
                rounds[callers].append(one_round(decoder, prompts, settings, callers, args.requests, expected))
    rows: list[dict[str, Any]] = []
    for callers, made in rounds.items():
        middle = {key: statistics.median(m[key] for m in made) for key in made[0]}
        base = rows[0] if rows else None
        times = {name: round(middle[key] / base[name], 2) if base else 1.0 for key, name in _SPEEDS.items()}
        rows.append({"callers": callers, **{name: round(middle[key], 1) for key, name in _SPEEDS.items()},
                     "times_one": times["tokens_per_second"], "times_one_cpu": times["tokens_per_cpu_second"],
                     "first_piece_ms": round(middle["first_piece_ms"], 1), "wrong": sum(m["wrong"] for m in made)})
    print_table(rows)
    write_result(args.out, {"requests": args.requests, "tokens": args.tokens, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
