"""From names of rows to results: loads the decoder, makes the spans, starts the peers, measures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxcomp_rag.decoding import FrozenDecoder
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.bench.clock import one_thread
from ctxcomp_rag.evaluation.bench.peers import CHECKOUTS, PEERS, PeerRow, start_peers
from ctxcomp_rag.evaluation.bench.report import Progress, RowResult, measure
from ctxcomp_rag.evaluation.bench.rows import LIMIT, RAW, Rows
from ctxcomp_rag.evaluation.bench.shapes import SHAPES, load_shape, shape_config
from ctxcomp_rag.evaluation.bench.workload import Workload


@dataclass(frozen=True, eq=False)
class Results:
    """What is known after `repeats` rounds.

    Attributes:
        peers: package versions of the peers that ran.
        skipped: why the others, or some of their rows, did not.
    """

    repeats: int
    rows: list[RowResult]
    peers: Mapping[str, Mapping[str, str]]
    skipped: Mapping[str, str]


def run_rows(shape: str, names: Sequence[str], workload: Workload, repeats: int, *,
             peers: Mapping[str, Path] | None = None, checkouts: Mapping[str, Path] | None = None,
             progress: Progress = lambda name: None) -> Iterator[Results]:
    """Measure the named rows beside raw text and the question alone, on one thread from here on.

    Yields the results so far after each repeat.

    Args:
        peers: name of a peer -> its interpreter. They read random weights of the shape.
        checkouts: name of a peer that is no package -> the folder with its code.

    Raises:
        InputError: no such row, shape or peer, or a checkout of what is not asked for.
    """
    one_thread()
    unknown = set(peers or {}) - set(PEERS)
    if unknown or (peers and shape not in SHAPES):
        raise InputError(f"expected a peer of {', '.join(PEERS)} and a shape of {', '.join(SHAPES)}, got "
                         f"{', '.join(sorted(unknown)) or 'the model ' + shape}")
    unasked = set(checkouts or {}) - (set(CHECKOUTS) & set(peers or {}))
    if unasked:
        raise InputError(f"a checkout goes with a peer of {', '.join(CHECKOUTS)} and its interpreter (--peer), got one "
                         f"for {', '.join(sorted(unasked))}")
    backbone = load_shape(shape)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        makes = Rows(backbone, workload, Path(folder))
        rows: list[Any] = []
        for name in dict.fromkeys([RAW, *names, LIMIT]):
            progress(f"make {name}")
            rows.append(makes.row(name))
        started, skipped = start_peers(peers or {}, shape_config(shape) if peers else {}, workload, checkouts)
        for peer in started:
            running.enter_context(peer)
            rows += [PeerRow(name, peer) for name in peer.rows]
        versions = {peer.name: peer.versions for peer in started}
        measured = measure(rows, FrozenDecoder(backbone), workload.new_tokens, repeats, progress, skipped)
        for done, results in enumerate(measured, 1):
            yield Results(done, results, versions, skipped)
