"""Real English: SQuAD dev paragraphs and Wikipedia articles, precompressed once, asked through every system.

    python benchmarks/real_input.py --data DIR [--articles 500] [--questions 200] [--out FILE]

DIR holds squad-dev-v1.1.json.xz and wiki-00.jsonl.xz. Two settings: `oracle` gives each question the one chunk that
holds its answer; `retrieved` gives it the `--top-k` chunks that the retriever finds among all of them.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import print_table
from tqdm import tqdm

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.evaluation.metrics import exact_match, mean, token_f1
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.evaluation.systems import PREROLLED, Comparison, Question, System, default_systems
from ctxcomp_rag.evaluation.timing import time_to_first_token
from ctxcomp_rag.pipeline import CompressedRAG


def read_squad(path: Path) -> tuple[list[Document], list[dict[str, Any]]]:
    """Paragraphs as documents, and questions with their answers' character ranges."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    documents, questions = [], []
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(article["paragraphs"]):
            document = Document(f"squad/{a}/{p}", paragraph["context"], {"title": article["title"]})
            documents.append(document)
            for qa in paragraph["qas"]:
                first = qa["answers"][0]
                questions.append({"document": document.id, "question": qa["question"].strip(),
                                  "answers": tuple(x["text"] for x in qa["answers"]),
                                  "start": first["answer_start"], "end": first["answer_start"] + len(first["text"])})
    return documents, questions


def read_wikipedia(path: Path, count: int) -> list[Document]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    return [Document(f"wiki/{i}", r["text"], {"title": r["title"]}) for i, r in enumerate(rows) if r["text"].strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--articles", type=int, default=500)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timed", type=int, default=20, help="questions whose time to first token is measured")
    parser.add_argument("--index", type=Path, help="keep the index here [default: a temporary folder]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/real_input.json"))
    args = parser.parse_args()
    squad, questions = read_squad(args.data / "squad-dev-v1.1.json.xz")
    documents = squad + read_wikipedia(args.data / "wiki-00.jsonl.xz", args.articles)
    asked = random.Random(args.seed).sample(questions, args.questions)
    with tempfile.TemporaryDirectory() as scratch, CompressedRAG.create(args.index or scratch) as rag:
        assert rag.compressor is not None
        began = time.perf_counter()
        with tqdm(total=len(documents), unit="doc") as bar:
            report = rag.index(documents, progress=lambda done, _: bar.update(done) and None)
        rag.memory.compact()
        seconds = time.perf_counter() - began
        checked = rag.memory.verify()
        stats = rag.memory.stats()
        print(f"{report.documents} documents, {report.chunks} chunks in {seconds:.0f} s; verify: "
              f"{checked.chunks} chunks, {len(checked.damaged)} damaged")
        settings = {"oracle": [oracle(rag, q) for q in asked],
                    "retrieved": [retrieved(rag, q, args.top_k) for q in asked]}
        comparison = Comparison(rag.compressor, rag.decoder)
        rows = []
        for name, posed in settings.items():
            for system in [*default_systems(), PREROLLED[0]]:
                if name == "retrieved" and system.kind == "none":
                    continue
                rows.append({"setting": name, **measure(rag, comparison, system, posed, args.timed)})
        recall = mean([float(any(a.lower() in c.text.lower() for c in q.chunks for a in q.answers))
                       for q in settings["retrieved"]])
    print_table(rows)
    print(f"written to {args.out}")
    write_result(args.out, {
        "seed": args.seed, "top_k": args.top_k, "retrieval_recall": round(100 * recall, 1), "rows": rows,
        "index": {"documents": report.documents, "seconds": round(seconds, 1),
                  "source_tokens_per_second": round(report.source_tokens / seconds), "damaged": len(checked.damaged),
                  **{k: v for k, v in stats.items() if isinstance(v, int)},
                  "bytes_per_source_token": round(stats["bytes"] / stats["source_tokens"], 1),
                  "span_bytes_per_source_token": round(stats["span_bytes"] / stats["source_tokens"], 1)}})


def oracle(rag: CompressedRAG, asked: dict[str, Any]) -> Question:
    """The question with the one chunk that holds its answer."""
    chunks = [r.chunk for r in rag.memory.get(rag.memory.document_chunks(asked["document"]))]
    holding = [c for c in chunks if c.start <= asked["start"] and asked["end"] <= c.end]
    return Question(asked["question"], asked["answers"], tuple(holding[:1] or chunks[:1]))


def retrieved(rag: CompressedRAG, asked: dict[str, Any], top_k: int) -> Question:
    chunks = tuple(s.chunk for s in rag.retrieve(asked["question"], top_k=top_k))
    return Question(asked["question"], asked["answers"], chunks)


def measure(rag: CompressedRAG, comparison: Comparison, system: System, questions: list[Question],
            timed: int) -> dict[str, Any]:
    """Scores, positions and time to first token of one system."""
    answers = comparison.ask(system, questions)
    texts = [a.text.strip() for a in answers]
    times = [time_to_first_token(rag.decoder, {"": comparison.prompt(system, q)}, repeats=3)[""]
             for q in questions[:timed]]
    return {"system": system.name,
            "em": round(100 * mean([exact_match(t, q.answers) for t, q in zip(texts, questions, strict=True)]), 1),
            "f1": round(100 * mean([token_f1(t, q.answers) for t, q in zip(texts, questions, strict=True)]), 1),
            "positions": round(mean([float(a.usage.positions) for a in answers]), 1),
            "first_token_ms": round(1000 * statistics.median(times), 2)}


if __name__ == "__main__":
    main()
