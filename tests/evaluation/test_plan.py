"""`ctxcomp plan`: its formulas on cases that were computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.cli import app
from ctxcomp_rag.errors import InputError, ModelLoadError
from ctxcomp_rag.evaluation.plan import PRESETS, ROW_BYTES, Corpus, ModelShape, plan, span_bytes, vector_bytes

EIGHT = ModelShape(8e9, 4096, 32, 8, 128)
SEVENTY = ModelShape(70e9, 8192, 80, 8, 128)


def test_an_8b_decoder_that_compresses_a_billion_chunks_for_itself_at_16x() -> None:
    """k = 512/16 = 32. Compressing: 2 * 8e9 * 544 = 8.704e12 FLOP a chunk, by 400e12 FLOP/s 46 chunks/s, 6,044 hours,
    15,111 dollars. A read saves 2 * 8e9 * 480 = 7.68e12: 544/480 = 1.133 reads a chunk, 10 a query."""
    (row,) = plan(Corpus(1e9), EIGHT, EIGHT, factors=[16], codecs=["exact"])
    assert (row.slots, row.span_bytes) == (32, 32 * 4096 * 2)
    assert row.gpu_hours == pytest.approx(6044.4, abs=0.1)
    assert row.dollars == pytest.approx(15111.1, abs=0.1)
    assert row.break_even_queries == pytest.approx(1.13333e8, rel=1e-5)
    assert row.text_ratio == pytest.approx(262144 / (512 * 3.83))
    # text 1,961, row 450, vector 1,536 and a byte a number for search with its id
    assert row.chunk_bytes == 262144 + 1961 + ROW_BYTES + 1536 + 384 + 8
    assert row.total_bytes == row.chunk_bytes * 1e9
    assert row.storage_dollars == pytest.approx(row.chunk_bytes * 0.023)
    # a query saves 10 * 7.68e12 FLOP at 2.5 / 3600 / 400e12 dollars: 1.3333e-4 dollars
    assert row.storage_queries == pytest.approx(row.storage_dollars / 1.33333e-4, rel=1e-4)


@pytest.mark.parametrize(("decoder", "encoder", "factor", "reads"), [
    (EIGHT, EIGHT, 4, 640 / 384), (EIGHT, EIGHT, 128, 516 / 508), (SEVENTY, EIGHT, 16, 544 / 480 * 8 / 70),
])
def test_reads_of_a_chunk_that_pay_for_compressing_it(decoder: ModelShape, encoder: ModelShape, factor: float,
                                                      reads: float) -> None:
    (row,) = plan(Corpus(1000, top_k=5), decoder, encoder, factors=[factor], codecs=["exact"])
    assert row.break_even_queries == pytest.approx(1000 * reads / 5)


def test_prices_and_speed_are_proportional() -> None:
    usual, dear = (plan(Corpus(1e6, gpu_hour=h, tflops=t, storage_month=s), EIGHT, EIGHT, factors=[4],
                        codecs=["exact"])[0] for h, t, s in ((2.0, 400, 0.02), (6.0, 200, 0.08)))
    assert dear.dollars == pytest.approx(6 * usual.dollars)
    assert dear.gpu_hours == pytest.approx(2 * usual.gpu_hours)
    assert dear.break_even_queries == pytest.approx(usual.break_even_queries)
    assert dear.storage_dollars == pytest.approx(4 * usual.storage_dollars)
    assert dear.storage_queries == pytest.approx(4 / 6 * usual.storage_queries)


def test_bytes_of_spans() -> None:
    assert span_bytes(EIGHT, 32, "kv", "exact") == 32 * 131_072  # 131,072 bytes for each entry of Llama 3 8B
    assert span_bytes(EIGHT, 128, "soft", "exact") == 1_048_576
    soft = {codec: span_bytes(EIGHT, 128, "soft", codec) for codec in ("int8", "rotated4", "rotated2")}
    assert 1_048_576 / 2 <= soft["int8"] < 1_048_576 / 2 * 1.1
    assert soft["rotated2"] < soft["rotated4"] < soft["int8"]
    assert (vector_bytes(384, 1000), vector_bytes(384, 1e6)) == (1536 * 2 + 8, 1536 + 384 + 8)


def test_shapes_are_named_given_by_numbers_or_read_from_a_config(tmp_path: Path) -> None:
    assert ModelShape.parse("70B") == PRESETS["70b"]
    numbers = "parameters=8e9,hidden_size=4096,num_layers=32, num_kv_heads=8,head_dim=128"
    assert ModelShape.parse(numbers) == EIGHT
    decoder = load_frozen()
    read = ModelShape.parse("embedded")
    print_of = decoder.fingerprint
    assert read.parameters == sum(p.numel() for p in decoder.model.parameters())
    assert (read.hidden_size, read.num_layers, read.num_kv_heads, read.head_dim) == (
        print_of.hidden_size, print_of.num_layers, print_of.num_kv_heads, print_of.head_dim)
    with pytest.raises(InputError, match=r"expected a shape such as 'parameters=8e9.*got 'parameters=8e9'"):
        ModelShape.parse("parameters=8e9")
    with pytest.raises(InputError, match="expected numbers as in"):
        ModelShape.parse(numbers.replace("4096", "wide"))
    with pytest.raises(InputError, match="above 0"):
        ModelShape.parse(numbers.replace("4096", "-1"))
    with pytest.raises(ModelLoadError, match=r"expected a preset \(0.5b, 1b, 3b, 8b, 70b\).*got '.*nowhere'"):
        ModelShape.parse(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("factor", "match"), [(1.0, "factor above 1"), (1.001, "fewer slots than tokens")])
def test_a_factor_that_saves_nothing_is_refused(factor: float, match: str) -> None:
    with pytest.raises(InputError, match=match):
        plan(Corpus(10), EIGHT, EIGHT, factors=[factor])
    with pytest.raises(InputError, match="expected chunks above 0"):
        Corpus(0)


def test_the_command_prints_a_row_for_each_factor_and_codec() -> None:
    words = ["plan", "--chunks", "1e9", "--model", "8b", "--factor", "16", "--codec", "exact", "--codec", "int8"]
    result = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [(r["factor"], r["codec"]) for r in result["rows"]] == [(16, "exact"), (16, "int8")]
    assert result["corpus"]["chunks"] == 1e9
    shown = CliRunner().invoke(app, words).stdout
    assert "1,000,000,000 chunks of 512 tokens" in shown
    assert "266 TB" in shown


def test_a_codec_that_learns_from_an_index_is_refused() -> None:
    with pytest.raises(InputError, match=r"the codec 'pq4' learns from the spans of an index.*ctxcomp codecs"):
        plan(Corpus(10), EIGHT, EIGHT, codecs=["pq4"])
