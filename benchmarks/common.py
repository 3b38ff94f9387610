"""What benchmarks share: tables, and jobs dealt out to processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from pages import table
from tqdm import tqdm

from ctxcomp_rag.backbone import Backbone, load_frozen
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.decoding import FrozenDecoder
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.home_ground import evaluate_home_ground, reconstruction_bleu, split_corpus
from ctxcomp_rag.evaluation.systems import Comparison, System
from ctxcomp_rag.pipeline import load_trained_compressor
from ctxcomp_rag.retrieval import load_retrieval_encoder

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a Markdown table."""
    print(table(rows))


def decoder_of(model: str | None) -> Backbone:
    """The decoder of a folder with decoder/ and icae/, or the embedded one."""
    return load_frozen(Path(model) / "decoder") if model else load_frozen()


def compressor_of(model: str | None, backbone: Backbone, compressor: str | None = None) -> Compressor:
    """The compressor of this name or folder, or the ICAE one that was trained with the decoder of `decoder_of`."""
    own = Path(model) / "icae" if model else "icae"
    return load_trained_compressor(compressor or own, backbone)


def home_ground_rows(name: str, compressor: Compressor, factors: Sequence[float], documents: int,
                     seed: int) -> list[dict[str, Any]]:
    """A row for each factor: exact match with the right chunk and with three retrieved ones, reconstruction BLEU."""
    systems = [System("full_text", "text"), *(System(f"{f:g}x", "spans", f) for f in factors)]
    report = evaluate_home_ground(compressor, load_retrieval_encoder(), documents=documents, seed=seed, systems=systems,
                                  with_bleu=False)
    comparison = Comparison(compressor, FrozenDecoder(compressor.backbone))
    own = split_corpus(generate_corpus(documents, seed, "held_out"), compressor)
    return [{"compressor": name, "factor": f, "em": report.exact_match[f"{f:g}x"],
             "em_retrieved": report.exact_match_retrieved[f"{f:g}x"], "em_full_text": report.exact_match["full_text"],
             "bleu": reconstruction_bleu(comparison, own, f)} for f in factors]


def in_processes(work: Callable[[_Job], _Result], jobs: Sequence[_Job], processes: int) -> list[_Result]:
    """Results in the jobs' order; each process has one thread, which is what small decoders use best."""
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(tqdm(pool.map(work, jobs), total=len(jobs), unit="job"))
