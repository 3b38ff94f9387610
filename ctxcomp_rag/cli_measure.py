"""The commands that measure: `ctxcomp eval` and `ctxcomp codecs`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ctxcomp_rag.cli_output import IndexDir, Json, Model, print_json, quiet, to_err, to_out
from ctxcomp_rag.errors import InputError


class Setting(StrEnum):
    """What a system is given to read."""

    oracle = "oracle"
    retrieved = "retrieved"
    both = "both"


def evaluate(
    task: Annotated[str, typer.Option(help="home (generated documents), squad, hotpotqa, triviaqa, nq, gsm8k, sst2, "
                                      "wsc, needle, reconstruction, summarisation, perplexity, or jsonl: your own "
                                      "questions, lines of question, answer(s), context.")] = "home",
    data: Annotated[Path | None, typer.Option(help="The task's file, the folder it is in, or for tasks of the Hugging "
                                              "Face hub an id; home and needle need none.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions, drawn by the seed.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions and of the confidence intervals.")] = 1,
    setting: Annotated[Setting, typer.Option(help="Give the chunks that hold the answer, the retrieved ones, or both "
                                             "in turn.")] = Setting.both,
    factor: Annotated[list[float] | None, typer.Option(help="Source tokens per slot; may be repeated (default: 4, 8, "
                                                       "16, as far as the compressor can make them).")] = None,
    compressor: Annotated[list[str] | None, typer.Option(help="Method name, or folder of a saved compressor (default: "
                                                         "icae); may be repeated, rows of further ones begin with "
                                                         "their name.")] = None,
    codec: Annotated[list[str] | None, typer.Option(help="Also spans stored in fewer bytes: int8, fp8, int4, rotated4, "
                                                    "rotated3, rotated2; may be repeated.")] = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="Also the best chunk as text, the others as spans.")] = False,
    quote: Annotated[bool, typer.Option("--quote", help="Also full text, spans and cut text with answers held to the "
                                        "words of the chunks; for tasks that ask questions.")] = False,
    llmlingua: Annotated[str | None, typer.Option(help="Also text of which this LLMLingua-2 model (a folder or hub id) "
                                                  "keeps the words that matter.")] = None,
    model: Model = "embedded",
    top_k: Annotated[int, typer.Option(min=1, help="Chunks to retrieve.")] = 3,
    out: Annotated[Path | None, typer.Option(help="The JSON file to write the result to, with every answer (default: "
                                             "eval_TASK_DATE-TIME.json in the current folder).")] = None,
    as_json: Json = False,
) -> None:
    """Score full text, spans, truncated text and no context on the same questions and the same hits."""
    from ctxcomp_rag.backbone import load_frozen
    from ctxcomp_rag.compressors import possible_factors
    from ctxcomp_rag.evaluation.extractive import LLMLingua2
    from ctxcomp_rag.evaluation.provenance import measured, provenance, require_writable, write_result
    from ctxcomp_rag.evaluation.run import SETTINGS, run_task
    from ctxcomp_rag.evaluation.systems import default_systems, further_systems
    from ctxcomp_rag.evaluation.tasks import TASKS, task_named
    from ctxcomp_rag.pipeline import load_trained_compressor
    from ctxcomp_rag.retrieval import load_retrieval_encoder

    asking = task_named(task)
    if quote and asking.ask != "question":
        those = ", ".join(name for name, other in TASKS.items() if other.ask == "question")
        raise InputError(f"--quote is for tasks that ask questions, and {task!r} asks none; leave it out, or take one "
                         f"of {those}")
    out = out or Path(f"eval_{task}_{time.strftime('%Y%m%d-%H%M%S')}.json")
    require_writable(out)
    posed = asking.load(data, limit, seed)
    quiet()
    backbone = load_frozen(model)
    named = {name: load_trained_compressor(saved, backbone)
             for name, saved in short_names(compressor or ["icae"]).items()}
    maker, *_ = named.values()
    factors = factor or possible_factors(maker)
    systems = default_systems(factors) + further_systems(
        {name: made for name, made in named.items() if made is not maker}, factors, codecs=codec or (), mixed=mixed,
        extractor=LLMLingua2(llmlingua, backbone.tokenizer) if llmlingua else None, quote=quote)
    about = {"task": task, "seed": seed, "top_k": top_k, **measured(asking.files(data), backbone, named)}
    chosen = SETTINGS if setting is Setting.both else (setting.value,)
    with tqdm(desc="eval", unit="answer", file=sys.stderr, disable=None) as bar:
        def advance(what: str, answered: int) -> None:
            bar.set_postfix_str(what)
            bar.update(answered)

        result = run_task(posed, maker, load_retrieval_encoder(), settings=chosen, systems=systems, top_k=top_k,
                          seed=seed, progress=advance)
    report = {**about, **result.to_json()}
    write_result(out, report)
    to_err.print(f"result: {out}")
    if as_json:
        print_json({**provenance(), **{k: v for k, v in report.items() if k != "answers"}})
        return
    recall = result.retrieval_recall
    to_out.print(f"{task}: {result.questions} questions, {result.documents} documents, {result.chunks} chunks"
                 + ("" if recall is None else f", answer among the retrieved chunks: {recall:g} %"))
    measures = list(result.rows[0].scores)
    to_out.print(f"{'setting':10} {'system':18} " + " ".join(f"{m:>10} {'95 %':>12}" for m in measures)
                 + f" {'of text':>8} {'positions':>10} {'1st token':>10} {'whole':>10} {'index B/token':>13}")
    for r in result.rows:
        scores = " ".join(f"{r.scores[m]:10.1f} {'{:.1f}-{:.1f}'.format(*r.intervals[m]):>12}" for m in measures)
        kept = "-" if r.of_full_text is None else f"{r.of_full_text:.0f} %"
        waits = " ".join("-".rjust(10) if t is None else f"{t:7.1f} ms" for t in (r.first_token_ms, r.total_ms))
        stored = "-" if r.index_bytes is None else f"{r.index_bytes:g}"
        to_out.print(f"{r.setting:10} {r.system:18} {scores} {kept:>8} {r.positions:10.1f} {waits} {stored:>13}"
                     + (f"  ({r.too_long} prompts do not fit the window)" if r.too_long else ""))


def short_names(compressors: Sequence[str]) -> dict[str, str]:
    """Name -> compressor: folders by their last part, by their whole path where two would be called the same."""
    given = list(dict.fromkeys(compressors))
    short = [Path(name).name for name in given]
    return dict(zip(short if len(set(short)) == len(short) else given, given, strict=True))


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
