"""Write documents of the fictional knowledge base, and questions about them, as data for `ctxcomp train`.

    python recipes/fictional_data.py --out runs/fictional

OUT/texts.jsonl holds the texts, OUT/questions.jsonl contexts with question and answer ("not stated" among them), all
of the training split: no name in them is one that the benchmarks ask for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ctxcomp_rag.evaluation.fictional import generate_corpus, training_questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "texts.jsonl").open("w") as texts, (args.out / "questions.jsonl").open("w") as asked:
        documents = generate_corpus(args.documents, args.seed, "train")
        texts.writelines(json.dumps({"text": d.text}) + "\n" for d in documents)
        asked.writelines(json.dumps({"context": text, "question": q.question, "answer": q.answer}) + "\n"
                         for text, q in training_questions(documents))


if __name__ == "__main__":
    main()
