"""`ctxcomp bench`: its rows read what they say, its ratios are of one run, peers that are absent say so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.cli import app
from ctxcomp_rag.decoding import FrozenDecoder
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.bench.clock import Timing
from ctxcomp_rag.evaluation.bench.growth import Growth as GrowthRow
from ctxcomp_rag.evaluation.bench.growth import fitted_power, plot_growth
from ctxcomp_rag.evaluation.bench.report import measure
from ctxcomp_rag.evaluation.bench.rows import LIMIT, RAW, ROWS, Rows
from ctxcomp_rag.evaluation.bench.runs import BareRun, PrefixRun, Run, SplicedRun, read_cache
from ctxcomp_rag.evaluation.bench.shapes import load_shape
from ctxcomp_rag.evaluation.bench.workload import Workload

WORK = Workload(chunks=3, chunk_tokens=16, question_tokens=4, new_tokens=3)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_shape("tiny")


@pytest.fixture
def rows(backbone: Backbone, tmp_path: Path) -> Rows:
    return Rows(backbone, WORK, tmp_path)


def read(run: Run) -> list[int]:
    """The tokens of a bare run."""
    assert isinstance(run, BareRun)
    run.assemble()
    run.first()
    tokens = [int(run.token)]
    for _ in range(2):
        run.following()
        tokens.append(int(run.token))
    run.finish()
    return tokens


POSITIONS = {"raw": 52, "raw-fast-attention": 52, "raw-int8": 52, "full-kv": 52, "prefix-same-order": 52,
             "prefix-reordered": 52, "soft-4x": 16, "soft-16x": 7, "soft-64x": 7, "prerolled-4x": 16,
             "prerolled-16x": 7, "infinipot-kv-4x": 16, "infinipot-kv-16x": 7, "soft-16x-int8": 7, "question-only": 4}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_takes_the_positions_that_its_name_says_and_its_ideal_as_many(name: str, rows: Rows) -> None:
    row = rows.row(name)
    assert row.timed(3).positions == POSITIONS[name]
    assert (row.ideal is None) == (row.stored is None)
    if row.ideal is not None:
        assert row.ideal().positions == POSITIONS[name]


def test_a_prefix_that_is_kept_gives_the_tokens_of_the_whole_prompt(backbone: Backbone) -> None:
    ids = list(range(1, 21))
    whole = read(BareRun(backbone, torch.tensor([ids])))
    kept = (ids[:15], read_cache(backbone, ids[:15]))
    for _ in range(2):  # the second run finds the cache as the first did
        run = PrefixRun(backbone, ids, kept)
        assert run.read.shape[1] == 5
        assert read(run) == whole
    other = PrefixRun(backbone, ids[::-1], kept)
    assert other.read.shape[1] == 20
    assert read(other) == read(BareRun(backbone, torch.tensor([ids[::-1]])))


def test_full_kv_of_one_chunk_answers_as_raw_text(backbone: Backbone, tmp_path: Path) -> None:
    made = Rows(backbone, Workload(chunks=1, chunk_tokens=16, question_tokens=4, new_tokens=3), tmp_path)
    spliced, raw = made.row("full-kv").start(), made.row("raw").start()
    assert isinstance(spliced, SplicedRun)
    spliced.assemble()
    spliced.first()
    spliced.following()
    spliced.following()
    assert spliced.request.progress.token_ids == read(raw)


class Told:
    """A row whose times are given."""

    in_process, ideal, stored = True, None, None

    def __init__(self, name: str, times: list[tuple[float, float]]) -> None:
        self.name, self.left = name, iter(times)

    def timed(self, new_tokens: int) -> Timing:
        first, last = next(self.left)
        return Timing(0.0, first, last, first, last, new_tokens, 10)


def test_ratios_are_taken_within_a_repeat_and_then_their_median(backbone: Backbone) -> None:
    # the machine is ten times slower in the second repeat: no ratio may mix the two
    rows = [Told(RAW, [(8, 12), (80, 120), (8, 12)]), Told("a", [(2, 6), (20, 60), (2, 6)]),
            Told(LIMIT, [(1, 3), (10, 30), (1, 3)])]
    every: Iterator = measure(rows, FrozenDecoder(backbone), 3, 3)  # type: ignore[type-arg, arg-type]
    first, *_, last = (results[1] for results in every)
    assert (first.ttft_speedup, first.total_speedup, first.of_limit) == (4.0, 2.0, 0.5)
    assert (last.ttft_speedup, last.total_speedup, last.of_limit) == (4.0, 2.0, 0.5)
    assert (last.ttft_s, last.total_s, last.ms_per_token) == (2, 6, 2000.0)
    assert last.kv_bytes == 2 * 4 * 2 * 32 * 4 * 12  # keys and values, layers, kv heads, head size, fp32, 10 + 2


def test_an_unknown_row_shape_or_number_is_refused_with_what_to_type(rows: Rows) -> None:
    with pytest.raises(InputError, match=r"there is no row 'soft-0x'; expected one of raw, "):
        rows.row("soft-0x")
    with pytest.raises(InputError, match=r"expected a shape \(0.5b, 135m, tiny\), 'embedded' or the folder"):
        load_shape("7b")
    with pytest.raises(InputError, match="expected at least 1 for chunks, got 0"):
        Workload(chunks=0)


def test_the_command_says_before_it_measures_that_its_result_cannot_be_written(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["bench", "--shape", "tiny", "--out", str(tmp_path)])
    assert isinstance(refused.exception, InputError)
    assert "cannot be written" in str(refused.exception)


def test_the_command_prints_one_object_with_a_row_each(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = CliRunner().invoke(app, ["bench", "--shape", "tiny", "--chunks", "2", "--chunk-tokens", "16", "--new-tokens",
                                    "2", "--repeats", "1", "--rows", "soft-4x", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["row"] for row in result["rows"]] == ["raw", "soft-4x", "question-only"]
    assert result["rows"][0]["ttft_speedup"] == result["rows"][0]["total_speedup"] == 1.0
    assert {"overhead", "assemble_ms", "kv_bytes", "peak_bytes", "bytes_per_chunk"} <= result["rows"][1].keys()
    assert json.loads(out.read_text())["rows"] == result["rows"]
    assert result["conditions"]["threads"] == 1


def test_several_numbers_of_chunks_are_fitted_and_drawn(tmp_path: Path) -> None:
    plot = tmp_path / "growth.svg"
    done = CliRunner().invoke(app, ["bench", "--shape", "tiny", "--chunks", "1,2,4", "--chunk-tokens", "16", "--rows",
                                    "soft-4x", "--repeats", "1", "--plot", str(plot), "--json"])
    assert done.exit_code == 0, done.output
    growth = json.loads(done.stdout.splitlines()[-1])["growth"]
    assert [g["row"] for g in growth] == ["raw", "soft-4x", "question-only"]
    assert growth[0]["chunks"] == [1, 2, 4]
    assert growth[2]["kv_power"] == 0.0
    assert 0 < growth[1]["kv_power"] < growth[0]["kv_power"] <= 1
    assert plot.read_text().count("<svg") == 1


def test_a_power_is_found_again() -> None:
    assert fitted_power([2, 5, 10, 50], [3 * n**1.5 for n in (2, 5, 10, 50)]) == pytest.approx(1.5)


def test_a_plot_is_the_same_file_twice(tmp_path: Path) -> None:
    growth = [GrowthRow("raw", (1, 2), (0.1, 0.2), (10, 20), 1.0, 1.0)]
    pytest.importorskip("matplotlib")
    sizes = set()
    for name in ("a.svg", "b.svg"):
        plot_growth(growth, tmp_path / name, "title")
        sizes.add(len((tmp_path / name).read_text()))
    assert len(sizes) == 1


def test_the_ratios_of_the_page_are_those_on_file() -> None:
    root = Path(__file__).parents[2]
    lines = (root / "docs" / "speed.md").read_text(encoding="utf-8").splitlines()
    for row in json.loads((root / "benchmarks" / "results" / "bench_0.5b.json").read_text(encoding="utf-8"))["rows"]:
        assert any(line.startswith(f"| {row['row']} | {row['ttft_speedup']:.2f} | {row['total_speedup']:.2f} |")
                   for line in lines), row["row"]
