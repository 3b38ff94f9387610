"""The commands that measure: `ctxcomp eval` and `ctxcomp codecs`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ctxcomp_rag.cli_output import IndexDir, Json, Model, print_json, quiet, to_out


class Setting(StrEnum):
    """What a system is given to read."""

    oracle = "oracle"
    retrieved = "retrieved"
    both = "both"


def evaluate(
    task: Annotated[str, typer.Option(help="home (generated documents), squad, hotpotqa, or jsonl: your own questions, "
                                      "lines of question, answer(s), context.")] = "home",
    data: Annotated[Path | None, typer.Option(help="The task's file, or the folder it is in; home needs none.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions, drawn by the seed.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the questions and of the confidence intervals.")] = 1,
    setting: Annotated[Setting, typer.Option(help="Give the chunks that hold the answer, the retrieved ones, or both "
                                             "in turn.")] = Setting.both,
    factor: Annotated[list[float] | None, typer.Option(help="Source tokens per slot; may be repeated (default: 4, 8, "
                                                       "16, as far as the compressor can make them).")] = None,
    compressor: Annotated[str, typer.Option(help="Method name, or folder of a saved compressor.")] = "icae",
    model: Model = "embedded",
    top_k: Annotated[int, typer.Option(min=1, help="Chunks to retrieve.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Write the result, with every answer, to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Score full text, spans, truncated text and no context on the same questions and the same hits."""
    from ctxcomp_rag.backbone import load_frozen
    from ctxcomp_rag.evaluation.provenance import provenance, write_result
    from ctxcomp_rag.evaluation.run import SETTINGS, run_task
    from ctxcomp_rag.evaluation.systems import default_systems, possible_factors
    from ctxcomp_rag.evaluation.tasks import task_named
    from ctxcomp_rag.pipeline import load_trained_compressor
    from ctxcomp_rag.retrieval import load_retrieval_encoder

    posed = task_named(task).load(data, limit, seed)
    quiet()
    maker = load_trained_compressor(compressor, load_frozen(model))
    systems = default_systems(factor or possible_factors(maker))
    chosen = SETTINGS if setting is Setting.both else (setting.value,)
    with tqdm(desc="eval", unit="answer", file=sys.stderr, disable=None) as bar:
        def advance(what: str, answered: int) -> None:
            bar.set_postfix_str(what)
            bar.update(answered)

        result = run_task(posed, maker, load_retrieval_encoder(), settings=chosen, systems=systems, top_k=top_k,
                          seed=seed, progress=advance)
    report = {"task": task, "seed": seed, "top_k": top_k, **asdict(result)}
    if out is not None:
        write_result(out, report)
    if as_json:
        print_json({**provenance(), **{k: v for k, v in report.items() if k != "answers"}})
        return
    recall = result.retrieval_recall
    to_out.print(f"{task}: {result.questions} questions, {result.documents} documents, {result.chunks} chunks"
                 + ("" if recall is None else f", answer among the retrieved chunks: {recall:g} %"))
    to_out.print(f"{'setting':10} {'system':14} {'EM':>6} {'95 %':>14} {'F1':>6} {'of text':>8} {'positions':>10} "
                 f"{'1st token':>10}")
    for r in result.rows:
        kept = "-" if r.of_full_text is None else f"{r.of_full_text:.0f} %"
        wait = "-" if r.first_token_ms is None else f"{r.first_token_ms:.1f} ms"
        to_out.print(f"{r.setting:10} {r.system:14} {r.em:6.1f} {f'{r.em_interval[0]:.1f}-{r.em_interval[1]:.1f}':>14} "
                     f"{r.f1:6.1f} {kept:>8} {r.positions:10.1f} {wait:>10}"
                     + (f"  ({r.too_long} prompts do not fit the window)" if r.too_long else ""))


def codecs(
    index: IndexDir,
    sample: Annotated[int, typer.Option(min=1, help="Chunks to measure on.")] = 32,
    max_kl: Annotated[float, typer.Option(help="Loss to accept, in nats per token of the answers.")] = 0.01,
    model: Annotated[str | None, typer.Option(help="Where the decoder is (default: the one the index names).")] = None,
    compressor: Annotated[str, typer.Option(help="Method name, or folder of the saved compressor that made the index; "
                                            "read only where spans are latent or not stored exactly.")] = "icae",
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure on an index what storing its spans in fewer bytes costs, and name the smallest codec that will do."""
    from ctxcomp_rag.evaluation.codecs import measure_codecs
    from ctxcomp_rag.pipeline import CompressedRAG, load_trained_compressor

    quiet()
    saved = Path(compressor) if Path(compressor).is_dir() else None
    with CompressedRAG.open(index, model=model, compressor=saved) as rag:
        maker = rag.compressor if rag.memory.codec == "exact" else load_trained_compressor(compressor, rag.backbone)
        report = measure_codecs(rag.memory, rag.backbone, maker, sample=sample, seed=seed)
    best = report.smallest_within(max_kl)
    if as_json:
        print_json({"codecs": [c.__dict__ for c in report.costs], "skipped": report.skipped,
                    "recommended": best.codec})
        return
    to_out.print(f"{'codec':8} {'bytes/token':>12} {'rel. error':>11} {'KL, nats':>10} {'answers changed':>16}")
    for c in report.costs:
        size = f"{c.bytes_per_source_token:12.1f}"
        to_out.print(f"{c.codec:8} {size} {c.relative_error:11.1e} {c.kl:10.1e} {c.changed:16.0%}")
    for name, reason in report.skipped.items():
        to_out.print(f"{name:8} not measured: {reason}")
    to_out.print(f"recommended within {max_kl:g} nats: --codec {best.codec}")
