"""`ctxcomp bench`: time and memory of every way to read the same chunks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ctxcomp_rag.cli_output import Json, print_json, quiet, to_out


def bench(
    shape: Annotated[str, typer.Option(help="Decoder: 0.5b, 135m or tiny (random weights of that size), 'embedded', or "
                                       "the folder of a model.")] = "135m",
    rows: Annotated[str | None, typer.Option(help="Rows, with commas (default: all): raw, full-kv, prefix-same-order, "
                                             "prefix-reordered, soft-16x, prerolled-4x, infinipot-kv-4x, "
                                             "question-only, at any factor, each also with -fast-attention or "
                                             "-int8 at its end.")] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks in the prompt.")] = 5,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Source tokens of each.")] = 512,
    question_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the question.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to answer with.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each row is run, in turn.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the token ids.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure raw text, cached text and spans side by side: time, memory, and how far from the limit."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded: idle threads must not spin
    from ctxcomp_rag.evaluation.bench.report import as_json as rows_as_json
    from ctxcomp_rag.evaluation.bench.report import conditions, table
    from ctxcomp_rag.evaluation.bench.rows import ROWS
    from ctxcomp_rag.evaluation.bench.run import run_rows
    from ctxcomp_rag.evaluation.bench.workload import Workload
    from ctxcomp_rag.evaluation.provenance import provenance, write_result

    quiet()
    workload = Workload(chunks, chunk_tokens, question_tokens, new_tokens, seed)
    names = [name.strip() for name in rows.split(",")] if rows is not None else list(ROWS)
    done = 0
    with tqdm(desc="bench", unit="run", file=sys.stderr, disable=None) as bar:
        def advance(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        for results in run_rows(shape, names, workload, repeats, advance):
            done += 1
            report = {"shape": shape, "workload": workload.__dict__, "repeats": done, "conditions": conditions(),
                      "rows": rows_as_json(results)}
            if out is not None:  # after each repeat: a run that is cut short has measured something
                write_result(out, report)
    if as_json:
        print_json({**provenance(), **report})
        return
    to_out.print(table(results))
