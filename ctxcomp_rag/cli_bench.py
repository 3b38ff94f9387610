"""`ctxcomp bench`: time and memory of every way to read the same chunks."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from ctxcomp_rag.cli_output import Json, print_json, quiet, to_err, to_out
from ctxcomp_rag.errors import InputError

GROWTH_ROWS = ("raw", "soft-4x", "soft-16x", "prerolled-16x")


def bench(
    shape: Annotated[str, typer.Option(help="Decoder: 0.5b, 135m or tiny (random weights of that size), 'embedded', or "
                                       "the folder of a model.")] = "135m",
    rows: Annotated[str | None, typer.Option(help="Rows, with commas (default: all): raw, full-kv, prefix-same-order, "
                                             "prefix-reordered, soft-16x, prerolled-4x, infinipot-kv-4x, "
                                             "question-only, at any factor, each also with -fast-attention or "
                                             "-int8 at its end.")] = None,
    chunks: Annotated[str, typer.Option(help="Chunks in the prompt; with commas, such as 2,5,10,20,50: how time and "
                                        "cache grow, without an answer.")] = "5",
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Source tokens of each.")] = 512,
    question_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the question.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to answer with.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each row is run, in turn.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the token ids.")] = 0,
    peer: Annotated[list[str] | None, typer.Option(help="NAME=PYTHON: another project (kvpress, llmlingua, vllm, "
                                                   "llama.cpp, openvino, icae, pcc) and the interpreter that has "
                                                   "it; may be repeated.")] = None,
    checkout: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER: where the code of a peer lies that is no "
                                                       "package (icae: a clone of getao/icae, pcc: of "
                                                       "broalantaps/The-most-influential-graduation-project).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the growth with the chunks into this SVG or PNG.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure raw text, cached text and spans side by side: time, memory, and how far from the limit."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded: idle threads must not spin
    from ctxcomp_rag.evaluation.bench import growth, report
    from ctxcomp_rag.evaluation.bench.rows import ROWS
    from ctxcomp_rag.evaluation.bench.run import run_rows
    from ctxcomp_rag.evaluation.bench.workload import Workload
    from ctxcomp_rag.evaluation.provenance import provenance, require_writable, write_result

    quiet()
    counts = _counts(chunks)
    interpreters = _named_paths("--peer", peer or [], "kvpress=VENV/bin/python")
    checkouts = _named_paths("--checkout", checkout or [], "icae=FOLDER")
    if len(counts) > 1 and (interpreters or checkouts):
        raise InputError("--peer and --checkout go with one number of --chunks")
    if plot is not None and len(counts) == 1:
        raise InputError(f"--plot draws the growth with the chunks; give several to --chunks, got {chunks}")
    if out is not None:
        require_writable(out)
    workload = Workload(counts[0], chunk_tokens, question_tokens, new_tokens, seed)
    names = [name.strip() for name in rows.split(",")] if rows is not None else list(
        GROWTH_ROWS if len(counts) > 1 else ROWS)
    about: dict[str, Any] = {"shape": shape, "workload": {**asdict(workload), "chunks": counts}}

    def save(found: dict[str, Any]) -> dict[str, Any]:
        whole = {**about, "conditions": report.conditions(), **found}
        if out is not None:  # after each round: a run that is cut short has measured something
            write_result(out, whole)
        return whole

    whole: dict[str, Any] = {}
    with tqdm(desc="bench", unit="run", file=sys.stderr, disable=None) as bar:
        def advance(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        if len(counts) > 1:
            for grown in growth.measure_growth(shape, names, counts, workload, repeats, progress=advance):
                whole, table = save({"repeats": repeats, "growth": growth.growth_json(grown)}), \
                    growth.growth_table(grown)
                if plot is not None:
                    growth.plot_growth(grown, plot, f"{shape}, chunks of {chunk_tokens} tokens, one thread, float32")
        else:
            for results in run_rows(shape, names, workload, repeats, peers=interpreters, checkouts=checkouts,
                                    progress=advance):
                whole, table = save({"repeats": results.repeats, "peers": dict(results.peers),
                                     "skipped": dict(results.skipped), "rows": report.as_json(results.rows)}), \
                    report.table(results.rows)
    if as_json:
        print_json({**provenance(), **whole})
        return
    to_out.print(table)
    for name, reason in whole.get("skipped", {}).items():
        if name.startswith(tuple(interpreters)):
            to_err.print(f"{name} did not run: {reason}")


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"expected --chunks as a number, or numbers such as 2,5,10, got {text!r}") from error


def _named_paths(option: str, given: list[str], example: str) -> dict[str, Path]:
    pairs = [text.partition("=") for text in given]
    wrong = [name for name, equals, path in pairs if not equals or not path]
    if wrong:
        raise InputError(f"expected {option} NAME=PATH, such as {example}, got {wrong[0]!r}")
    return {name: Path(path) for name, _, path in pairs}
