"""The command that fills an index: `ctxcomp precompress`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from ctxcomp_rag.cli_output import Json, Model, print_json, quiet, to_err, to_out
from ctxcomp_rag.errors import CtxcompError, InputError

if TYPE_CHECKING:
    from ctxcomp_rag.chunking import Document
    from ctxcomp_rag.jobs import Progress, Workers
    from ctxcomp_rag.pipeline import CompressedRAG


class OnError(StrEnum):
    """What to do with a file that cannot be read."""

    stop = "stop"
    skip = "skip"


class Engine(StrEnum):
    """Where the workers run."""

    local = "local"
    ray = "ray"


def precompress(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files, folders, or '-' for standard input: "
                                               "txt, md, html, jsonl, csv, parquet, pdf.")],
    out: Annotated[Path, typer.Option(help="Folder of the index; an index made by the same compressor is added to.")],
    compressor: Annotated[str, typer.Option(help="icae, icae-nested (one index, read at 4x, 8x or 16x: "
                                                "ask --factor), pcc, infinipot, or folder of a saved compressor."
                                                )] = "icae",
    factor: Annotated[float | None, typer.Option(help="Source tokens per slot (default: the compressor's).")] = None,
    budget: Annotated[str | None, typer.Option(help="Size of a chunk's span, for methods that need no training: "
                                               "256slots, 64KiB or 4x.")] = None,
    latent: Annotated[bool, typer.Option("--latent", help="A new index holds the memory of the compressor's encoder, "
                                         "which every decoder with a converter for it reads.")] = False,
    model: Model = "embedded",
    chunk_tokens: Annotated[int | None, typer.Option(help="Longest chunk (default: the compressor's).")] = None,
    overlap_tokens: Annotated[int, typer.Option(help="Tokens that neighbouring chunks share.")] = 0,
    codec: Annotated[str | None, typer.Option(help="How a new index stores spans: exact, int8, fp8, int4, "
                                              "rotated4, rotated3, rotated2, pq4, pq2, pq1, or pca with a rank "
                                              "(default: int8, KV spans exact; ctxcomp codecs measures them).")
                    ] = None,
    text_column: Annotated[str, typer.Option(help="Column or field of the text in jsonl, csv, parquet.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="Column of the document id (default: file#row).")] = None,
    retention: Annotated[bool, typer.Option("--retention", help="Measure what each new span retains: the share of the "
                                            "chunk's numbers, dates and names that the decoder reads out of it.")
                         ] = False,
    target_retention: Annotated[float | None, typer.Option(help="Give each chunk the fewest slots that retain this "
                                                           "share, such as 0.95.")] = None,
    metadata_column: Annotated[list[str] | None, typer.Option(help="Column kept as metadata; may be repeated.")] = None,
    on_error: Annotated[OnError, typer.Option(help="A document that cannot be used: stop, or skip and report it.")
                        ] = OnError.stop,
    engine: Annotated[Engine, typer.Option(help="Compress on this machine, or on a Ray cluster (extra `ray`): the one "
                                           "that RAY_ADDRESS names, or a new one here.")] = Engine.local,
    workers: Annotated[int, typer.Option(min=1, help="Processes (Ray: actors) with a compressor each; 1: a thread of "
                                         "this process.")] = 1,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a batch, padding included.")] = 8192,
    report: Annotated[Path | None, typer.Option(help="Write a report as FILE.html and FILE.json.", metavar="FILE")
                      ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and chunk, report sizes, write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Compress documents into an index. Run it again to resume: what is committed is not done twice.

    Ctrl-C or SIGTERM finishes the batches that are under way and commits them.
    """
    from ctxcomp_rag.readers import read_documents

    if budget is not None and factor is not None:
        raise InputError(f"--factor {factor:g} and --budget {budget} both say how large a span is; give one of them")
    unread: dict[str, str] = {}
    position = _Position()
    documents = read_documents(paths, text_column=text_column, id_column=id_column,
                               metadata_columns=metadata_column or (), on_error=on_error.value,
                               on_skip=lambda name, error: unread.update({name: str(error)}), on_position=position.set)
    if dry_run:
        if target_retention is not None:
            raise InputError("a dry run compresses a first chunk at most, so it cannot know how many slots "
                             "--target-retention takes; leave one of the two out")
        result = _estimate(documents, model, compressor, factor, budget, latent, codec, chunk_tokens, overlap_tokens,
                           on_error.value)
    else:
        from ctxcomp_rag.jobs import WorkerSettings, stop_on_signals
        from ctxcomp_rag.jobs import precompress as run_job
        from ctxcomp_rag.pipeline import CompressedRAG

        quiet()
        with CompressedRAG.create(out, model=model, compressor=compressor, codec=codec, budget=budget,
                                  latent=latent, retention=retention, target_retention=target_retention) as rag:
            assert rag.compressor is not None
            spec = rag.compressor.spec
            settings = WorkerSettings(model, compressor, str(rag.backbone.dtype).removeprefix("torch."),
                                      rag.memory.retrieval_encoder, spec.fingerprint, factor=factor, budget=budget,
                                      latent=spec.kind == "latent", retention=retention,
                                      target_retention=target_retention)
            made_with = _workers(engine, workers, rag, settings)
            with stop_on_signals() as stop, _Shown(position) as shown:
                try:
                    done = run_job(documents, rag.memory, rag.compressor, made_with, factor=factor,
                                   overlap_tokens=overlap_tokens, max_chunk_tokens=chunk_tokens,
                                   batch_tokens=batch_tokens, on_error=on_error.value, progress=shown.show, stop=stop)
                except CtxcompError as error:
                    if report is not None:
                        _write_report(report, {"out": str(out), "error": str(error), "failures": unread}, shown.history)
                    raise
            if not done.stopped:
                rag.memory.compact()
            result = {**done.__dict__, "out": str(out), "bytes": rag.memory.stats()["bytes"]}
    result["failures"] = {**unread, **result["failures"]}
    if report is not None and not dry_run:
        _write_report(report, result, shown.history)
    _print(result, as_json)
    if not dry_run and stop.requested:
        to_err.print("interrupted; what was committed is kept, run the same command again to go on")
        raise typer.Exit(128 + stop.signal)


