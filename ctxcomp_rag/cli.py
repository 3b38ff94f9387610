"""The `ctxcomp` command: typed functions whose docstrings are the help.

Exit codes: 0 done; 1 an error of our own; 2 an error that the message explains; 3 damaged index; 130 interrupted; 143
asked to end (SIGTERM).
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.table import Table
from rich.text import Text

from ctxcomp_rag import (
    cli_bench,
    cli_maintain,
    cli_measure,
    cli_plan,
    cli_precompress,
    cli_push,
    cli_report,
    cli_serve,
    cli_train,
)
from ctxcomp_rag.cli_output import IndexDir, Json, Model, print_json, printable, quiet, to_err, to_out
from ctxcomp_rag.errors import CtxcompError, IndexDamagedError, InputError

app = typer.Typer(name="ctxcomp", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Compress documents once into memory spans; answer questions from the spliced spans.")
app.command()(cli_precompress.precompress)
app.command(name="eval")(cli_measure.evaluate)
app.command()(cli_measure.codecs)
app.command()(cli_serve.serve)
app.command("api-key")(cli_serve.api_key)
app.command()(cli_bench.bench)
app.command()(cli_report.report)
app.command()(cli_plan.plan)
app.command()(cli_push.push)
app.command()(cli_train.train)
for maintain in (cli_maintain.verify, cli_maintain.repair, cli_maintain.compact):
    app.command()(maintain)


class AnswerMode(StrEnum):
    """What stands for the retrieved chunks in the prompt."""

    spans = "spans"
    text = "text"
    truncated = "truncated"
    none = "none"


class ShareSlots(StrEnum):
    """How a slot budget is shared over the retrieved spans."""

    uniform = "uniform"
    proportional = "proportional"
    knapsack = "knapsack"


@app.command()
def ask(
    index: IndexDir,
    question: Annotated[str, typer.Argument(help="The question.")],
    mode: Annotated[AnswerMode, typer.Option(help="Read the chunks' spans, their text, the text truncated to the "
                                             "positions of the spans, or nothing.")] = AnswerMode.spans,
    top_k: Annotated[int, typer.Option(help="Chunks to retrieve.")] = 3,
    model: Annotated[str | None, typer.Option(help="Where the decoder is (default: the one the index names, or for "
                                              "latent spans the compressor).")] = None,
    compressor: Annotated[Path | None, typer.Option(help="Folder of the saved compressor that converts latent spans "
                                                    "for the decoder; its encoder is not loaded.")] = None,
    cache_budget: Annotated[int | None, typer.Option(help="Most cache entries for prompt and answer; beyond it the "
                                                     "decoder keeps what matters to the question.")] = None,
    factor: Annotated[float | None, typer.Option(help="Source tokens per slot at which nested spans are read.")] = None,
    slot_budget: Annotated[int | None, typer.Option(help="Most slots of all retrieved spans together.")] = None,
    share: Annotated[ShareSlots, typer.Option(help="How the slot budget is shared: evenly, by score, or for the most "
                                              "retention.")] = ShareSlots.uniform,
    min_retention: Annotated[float | None, typer.Option(help="Read chunks whose spans retain less as text.")] = None,
    quote: Annotated[bool, typer.Option("--quote", help="Hold the answer to the words of the retrieved texts, whatever "
                                        "the decoder reads in their place.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Answer a question from an index."""
    from ctxcomp_rag.decoding import GenerationSettings
    from ctxcomp_rag.evaluation.timing import cache_bytes
    from ctxcomp_rag.pipeline import CompressedRAG

    quiet()
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    with CompressedRAG.open(index, model=model, compressor=compressor, cache_budget=cache_budget) as rag:
        began = time.perf_counter()
        answer = rag.answer(question, mode=mode.value, top_k=top_k, settings=settings, factor=factor,
                            slot_budget=slot_budget, share=share.value, min_retention=min_retention, quote=quote)
        seconds = time.perf_counter() - began
        usage = {**answer.usage.__dict__, "positions": answer.usage.positions,
                 "completion_tokens": answer.completion_tokens, "seconds": round(seconds, 4),
                 "dropped": [s.chunk.id for s in answer.dropped],
                 "cache_bytes": cache_bytes(rag.decoder, min(answer.usage.positions,
                                                             cache_budget or answer.usage.positions))}
    sources = [{"id": s.chunk.id, "document_id": s.chunk.document_id, "start": s.chunk.start, "end": s.chunk.end,
                "score": round(s.score, 6), "text": s.chunk.text, "metadata": dict(s.chunk.metadata)}
               for s in answer.sources]
    if as_json:
        print_json({"answer": answer.text, "sources": sources, "usage": usage, "finish_reason": answer.finish_reason})
        return
    to_out.print(answer.text)
    for source in sources:
        place = f"{source['document_id']} [{source['start']}:{source['end']}]"
        to_err.print(f"  {source['score']:.3f}  {place}")
    for left_out in answer.dropped:
        to_err.print(f"  {left_out.score:.3f}  {left_out.chunk.document_id} did not fit the slot budget")
    to_err.print(f"  {usage['text_tokens']} text tokens + {usage['slots']} slots (for {usage['source_tokens']} source "
                 f"tokens), {usage['completion_tokens']} tokens generated, {seconds:.2f} s")


