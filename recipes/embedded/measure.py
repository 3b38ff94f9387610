"""How a checkpoint of train.py answers, by factor, from held-out documents.

    PYTHONPATH=. python recipes/embedded/measure.py CHECKPOINT --data DATA [--memory kept] [--rows 200]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from data import Corpus, Row
from kept import MEMORIES
from model import Model, Shape
from objective import READ, Encode, forward
from safetensors.torch import load_file
from tokenizers import Tokenizer


@torch.no_grad()
def evaluate(model: Model, corpus: Corpus, encode: Encode, rows: int = 24, seed: int = 7) -> dict[str, float]:
    """Exact match of teacher-forced greedy answers (equal to greedy decoding) and reconstruction loss by factor, of so
    many rows of one document (two in three as many of several)."""
    result: dict[str, float] = {}
    autoencode = model.shape.vocab_size + 1

    def score(name: str, drawn: list[Row]) -> None:
        out = forward(model, drawn, corpus.separator, encode=encode)
        answers = [k for k in READ if k.startswith("answer")]
        tokens = max(1, sum(out.counts[k] for k in answers))
        result[name + ".answer"] = round(sum(out.sums[k] for k in answers) / tokens, 4)
        only = [Row(r.prefix, r.parts, [b for b in r.branches if b.kind == "answer"], source=r.source) for r in drawn]
        got = forward(model, only, corpus.separator, encode=encode).exact
        result[name + ".em"] = round(100 * sum(got) / max(1, len(got)), 1)
        if out.counts["reconstruct"]:
            result[name + ".rec"] = round(out.sums["reconstruct"] / out.counts["reconstruct"], 4)

    for source in ("fictional", "squad"):
        for factor in (None, 1.0, 2.0, 4.0, 8.0, 16.0):
            name, rng = "text" if factor is None else f"{factor:g}x", random.Random(seed)
            score(f"{source}.{name}", [corpus.single_row(rng, source, factor, autoencode) for _ in range(rows)])
            if source == "fictional" and factor in (None, 4.0, 8.0):
                score(f"several.{name}", [corpus.several_row(rng, source, [factor] * 3) for _ in range(rows * 2 // 3)])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="beside it tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="folder with squad-dev-v1.1.json.xz")
    parser.add_argument("--memory", choices=tuple(MEMORIES), default="slots", help="what spans are: see kept.py")
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    kind, encode = MEMORIES[args.memory]
    model = kind(Shape())
    model.load_state_dict({k[6:]: v for k, v in load_file(args.checkpoint).items() if k.startswith("model.")})
    tokenizer = Tokenizer.from_file(str(args.checkpoint.parent / "tokenizer.json"))
    print(json.dumps(evaluate(model, Corpus(tokenizer, args.data, 0, squad="dev"), encode, args.rows), indent=1))


if __name__ == "__main__":
    main()
