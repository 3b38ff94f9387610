"""Kill a writer fifty times, flip a thousand bits: what an index has to survive, at full count.

The default tests do the same a few times (tests/index/test_kills.py, test_flips.py). Exit code 1 if anything was lost.

    make kill-tests
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ctxcomp_rag.evaluation.provenance import write_result
from tests.index.flips import flip_bits, make_index_of_every_file_kind
from tests.index.kills import kill_writers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill_tests.json")
    options = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        killed = kill_writers(Path(folder) / "killed", options.kills, options.seed)
        print(killed)
        make_index_of_every_file_kind(Path(folder) / "flipped")
        flipped = flip_bits(Path(folder) / "flipped", options.flips, options.seed)
    for kind, outcomes in flipped.outcomes.items():
        print(f"{kind:24} {dict(outcomes)}")
    print(*killed.complaints, *flipped.complaints, sep="\n")
    write_result(options.out, {"seed": options.seed, "seconds": round(time.time() - began), "kills": asdict(killed),
                               "flips": {"flips": flipped.flips, "complaints": flipped.complaints,
                                         "outcomes": {k: dict(v) for k, v in flipped.outcomes.items()}}})
    return int(bool(killed.lost or killed.duplicated or killed.complaints or flipped.complaints))


if __name__ == "__main__":
    sys.exit(main())
