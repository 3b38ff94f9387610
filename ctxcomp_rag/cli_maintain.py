"""The commands that look after an index: `ctxcomp verify`, `ctxcomp repair` and `ctxcomp compact`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from ctxcomp_rag.cli_output import IndexDir, IndexFolder, Json, print_json, quiet, to_out

if TYPE_CHECKING:
    from ctxcomp_rag.index.verify import Damage


def verify(index: IndexDir, as_json: Json = False) -> None:
    """Read every row of an index and check it. Exit code 0 clean, 3 damaged."""
    from ctxcomp_rag.index import MemoryIndex

    with MemoryIndex.open(index, read_only=True) as memory:
        report = memory.verify()
    damaged = [d.__dict__ for d in report.damaged]
    if as_json:
        print_json({"ok": report.ok, "chunks": report.chunks, "damaged": damaged, "notes": list(report.notes)})
    else:
        for note in report.notes:
            to_out.print(f"note: {note}")
        for entry in report.damaged:
            to_out.print(f"damaged: chunk {entry.chunk_id} of {entry.document_id}: {entry.reason}")
        to_out.print(f"{report.chunks} chunks, {len(damaged)} damaged"
                     + ("" if report.ok else "; run ctxcomp repair"))
    if not report.ok:
        raise typer.Exit(3)


def repair(
    index: IndexFolder,
    compressor: Annotated[str, typer.Option(help="Method name, or folder of the saved compressor that made the spans."
                                            )] = "icae",
    budget: Annotated[str | None, typer.Option(help="As it was given to precompress, if it was.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the decoder is (default: the one the index names).")] = None,
    as_json: Json = False,
) -> None:
    """Compress damaged chunks again from their stored text. Exit code 0 all are whole again, 3 some are not.

    A text is used only if it matches its own checksum; chunks without such a text are named and left as they are.
    """
    from ctxcomp_rag.index import MemoryIndex
    from ctxcomp_rag.pipeline import CompressedRAG
    from ctxcomp_rag.repair import repair_index

    with MemoryIndex.open(index, read_only=True) as memory:
        report, reader = memory.verify(), memory.spec.reader
    repaired: list[str] = []
    left: list[Damage] = []
    if not report.ok:
        quiet()
        where = model if model is not None else reader.model_id if reader else "embedded"
        with CompressedRAG.create(index, model=where, compressor=compressor, budget=budget) as rag, \
                tqdm(unit="chunk", desc="repair", file=sys.stderr, disable=None) as bar:
            repaired, left = repair_index(rag, progress=bar.update)
    if as_json:
        print_json({"chunks": report.chunks, "repaired": repaired, "damaged": [d.__dict__ for d in left]})
    else:
        for entry in left:
            to_out.print(f"still damaged: chunk {entry.chunk_id} of {entry.document_id}: {entry.reason}")
        advice = "; delete the documents of these and precompress them again" if left else ""
        to_out.print(f"{report.chunks} chunks, {len(repaired)} repaired, {len(left)} still damaged{advice}")
    if left:
        raise typer.Exit(3)


def compact(
    index: IndexFolder,
    erase: Annotated[bool, typer.Option("--erase", help="Also remove what readers of older versions still have open, "
                                        "so that deleted text, vectors and spans are in no file.")] = False,
    as_json: Json = False,
) -> None:
    """Merge small files and remove deleted chunks and old versions from the disk."""
    from ctxcomp_rag.index import MemoryIndex

    with MemoryIndex.open(index) as memory:
        before = memory.stats()["bytes"]
        memory.compact(erase=erase)
        after = memory.stats()
    if as_json:
        print_json({"chunks": after["chunks"], "bytes_before": before, "bytes": after["bytes"], "erased": erase})
    else:
        to_out.print(f"{after['chunks']} chunks, {before:,} bytes -> {after['bytes']:,} bytes")
