"""A nested compressor, read at each of its factors, beside compressors trained for one factor alone.

    python benchmarks/nested.py runs/nested/compressor --alone 4=runs/alone4/compressor 8=runs/alone8/compressor \
        16=runs/alone16/compressor

Held-out documents of the home ground, the right chunk, the decoder of the compressors; `recipes/nested.yaml` makes the
first, the same recipe with `compressor.nested=[]` and one factor for every source the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import home_ground_rows, print_table

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.evaluation.provenance import write_result
from ctxcomp_rag.pipeline import load_trained_compressor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nested", help="folder of a nested compressor")
    parser.add_argument("--alone", nargs="*", default=[], metavar="FACTOR=FOLDER")
    parser.add_argument("--released", default="icae", help="also: a compressor that makes every factor anew")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "nested.json")
    args = parser.parse_args()
    backbone = load_frozen(args.model)
    nested = load_trained_compressor(args.nested, backbone)
    factors = list(nested.spec.nested)
    if not factors:
        parser.error(f"{args.nested} is not nested; train one with recipes/nested.yaml")
    rows = home_ground_rows("nested", nested, factors, args.documents, args.seed)
    for pair in args.alone:
        factor, _, folder = pair.partition("=")
        alone = load_trained_compressor(folder, backbone)
        rows += home_ground_rows(f"for {factor}x alone", alone, [float(factor)], args.documents, args.seed)
    rows += home_ground_rows(f"{args.released} as released", load_trained_compressor(args.released, backbone), factors,
                    args.documents, args.seed)
    print_table(rows)
    write_result(args.out, {"documents": args.documents, "seed": args.seed, "rows": rows})


if __name__ == "__main__":
    main()
