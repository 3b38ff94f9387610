"""What training and held-out data share: SQuAD train against dev, and generated documents of both splits.

    python benchmarks/leakage.py --data DIR [--documents 5000] [--out FILE]

DIR holds squad-train-v1.1.json.xz and squad-dev-v1.1.json.xz.
"""

from __future__ import annotations

import argparse
import json
import lzma
from dataclasses import asdict
from pathlib import Path

from common import print_table

from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.leakage import Overlap, ngram_overlap, shared_subjects
from ctxcomp_rag.evaluation.provenance import write_result


def read_squad(path: Path) -> tuple[set[str], list[str], list[str]]:
    """(titles, paragraphs, questions)."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    paragraphs = [p for a in articles for p in a["paragraphs"]]
    return ({a["title"] for a in articles}, [p["context"] for p in paragraphs],
            [q["question"] for p in paragraphs for q in p["qas"]])


def row(what: str, overlap: Overlap) -> dict[str, object]:
    return {"what": what, **{k: v for k, v in asdict(overlap).items() if k != "examples"},
            "examples": list(overlap.examples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=5000, help="generated documents of each split")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/leakage.json"))
    args = parser.parse_args()
    titles, contexts, questions = read_squad(args.data / "squad-train-v1.1.json.xz")
    dev_titles, dev_contexts, dev_questions = read_squad(args.data / "squad-dev-v1.1.json.xz")
    train = generate_corpus(args.documents, 0, "train")
    held_out = generate_corpus(args.documents, 1, "held_out")
    rows = [row("SQuAD dev contexts in train contexts", ngram_overlap(contexts, dev_contexts)),
            row("SQuAD dev questions in train questions", ngram_overlap(questions, dev_questions)),
            row("held-out documents in training documents",
                ngram_overlap([d.text for d in train], [d.text for d in held_out]))]
    shared = {"articles": sorted(titles & dev_titles), "subjects": list(shared_subjects(train, held_out))}
    print_table([{k: v for k, v in r.items() if k != "examples"} for r in rows])
    print(f"shared articles: {shared['articles'] or 'none'}; shared subjects: {shared['subjects'] or 'none'}")
    write_result(args.out, {"documents": args.documents, "rows": rows, "shared": shared})


if __name__ == "__main__":
    main()
