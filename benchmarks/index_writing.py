"""What writing the index costs a job, and what workers gain it: shares and ratios within one run each.

    python benchmarks/index_writing.py --documents 2000 --workers 1 2

Generated documents, the embedded model. `write_share`: seconds spent committing per second of the job. The committing
runs beside the workers, so it costs the job less than that where a core is free.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from ctxcomp_rag import CompressedRAG, Document
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.jobs import ProcessWorkers, SpanWorker, ThreadWorker, Workers, WorkerSettings, precompress

HERE = Path(__file__).parent


def measure(documents: list[Document], codec: str, size: int, folder: Path) -> dict[str, Any]:
    """One job into a new index."""
    with CompressedRAG.create(folder, codec=codec) as rag:
        assert rag.compressor is not None
        workers: Workers
        if size == 1:
            workers = ThreadWorker(SpanWorker(rag.compressor, rag.encoder))
        else:
            spec = rag.compressor.spec
            workers = ProcessWorkers(WorkerSettings("embedded", "icae", spec.decoder.dtype,
                                                    rag.memory.retrieval_encoder, spec.fingerprint), size)
        report = precompress(documents, rag.memory, rag.compressor, workers)
        return {"codec": codec, "workers": size, "chunks": report.chunks, "source_tokens": report.source_tokens,
                "seconds": round(report.seconds, 2), "tokens_per_second": round(report.source_tokens / report.seconds),
                "compress_seconds": round(report.compress_seconds, 2), "embed_seconds": round(report.embed_seconds, 2),
                "write_seconds": round(report.write_seconds, 3),
                "write_share": round(report.write_seconds / report.seconds, 4),
                "span_bytes": rag.memory.stats()["span_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--codecs", nargs="+", default=["exact", "int8"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "index_writing.json")
    args = parser.parse_args()
    documents = [Document(d.id, d.text) for d in generate_corpus(args.documents, seed=11)]
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on a disk, where fsync costs what it costs
        for size in args.workers:
            for codec in args.codecs:
                rows.append(measure(documents, codec, size, Path(folder) / f"{codec}-{size}"))
                print(rows[-1], flush=True)
    write_result(args.out, {"documents": args.documents, "rows": rows})


if __name__ == "__main__":
    main()
