"""The command that draws: `ctxcomp report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxcomp_rag.cli_output import Json, print_json, to_out
from ctxcomp_rag.errors import InputError


def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT...", help="JSON files of `ctxcomp eval` and of "
                                                  "benchmarks/results.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Draw results as one page to look at: quality against factor and time, bytes, differing answers, needles."""
    from ctxcomp_rag.evaluation.report import render_report

    page = render_report(results)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{str(out)!r} cannot be written ({error}); pass another --out") from error
    if as_json:
        print_json({"out": str(out), "results": len(results), "bytes": len(page.encode())})
        return
    to_out.print(f"drew {len(results)} results in {out} ({len(page.encode()) / 1024:.0f} KiB); open it in a browser")
