"""What compressing a corpus would cost and when it would pay: storage, computing, break-even. Formulas, no measurement.

    slots k = ceil(T / factor)                      T tokens a chunk
    compressing a chunk = 2 P_encoder (T + k)       FLOP, a forward pass over text and slots
    saved by a read     = 2 P_decoder (T - k)       FLOP, prefill of k positions instead of T
    break-even queries  = chunks * compressing / (top_k * saved), in dollars

Left out: attention's own FLOP (for saving), decoding over a smaller cache (for), answers that get worse (against).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ctxcomp_rag.errors import InputError, ModelLoadError
from ctxcomp_rag.index.codecs import codec_named
from ctxcomp_rag.index.vectors import FLAT_MOST

TEXT_BYTES_PER_TOKEN = 3.83
"""English: 1.96 KB for 512 tokens."""
ROW_BYTES = 450
"""Names, checksums, metadata, positions and the span's header, for each chunk (docs/scale.md)."""


@dataclass(frozen=True)
class ModelShape:
    """What counts of a decoder-only model; weights are not needed."""

    parameters: float
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def parse(cls, text: str) -> ModelShape:
        """A preset ("8b"), numbers ("parameters=8e9,hidden_size=4096,num_layers=32,num_kv_heads=8,head_dim=128"), or
        a model whose config.json is on this machine: a folder, or a hub id that was downloaded before.

        Raises:
            InputError: a number is missing or is none.
            ModelLoadError: there is no such preset, and no such model here.
        """
        if text.lower() in PRESETS:
            return PRESETS[text.lower()]
        if "=" not in text:
            return _from_config(text)
        names = {"parameters": float, "hidden_size": int, "num_layers": int, "num_kv_heads": int, "head_dim": int}
        given = dict(pair.split("=", 1) for pair in text.replace(" ", "").split(",") if "=" in pair)
        if set(given) != set(names):
            raise InputError(f"expected a shape such as {_EXAMPLE}, got {text!r}")
        try:
            values = {name: kind(float(given[name])) for name, kind in names.items()}
        except ValueError:
            raise InputError(f"expected numbers as in {_EXAMPLE}, got {text!r}") from None
        if not all(0 < v < math.inf for v in values.values()):
            raise InputError(f"expected numbers above 0 in the shape {text!r}")
        return cls(**values)


_EXAMPLE = "'parameters=8e9,hidden_size=4096,num_layers=32,num_kv_heads=8,head_dim=128'"
PRESETS = {
    "0.5b": ModelShape(0.49e9, 896, 24, 2, 64),
    "1b": ModelShape(1.24e9, 2048, 16, 8, 64),
    "3b": ModelShape(3.21e9, 3072, 28, 8, 128),
    "8b": ModelShape(8.03e9, 4096, 32, 8, 128),
    "70b": ModelShape(70.6e9, 8192, 80, 8, 128),
}
"""Shapes of Qwen2.5 0.5B and Llama 3 1B to 70B."""


@dataclass(frozen=True)
class Corpus:
    """What is compressed, and at which prices.

    Attributes:
        chunks, chunk_tokens: how many, and how long each is.
        top_k: chunks that a query reads.
        vector_size: numbers of a retrieval vector.
        tflops: what a GPU really does, in 1e12 FLOP/s of matrix products.
        gpu_hour: dollars.
        storage_month: dollars for 1e9 bytes and a month.
    """

    chunks: float
    chunk_tokens: int = 512
    top_k: int = 10
    vector_size: int = 384
    tflops: float = 400.0
    gpu_hour: float = 2.5
    storage_month: float = 0.023

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise InputError(f"expected {name} above 0, got {value!r}")


@dataclass(frozen=True)
class PlanRow:
    """One factor and codec.

    Attributes:
        span_bytes: of a chunk's span without its header.
        chunk_bytes: of a chunk with text, vector and its copy for search.
        text_ratio: span bytes by text bytes.
        total_bytes, storage_dollars: of the index; the dollars are by the month.
        gpu_hours, dollars: once, to compress everything.
        break_even_queries: queries whose saved prefill is worth the compressing.
        storage_queries: queries a month whose saved prefill is worth the storing.
    """

    factor: float
    codec: str
    slots: int
    span_bytes: int
    chunk_bytes: int
    text_ratio: float
    total_bytes: float
    storage_dollars: float
    gpu_hours: float
    dollars: float
    break_even_queries: float
    storage_queries: float