class _Position:
    """How far the files are read, in bytes."""

    read = total = 0

    def set(self, read: int, total: int) -> None:
        self.read, self.total = read, total


class _Shown:
    """The job's progress on standard error. Files are counted in bytes: how many documents they hold is not known."""

    def __init__(self, position: _Position) -> None:
        self._position = position
        self.history: list[Progress] = []
        self._bar = tqdm(unit="B", unit_scale=True, desc="precompress", file=sys.stderr, disable=None)

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, now: Progress) -> None:
        self.history.append(now)
        seconds = max(now.seconds, 1e-3)
        self._bar.total = self._position.total or None
        self._bar.set_postfix_str(f"{now.documents:,} docs, {now.documents / seconds:,.1f} docs/s, "
                                  f"{now.source_tokens / seconds:,.0f} tokens/s, index {now.bytes / 2**20:,.1f} MiB, "
                                  f"{now.failures} failures", refresh=False)
        self._bar.update(self._position.read - self._bar.n)


def _workers(engine: Engine, number: int, rag: CompressedRAG, settings: Any) -> Workers:
    from ctxcomp_rag.jobs import ProcessWorkers, SpanWorker, ThreadWorker

    if engine is Engine.ray:
        from ctxcomp_rag.jobs.ray_job import RayWorkers

        return RayWorkers(settings, number)
    if number > 1:
        return ProcessWorkers(settings, number)
    assert rag.compressor is not None
    return ThreadWorker(SpanWorker(rag.compressor, rag.encoder, factor=settings.factor))


def _estimate(documents: Iterable[Document], model: str, compressor: str, factor: float | None, budget: str | None,
              latent: bool, codec: str | None, chunk_tokens: int | None, overlap: int, on_error: str) -> dict[str, Any]:
    from ctxcomp_rag.backbone import load_frozen
    from ctxcomp_rag.chunking import split_document
    from ctxcomp_rag.compressors import load_trained_compressor
    from ctxcomp_rag.index.codecs import DEFAULT_CODEC, codec_named
    from ctxcomp_rag.index.rows import span_to_bytes

    quiet()
    backbone = load_frozen(model)
    maker = load_trained_compressor(compressor, backbone, budget)
    maker = maker.latent if latent else maker
    stored = codec_named(codec or DEFAULT_CODEC)
    share = 1.0  # of the exact bytes; what learns from an index's spans is not there yet, and counted as exact
    limit = maker.chunk_limit(chunk_tokens)
    result: dict[str, Any] = {"dry_run": True, "documents": 0, "chunks": 0, "source_tokens": 0, "slots": 0, "bytes": 0,
                              "failures": {}}
    for document in documents:
        try:
            chunks = split_document(document, backbone.tokenizer, max_tokens=limit, overlap_tokens=overlap)
        except CtxcompError as error:
            if on_error == "stop":
                raise
            result["failures"][document.id] = str(error)
            continue
        if not result["chunks"] and not stored.learns:
            (span,) = maker.compress(chunks[:1], compression_factor=factor)
            share = len(span_to_bytes(span, stored)) / (span.num_slots * maker.slot_bytes)
        slots = sum(maker.num_slots(c.num_tokens, factor) for c in chunks)
        for key, more in (("documents", 1), ("chunks", len(chunks)), ("slots", slots),
                          ("source_tokens", sum(c.num_tokens for c in chunks)),
                          ("bytes", round(share * slots * maker.slot_bytes))):
            result[key] += more
    return result


def _write_report(path: Path, result: dict[str, Any], history: list[Progress]) -> None:
    from ctxcomp_rag.evaluation.provenance import provenance
    from ctxcomp_rag.jobs import write_report

    for written in write_report(path, {**provenance(), **result}, history):
        to_err.print(f"report: {written}")


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    for name in result.get("replaced", ()):
        to_err.print(f"replaced {name}: its text has changed")
    for name, reason in result["failures"].items():
        to_err.print(f"skipped {name}: {reason}")
    dry_run = "dry_run" in result
    verb = "would compress" if dry_run else "compressed"
    to_out.print(f"{verb} {result['documents']} documents, {result['chunks']} chunks: "
                 f"{result['source_tokens']:,} tokens -> {result['slots']:,} slots, "
                 f"{result['bytes']:,} bytes" + ("" if dry_run else f" in {result['out']}"))
    if not dry_run:
        to_out.print(f"{result['added']} chunks added ({result['added'] - result['compressed']} of them copies), "
                     f"{result['skipped']} were there already, {result['removed']} outdated ones removed, "
                     f"{len(result['failures'])} failures, {result['seconds']:.1f} s")
