"""What benchmarks share: tables, and jobs dealt out to processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from ctxcomp_rag.backbone import Backbone, load_frozen
from ctxcomp_rag.compressors import Compressor, load_compressor
from ctxcomp_rag.pipeline import load_trained_compressor

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a Markdown table."""
    print(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    keys = list(rows[0])
    lines = [[*keys], *(["-" if row[k] is None else f"{row[k]}" for k in keys] for row in rows)]
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(keys), *body])


def decoder_of(model: str | None) -> Backbone:
    """The decoder of a folder with decoder/ and icae/, or the embedded one."""
    return load_frozen(Path(model) / "decoder") if model else load_frozen()


def icae_of(model: str | None, backbone: Backbone) -> Compressor:
    """The trained compressor beside it."""
    return load_compressor(Path(model) / "icae", backbone) if model else load_trained_compressor("icae", backbone)


def in_processes(work: Callable[[_Job], _Result], jobs: Sequence[_Job], processes: int) -> list[_Result]:
    """Results in the jobs' order; each process has one thread, which is what small decoders use best."""
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(tqdm(pool.map(work, jobs), total=len(jobs), unit="job"))