def plan(corpus: Corpus, decoder: ModelShape, encoder: ModelShape, *, kind: Literal["soft", "kv"] = "soft",
         factors: Sequence[float] = (4, 8, 16), codecs: Sequence[str] = ("exact", "int8", "rotated4")) -> list[PlanRow]:
    """A row for each factor and codec. `encoder`: what compresses; for ICAE the decoder itself.

    Raises:
        InputError: a factor that leaves nothing to save, or a codec that is unknown or learns from an index's spans.
    """
    return [_row(corpus, decoder, encoder, kind, factor, codec) for factor in factors for codec in codecs]


def _row(corpus: Corpus, decoder: ModelShape, encoder: ModelShape, kind: Literal["soft", "kv"], factor: float,
         codec: str) -> PlanRow:
    tokens = corpus.chunk_tokens
    if not 1 < factor < math.inf:
        raise InputError(f"expected a factor above 1, got {factor:g}: with as many slots as tokens nothing is saved")
    slots = math.ceil(tokens / factor)
    if slots >= tokens:
        raise InputError(f"expected fewer slots than tokens, got {slots} for chunks of {tokens} tokens at {factor:g}x")
    dollars_per_flop = corpus.gpu_hour / (3600 * corpus.tflops * 1e12)
    compressing = 2 * encoder.parameters * (tokens + slots) * corpus.chunks
    saved_by_query = corpus.top_k * 2 * decoder.parameters * (tokens - slots) * dollars_per_flop
    span, text = span_bytes(decoder, slots, kind, codec), tokens * TEXT_BYTES_PER_TOKEN
    chunk = round(span + text + ROW_BYTES + vector_bytes(corpus.vector_size, corpus.chunks))
    storage = chunk * corpus.chunks / 1e9 * corpus.storage_month
    return PlanRow(factor, codec, slots, span, chunk, span / text, chunk * corpus.chunks, storage,
                   compressing / (corpus.tflops * 1e12) / 3600, compressing * dollars_per_flop,
                   compressing * dollars_per_flop / saved_by_query, storage / saved_by_query)


def span_bytes(decoder: ModelShape, slots: int, kind: Literal["soft", "kv"], codec: str) -> int:
    """What the codec makes of a span of float16 numbers, counted on one of a few layers."""
    chosen = codec_named(codec)
    if chosen.learns:
        raise InputError(f"the codec {codec!r} learns from the spans of an index, so a plan cannot count its bytes; "
                         "name another, or measure it on an index with ctxcomp codecs")

    def of(shape: tuple[int, ...], role: Literal["embeds", "keys", "values"]) -> int:
        made = chosen.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0)).half(), role)
        return sum(piece.nbytes for piece in made.values())

    if kind == "soft":
        return of((slots, decoder.hidden_size), "embeds")
    layer = (1, decoder.num_kv_heads, slots, decoder.head_dim)
    return decoder.num_layers * (of(layer, "keys") + of(layer, "values"))


def vector_bytes(vector_size: int, chunks: float) -> int:
    """The vector in its row, and its copy for search: as it is, or from `FLAT_MOST` chunks on a byte a number."""
    return 4 * vector_size + 8 + vector_size * (4 if chunks <= FLAT_MOST else 1)


def _from_config(name: str) -> ModelShape:
    from transformers import AutoConfig, AutoModelForCausalLM

    from ctxcomp_rag.backbone import EMBEDDED_MODEL, embedded_path

    where = embedded_path("decoder") if name == EMBEDDED_MODEL else Path(name)
    try:
        config = AutoConfig.from_pretrained(where if where.is_dir() else name, local_files_only=True)
        with torch.device("meta"):  # counts the parameters, makes none
            model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"expected a preset ({', '.join(PRESETS)}), a shape such as {_EXAMPLE}, or a model whose "
                             f"config.json is on this machine, got {name!r} ({str(error).splitlines()[0]})") from error
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(sum(p.numel() for p in model.parameters()), text.hidden_size, text.num_hidden_layers,
                      getattr(text, "num_key_value_heads", None) or heads, head_dim)
