"""What training and held-out data share: SQuAD train and Wikipedia against what is asked about, and generated documents
of both splits.

    python benchmarks/leakage.py --data DIR [--documents 5000] [--wiki-files 3] [--out FILE]

DIR holds squad-train-v1.1.json.xz, squad-dev-v1.1.json.xz, hotpotqa-dev.jsonl.xz and the files of Wikipedia that the
decoder read, wiki-00.jsonl.xz and on.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from common import print_table

from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.leakage import Overlap, ngram_overlap, shared_subjects
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.records import read_json, read_lines

READ = 20000  # characters of an article that recipes/embedded reads


def read_squad(path: Path) -> tuple[set[str], list[str], list[str]]:
    """(titles, paragraphs, questions)."""
    articles = read_json(path)["data"]
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
    parser.add_argument("--wiki-files", type=int, default=3, help="of Wikipedia, that the decoder read")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/leakage.json"))
    args = parser.parse_args()
    titles, contexts, questions = read_squad(args.data / "squad-train-v1.1.json.xz")
    dev_titles, dev_contexts, dev_questions = read_squad(args.data / "squad-dev-v1.1.json.xz")
    wiki = [r for i in range(args.wiki_files) for _, r in read_lines(args.data / f"wiki-{i:02d}.jsonl.xz")]
    wiki_titles = {r["title"] for r in wiki}
    hotpot = [r for _, r in read_lines(args.data / "hotpotqa-dev.jsonl.xz")]
    train = generate_corpus(args.documents, 0, "train")
    held_out = generate_corpus(args.documents, 1, "held_out")
    rows = [row("SQuAD dev contexts in train contexts", ngram_overlap(contexts, dev_contexts)),
            row("SQuAD dev questions in train questions", ngram_overlap(questions, dev_questions)),
            row("SQuAD dev contexts in Wikipedia", ngram_overlap((r["text"][:READ] for r in wiki), dev_contexts)),
            row("held-out documents in training documents",
                ngram_overlap([d.text for d in train], [d.text for d in held_out]))]
    supported = {r["id"]: sorted(wiki_titles & set(r["supporting_facts"]["title"])) for r in hotpot}
    shared = {"articles": sorted(titles & dev_titles),
              "SQuAD dev articles in Wikipedia": sorted(wiki_titles & {t.replace("_", " ") for t in dev_titles}),
              "HotpotQA dev questions with an article in Wikipedia": {q: t for q, t in supported.items() if t},
              "subjects": list(shared_subjects(train, held_out))}
    print_table([{k: v for k, v in r.items() if k != "examples"} for r in rows])
    print("shared: " + "; ".join(f"{what}: {len(names)}" for what, names in shared.items()))
    print(f"of {len(hotpot)} questions of HotpotQA dev")
    write_result(args.out, {"documents": args.documents, "wiki_files": args.wiki_files,
                            "hotpotqa_questions": len(hotpot), "rows": rows, "shared": shared})


if __name__ == "__main__":
    main()