@app.command()
def inspect(index: IndexDir, as_json: Json = False) -> None:
    """Say what an index holds and who can read it."""
    from ctxcomp_rag.index import MemoryIndex

    with MemoryIndex.open(index, read_only=True) as memory:
        spec = {**memory.spec.to_dict(), "fingerprint": memory.spec.fingerprint}
        result = {**memory.stats(), "retrieval_encoder": memory.retrieval_encoder, "spec": spec}
    if as_json:
        print_json(result)
        return
    for key, value in result.items():
        if key != "spec":
            to_out.print(f"{key:18} {value:,}" if isinstance(value, int) else f"{key:18} {value}")
    to_out.print(f"{'decoder':18} {memory.spec.decoder}\n{'compressor':18} {memory.spec.compressor} "
                 f"({memory.spec.kind} spans, {memory.spec.slot_positions} positions)")


class OfficialMethod(StrEnum):
    """Whose checkpoint it is."""

    icae = "icae"
    pcc = "pcc"


@app.command("import")
def import_(
    method: Annotated[OfficialMethod, typer.Argument(help="Whose checkpoint it is.")],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="icae: the .safetensors (v2) or .pt (v1) file. "
                                          "pcc: the Lite or Large folder. Here, or on the Hugging Face hub: "
                                          "OWNER/NAME/FILE (icae), OWNER/NAME (pcc).")],
    out: Annotated[Path, typer.Option(help="Folder of the compressor, for `precompress --compressor`.")],
    model: Model = "embedded",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a SOURCE on the hub.")] = None,
    segment_tokens: Annotated[int | None, typer.Option(help="Longest segment; not in the file [default: icae v1 512, "
                                                       "v2 4 for each slot, pcc 256].")] = None,
    factor: Annotated[int, typer.Option(min=1, help="pcc: source tokens per slot; not in the files.")] = 4,
    patch: Annotated[Path | None, typer.Option(help="pcc: file of the decoder's special tokens "
                                               "[default: they are in the decoder].")] = None,
    encoder_base: Annotated[str | None, typer.Option(help="pcc Large: model under the adapter "
                                                     "[default: the one it names].")] = None,
    as_json: Json = False,
) -> None:
    """Turn an official checkpoint into a compressor folder."""
    from ctxcomp_rag.backbone import load_frozen
    from ctxcomp_rag.importers import from_official

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{str(out)!r} exists and is not an empty folder; choose another --out")
    compressor = from_official(method.value, source, load_frozen(model), revision=revision,
                               segment_tokens=segment_tokens, factor=factor, patch=patch, encoder_base=encoder_base)
    compressor.save_pretrained(out)
    result = {"method": method.value, "out": str(out), "compressor": compressor.spec.compressor,
              "segment_tokens": compressor.max_chunk_tokens, "compression_factor": compressor.compression_factor}
    if as_json:
        print_json(result)
        return
    to_out.print(f"imported {method.value}: segments of {result['segment_tokens']} tokens, "
                 f"{compressor.compression_factor:g}x, in {out}", markup=False)


@app.command()
def demo(seed: Annotated[int, typer.Option(help="Of the generated corpus: other seeds, other documents.")] = 1,
         documents: Annotated[int, typer.Option(help="Documents to generate.")] = 100, as_json: Json = False) -> None:
    """Compress generated documents, answer from spans and from text, and score every system. Offline."""
    from ctxcomp_rag.demo import run_demo

    quiet()
    result = run_demo(seed, documents=documents, say=lambda line: to_err.print(f"... {line}"))
    if as_json:
        print_json(result.to_json())
        return
    for example in result.examples:
        to_out.print(f"\n{example.question}   (expected: {example.expected})", style="bold")
        table = Table("read from", "answer", "positions", "first token", "cache")
        table.add_row("spans 4x", Text(printable(example.spans_answer)), f"{example.spans_positions}",
                      f"{1000 * example.spans_seconds:.1f} ms", f"{example.spans_cache_bytes / 1024:.0f} KiB")
        table.add_row("raw text", Text(printable(example.text_answer)), f"{example.text_positions}",
                      f"{1000 * example.text_seconds:.1f} ms", f"{example.text_cache_bytes / 1024:.0f} KiB")
        to_out.print(table)
    report = result.report
    table = Table("exact match, %", "the right chunk", f"{report.top_k} retrieved chunks")
    for system, score in report.exact_match.items():
        retrieved = report.exact_match_retrieved.get(system)
        table.add_row(system, f"{score:g}", "-" if retrieved is None else f"{retrieved:g}")
    to_out.print(table)
    to_out.print(f"{report.questions} questions about {result.documents} generated documents with names never seen "
                 f"in training (seed {result.seed}); {result.seconds:.0f} s in all")


def _interrupted(number: int, _: object) -> NoReturn:
    to_err.print("interrupted; what was committed is kept, run the same command again to go on")
    sys.exit(128 + number)


def main() -> NoReturn:
    """Entry point of the console script."""
    # typer would turn a KeyboardInterrupt into an exit without a word
    signal.signal(signal.SIGINT, _interrupted)
    signal.signal(signal.SIGTERM, _interrupted)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except CtxcompError as error:
        to_err.print(f"error: {error}", style="red")
        sys.exit(3 if isinstance(error, IndexDamagedError) else 2)
    sys.exit(0)


if __name__ == "__main__":
    main()
