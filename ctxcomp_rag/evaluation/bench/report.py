"""Rows measured in turn, as medians and paired ratios."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ctxcomp_rag.decoding import FrozenDecoder
from ctxcomp_rag.evaluation.bench.clock import Timing, clocked
from ctxcomp_rag.evaluation.bench.peers import PeerRow, PeerSkippedError
from ctxcomp_rag.evaluation.bench.rows import LIMIT, RAW, Row
from ctxcomp_rag.evaluation.memory import peak_memory
from ctxcomp_rag.evaluation.timing import cache_bytes

Progress = Callable[[str], None]


@dataclass(frozen=True)
class RowResult:
    """One row of the table; times are medians over the repeats, ratios medians of the ratios within a repeat.

    Attributes:
        ttft_speedup, total_speedup: raw text's time over this row's.
        of_limit: the time to first token of the question alone over this row's; 1 is the limit.
        overhead: time to first token over that of the bare ideal, less 1; None for bare rows.
        peak_bytes: most memory beyond what was there before the answer; None for another process.
        compress_of_floor: compressing over the bare forward pass.
    """

    row: str
    positions: int
    ttft_s: float
    total_s: float
    ms_per_token: float | None
    ttft_speedup: float
    total_speedup: float
    of_limit: float
    overhead: float | None
    assemble_ms: float | None
    kv_bytes: int
    peak_bytes: int | None
    bytes_per_chunk: float | None
    compress_tokens_per_s: float | None
    compress_of_floor: float | None
    ttft_wall_s: float
    total_wall_s: float


def measure(rows: Sequence[Row | PeerRow], decoder: FrozenDecoder, new_tokens: int, repeats: int,
            progress: Progress = lambda name: None,
            skipped: dict[str, str] | None = None) -> Iterator[list[RowResult]]:
    """Every row once a repeat, each beside its ideal; `RAW` and `LIMIT` have to be among them.

    Yields the results so far after each repeat. The order is turned round in every other one. A peer's row that gives
    up is left out from then on; `skipped` takes its name and the reason.
    """
    skipped = {} if skipped is None else skipped
    peaks = dict.fromkeys((row.name for row in rows), 0)
    times: dict[str, list[Timing]] = {row.name: [] for row in rows}
    ideals: dict[str, list[Timing]] = {row.name: [] for row in rows}
    for repeat in range(repeats):
        for row in rows if repeat % 2 == 0 else rows[::-1]:
            progress(row.name)
            if row.ideal is not None:
                ideals[row.name].append(clocked(row.ideal(), 1))
            try:
                with peak_memory() as peak:
                    times[row.name].append(row.timed(new_tokens))
            except PeerSkippedError as error:
                skipped[row.name] = str(error)
                continue
            peaks[row.name] = max(peaks[row.name], peak.bytes)
        rows = [row for row in rows if row.name not in skipped]
        yield [_result(row, times, ideals[row.name], peaks[row.name], decoder) for row in rows]


def _result(row: Row | PeerRow, times: Mapping[str, list[Timing]], ideals: list[Timing], peak: int,
            decoder: FrozenDecoder) -> RowResult:
    mine, raw, limit = times[row.name], times[RAW], times[LIMIT]

    def ratio(above: Sequence[Timing], below: Sequence[Timing], what: str) -> float:
        return float(statistics.median(getattr(a, what) / getattr(b, what) for a, b in zip(above, below, strict=True)))

    def median(what: str) -> float:
        return float(statistics.median(getattr(t, what) for t in mine))

    per_token = median("per_token")
    bare, stored = row.ideal is None, row.stored
    return RowResult(
        row.name, mine[0].positions, median("ttft"), median("total"),
        None if math.isnan(per_token) else 1000 * per_token,
        ratio(raw, mine, "ttft"), ratio(raw, mine, "total"), ratio(limit, mine, "ttft"),
        None if bare else ratio(mine, ideals, "ttft") - 1, None if bare else 1000 * median("assemble"),
        cache_bytes(decoder, mine[0].positions + mine[0].new_tokens - 1),
        peak if row.in_process else None,
        stored.bytes_per_chunk if stored else None, stored.tokens_per_second if stored else None,
        stored.of_floor if stored else None, median("ttft_wall"), median("total_wall"))


def as_json(results: Sequence[RowResult]) -> list[dict[str, Any]]:
    """Rows rounded to four significant digits."""
    def rounded(value: Any) -> Any:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return [{name: rounded(value) for name, value in asdict(result).items()} for result in results]


def table(results: Sequence[RowResult]) -> str:
    """Markdown."""
    head = ("row", "positions", "TTFT s", "total s", "ms/token", "TTFT x", "total x", "of limit", "overhead",
            "assemble ms", "KV MB", "peak MB", "KB/chunk", "compress tok/s", "of floor")
    lines = [_line(head), "|" + "---|" * len(head)]
    for r in results:
        lines.append(_line((
            r.row, str(r.positions), f"{r.ttft_s:.3f}", f"{r.total_s:.2f}", _shown(r.ms_per_token, ".0f"),
            f"{r.ttft_speedup:.2f}", f"{r.total_speedup:.2f}", f"{r.of_limit:.2f}", _shown(r.overhead, "+.1%"),
            _shown(r.assemble_ms, ".1f"), f"{r.kv_bytes / 1e6:.1f}",
            _shown(r.peak_bytes and r.peak_bytes / 1e6, ".0f"),
            _shown(r.bytes_per_chunk and r.bytes_per_chunk / 1e3, ".1f"), _shown(r.compress_tokens_per_s, ".0f"),
            _shown(r.compress_of_floor, ".2f"))))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def conditions() -> dict[str, Any]:
    """What a reader has to know about the run."""
    import transformers

    return {"threads": torch.get_num_threads(), "dtype": "float32", "clock": "CPU time of the process",
            "load_average": [round(x, 2) for x in os.getloadavg()], "transformers": transformers.__version__}
