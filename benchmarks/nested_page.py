"""Fill the tables of the nested compressor in docs/compressors.md from what the same commands as those of
`quoting_page.py` measured with `--compressor icae-nested`.

    python benchmarks/nested_page.py [--results benchmarks/results] [--page docs/compressors.md]
"""

from __future__ import annotations

from pages import fill
from quoting_page import ENGLISH, HOME, NESTED, SEEDS, filled

RESULTS = tuple(name + NESTED for name in (HOME, SEEDS, ENGLISH[0]))

if __name__ == "__main__":
    fill(__doc__, "docs/compressors.md", RESULTS, filled)
