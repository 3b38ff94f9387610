"""How time to first token and the cache grow with the number of chunks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.bench.report import Progress, RowResult
from ctxcomp_rag.evaluation.bench.run import run_rows
from ctxcomp_rag.evaluation.bench.workload import Workload


@dataclass(frozen=True)
class Growth:
    """One row over numbers of chunks.

    Attributes:
        ttft_s, kv_bytes: one for each number of chunks.
        ttft_power, kv_power: b of the fit a * chunks^b (least squares on logarithms); 1 is linear, 2 quadratic.
    """

    row: str
    chunks: tuple[int, ...]
    ttft_s: tuple[float, ...]
    kv_bytes: tuple[int, ...]
    ttft_power: float
    kv_power: float


def measure_growth(shape: str, names: Sequence[str], counts: Sequence[int], workload: Workload, repeats: int, *,
                   progress: Progress = lambda name: None) -> Iterator[list[Growth]]:
    """The named rows at each number of chunks; yields what is known after each, from the second on.

    Raises:
        InputError: fewer than two different numbers of chunks; else as `run_rows`.
    """
    counts = sorted(set(counts))
    if len(counts) < 2:
        raise InputError(f"expected several numbers of chunks, such as 2,5,10, got {counts}")
    measured: list[list[RowResult]] = []
    for count in counts:
        sized = replace(workload, chunks=count, new_tokens=1)
        progress(f"{count} chunks")
        *_, last = run_rows(shape, names, sized, repeats, progress=progress)
        measured.append(last.rows)
        if len(measured) > 1:
            yield [_growth(rows, counts) for rows in zip(*measured, strict=True)]


def _growth(rows: Sequence[RowResult], counts: Sequence[int]) -> Growth:
    done = tuple(counts[: len(rows)])
    times, sizes = tuple(r.ttft_s for r in rows), tuple(r.kv_bytes for r in rows)
    return Growth(rows[0].row, done, times, sizes, fitted_power(done, times), fitted_power(done, sizes))


def fitted_power(x: Sequence[float], y: Sequence[float]) -> float:
    """b of the least-squares fit log y = log a + b log x."""
    logs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True)]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return float(sum((a - mean_x) * (b - mean_y) for a, b in logs) / sum((a - mean_x) ** 2 for a, _ in logs))


def growth_json(growths: Sequence[Growth]) -> list[dict[str, Any]]:
    """Rounded to four significant digits."""
    def rounded(value: Any) -> Any:
        if isinstance(value, tuple):
            return [rounded(v) for v in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return [{name: rounded(value) for name, value in asdict(g).items()} for g in growths]


def growth_table(growths: Sequence[Growth]) -> str:
    """Markdown: seconds to the first token and cache MB by number of chunks."""
    head = ["row", *(f"{n} chunks" for n in growths[0].chunks), "TTFT ~ n^", "KV ~ n^"]
    lines = [head, ["---"] * len(head)]
    for g in growths:
        cells = [f"{s:.2f} s, {b / 1e6:.1f} MB" for s, b in zip(g.ttft_s, g.kv_bytes, strict=True)]
        lines.append([g.row, *cells, f"{g.ttft_power:.2f}", f"{g.kv_power:.2f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot_growth(growths: Sequence[Growth], path: Path, title: str) -> None:
    """Time and cache side by side, both axes logarithmic, as SVG (or what the name's ending says).

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("drawing needs matplotlib: pip install 'ctxcomp-rag[plots]'") from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for growth, marker in zip(growths, itertools.cycle("osD^vx")):
        left.plot(growth.chunks, growth.ttft_s, marker=marker, label=f"{growth.row} ~ n^{growth.ttft_power:.2f}")
        right.plot(growth.chunks, [b / 1e6 for b in growth.kv_bytes], marker=marker,
                   label=f"{growth.row} ~ n^{growth.kv_power:.2f}")
    for axes, name in ((left, "time to first token, CPU s"), (right, "KV cache, MB")):
        axes.set(xscale="log", yscale="log", xlabel="chunks in the prompt", ylabel=name)
        axes.set_xticks(growths[0].chunks, [str(n) for n in growths[0].chunks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
