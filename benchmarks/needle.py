"""A needle in a haystack beyond the decoder's trained window: position x length, by way of reading, drawn as heat maps.

    python benchmarks/needle.py [--window 576] [--times 1,2,4,8,16] [--depths 5] [--samples 3] [--out FILE]

The context is fictional documents that the decoder was not trained on; the question asks for a fact of one of them.
`--window` is the trained window in tokens: the embedded decoder was trained on up to four documents of 144 tokens, so
576. It is also the size of every bounded cache [`--budget`]. The full cache is read where the decoder has positions
for it at all. The heat map needs the `plots` extra and is written beside the JSON as SVG.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import decoder_of, in_processes, print_table

from ctxcomp_rag.evaluation.metrics import mean
from ctxcomp_rag.evaluation.needle import READERS, NeedleTest, haystack
from ctxcomp_rag.evaluation.provenance import write_result


def cell(job: tuple[str | None, str, int, int, float, int, int]) -> dict[str, Any]:
    """One cell: (model, reader, budget, tokens, depth, samples, seed)."""
    model, name, budget, tokens, depth, samples, seed = job
    backbone = decoder_of(model)
    test = NeedleTest(backbone, next(r for r in READERS if r.name == name), budget)
    found = [test.found(haystack(backbone, tokens, depth, 1000 * seed + i)) for i in range(samples)]
    known = [f for f in found if f is not None]
    return {"reader": name, "tokens": tokens, "depth": depth,
            "found": round(100 * mean(known), 1) if len(known) == samples else None}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Heat maps, one for each way of reading; cells without a figure stay white."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "needle"  # the same figures give the same file
    from matplotlib import pyplot

    names = list(dict.fromkeys(r["reader"] for r in rows))
    lengths, depths = (sorted({r[key] for r in rows}) for key in ("tokens", "depth"))
    figure, axes = pyplot.subplots(1, len(names), figsize=(2.1 * len(names) + 1, 2.6), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        found = {(r["depth"], r["tokens"]): r["found"] for r in rows if r["reader"] == name}
        grid = [[float("nan") if found[d, n] is None else found[d, n] for n in lengths] for d in depths]
        shown = axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axis.set_title(name, fontsize=8)
        axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=6, rotation=60)
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=6)
    axes[0][0].set_ylabel("depth of the needle", fontsize=7)
    figure.supxlabel("tokens of context", fontsize=7)
    figure.colorbar(shown, ax=axes[0].tolist(), label="found, %", shrink=0.8)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=576)
    parser.add_argument("--times", default="1,2,4,8,16", help="lengths of the context in windows")
    parser.add_argument("--budget", type=int, help="entries of a bounded cache [default: the window]")
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--samples", type=int, default=3, help="haystacks for each cell")
    parser.add_argument("--readers", default=",".join(r.name for r in READERS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", help="folder with decoder/ [default: the embedded model]")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/needle.json"))
    args = parser.parse_args()
    lengths = [args.window * int(t) for t in args.times.split(",")]
    depths = [i / max(1, args.depths - 1) for i in range(args.depths)]
    budget = args.budget or args.window
    names = args.readers.split(",")
    jobs = [(args.model, name, budget, n, d, args.samples, args.seed)
            for n in sorted(lengths, reverse=True) for name in names for d in depths]  # the long ones first
    rows = in_processes(cell, jobs, args.processes)
    rows.sort(key=lambda r: (names.index(r["reader"]), r["tokens"], r["depth"]))
    means = []
    for name in names:
        own = {n: [r["found"] for r in rows if r["reader"] == name and r["tokens"] == n] for n in lengths}
        means.append({"reader": name, **{str(n): None if None in f else round(mean(f), 1) for n, f in own.items()}})
    print_table(means)
    write_result(args.out, {"window": args.window, "budget": budget, "samples": args.samples, "seed": args.seed,
                            "means": means, "rows": rows})
    draw(rows, args.out.with_suffix(".svg"))
    print(f"written to {args.out} and {args.out.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
