"""`ctxcomp plan`: what compressing a corpus would cost, before anything is compressed."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from ctxcomp_rag.cli_output import Json, print_json, to_out
from ctxcomp_rag.errors import InputError


class SpanKindOption(StrEnum):
    """What a span is made of."""

    soft = "soft"
    kv = "kv"


def plan(
    chunks: Annotated[str, typer.Option(help="How many; 1e9 and the like are numbers too.")] = "1e6",
    model: Annotated[str, typer.Option(help="The decoder: 0.5b, 1b, 3b, 8b, 70b, a model whose config.json is here, "
                                       "or parameters=..,hidden_size=..,num_layers=..,num_kv_heads=..,head_dim=..")
                     ] = "8b",
    encoder: Annotated[str | None, typer.Option(help="What compresses, in the same forms (default: the decoder).")
                       ] = None,
    kind: Annotated[SpanKindOption, typer.Option(help="Soft slots, or keys and values of every layer.")
                    ] = SpanKindOption.soft,
    factor: Annotated[list[float] | None, typer.Option(help="Source tokens per slot; may be repeated (4, 8, 16).")
                      ] = None,
    codec: Annotated[list[str] | None, typer.Option(help="How spans are stored; may be repeated (all that learn "
                                                    "nothing).")
                     ] = None,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a chunk.")] = 512,
    top_k: Annotated[int, typer.Option(min=1, help="Chunks that a query reads.")] = 10,
    vector_size: Annotated[int, typer.Option(min=1, help="Numbers of a retrieval vector.")] = 384,
    tflops: Annotated[float, typer.Option(help="What one GPU really does, in 1e12 FLOP/s.")] = 400.0,
    gpu_hour: Annotated[float, typer.Option(help="Dollars for a GPU and an hour.")] = 2.5,
    storage_month: Annotated[float, typer.Option(help="Dollars for a GB (1e9 bytes) and a month.")] = 0.023,
    as_json: Json = False,
) -> None:
    """Compute storage, cost and break-even of a compressed corpus for each factor and codec. Nothing is downloaded."""
    from ctxcomp_rag.evaluation.plan import Corpus, ModelShape
    from ctxcomp_rag.evaluation.plan import plan as planned
    from ctxcomp_rag.index.codecs import CODECS

    try:
        count = float(chunks)
    except ValueError:
        raise InputError(f"expected a number of chunks such as 1e9, got {chunks!r}") from None
    corpus = Corpus(count, chunk_tokens, top_k, vector_size, tflops, gpu_hour, storage_month)
    decoder = ModelShape.parse(model)
    compresses = ModelShape.parse(encoder) if encoder is not None else decoder
    rows = planned(corpus, decoder, compresses, kind=kind.value, factors=factor or (4, 8, 16),
                   codecs=codec or [name for name, made in CODECS.items() if not made.learns])
    if as_json:
        print_json({"corpus": asdict(corpus), "decoder": asdict(decoder), "encoder": asdict(compresses),
                    "kind": kind.value, "rows": [asdict(row) for row in rows]})
        return
    to_out.print(f"{count:,.0f} chunks of {chunk_tokens} tokens, {decoder.parameters:.3g} parameters read them, "
                 f"{compresses.parameters:.3g} compress them, {top_k} chunks a query")
    to_out.print(f"{'factor':>6} {'codec':9} {'bytes/chunk':>12} {'span/text':>9} {'index':>10} {'$/month':>10} "
                 f"{'GPU-hours':>10} {'$ once':>10} {'pays after':>11} {'storage pays at':>17}")
    for r in rows:
        to_out.print(f"{r.factor:5g}x {r.codec:9} {r.chunk_bytes:12,} {r.text_ratio:8.1f}x {_bytes(r.total_bytes):>10} "
                     f"{r.storage_dollars:10,.0f} {r.gpu_hours:10,.0f} {r.dollars:10,.0f} "
                     f"{r.break_even_queries:11.3g} {r.storage_queries:10.3g}/month")
    to_out.print("pays after: queries whose saved prefill is worth the compressing; storage pays at: queries a month "
                 "whose saved prefill is worth the storing. Attention, decoding and quality are left out.")


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"
