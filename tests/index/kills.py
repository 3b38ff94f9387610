"""A writer that is killed at any moment, again and again, and a look at what it leaves behind.

The writer says what it begins and what is done; whatever it said was done has to be there after `kill -9`, and of what
it had only begun all or nothing.
"""

from __future__ import annotations

import multiprocessing
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from ctxcomp_rag.index import MemoryIndex
from tests.index.checks import assert_holds
from tests.index.conftest import SOFT, VECTOR_SIZE, Corpus, make_corpus

KINDS = ("add", "delete", "compact", "snapshot")
_BATCH, _DELETED = 8, 5
_PRELOAD = ["lance", "lance.optimize", "faiss", "torch", "tests.index.kills"]
_CORPUS = make_corpus(1500, seed=7)
_IDS = _CORPUS.ids
_NUMBERS = {chunk_id: i for i, chunk_id in enumerate(_IDS)}


@dataclass
class KillReport:
    """What was seen after the kills.

    Attributes:
        kills: all of them.
        during: kind of the operation that was begun and never acknowledged -> kills.
        committed: those of them whose change was there all the same.
        chunks: held in the end.
        lost, duplicated: acknowledged chunks that were gone, chunks that were there twice.
        complaints: whatever else was not as it should be.
    """

    kills: int = 0
    during: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    committed: int = 0
    chunks: int = 0
    lost: int = 0
    duplicated: int = 0
    complaints: list[str] = field(default_factory=list)


def write_until_killed(path: Path, seed: int, pipe: Connection) -> None:
    """Add, delete, compact and save snapshots in random order; say (kind, chunk numbers) before and None after."""
    rng = random.Random(seed)
    index = MemoryIndex.open(path)
    while True:
        for kind in rng.sample(KINDS, len(KINDS)):
            held = sorted(_NUMBERS[c.id] for c in index.chunks())
            first = held[-1] + 1 if held else 0
            chosen = {"add": list(range(first, first + _BATCH)),
                      "delete": rng.sample(held, min(_DELETED, len(held) - 1)) if held else []}.get(kind, [])
            pipe.send((kind, chosen))
            if kind == "add":  # with some that are there already
                _subset([*held[:2], *chosen]).add_to(index)
            elif kind == "delete":
                index.delete(chunk_ids=[_IDS[i] for i in chosen])
            elif kind == "compact":
                index.compact(erase=rng.random() < 0.5)
            else:
                index.close()
                index = MemoryIndex.open(path)
            pipe.send(None)


def kill_writers(path: Path, kills: int, seed: int) -> KillReport:
    """Start a writer on a new index in `path` and kill it, `kills` times; look at the index after each."""
    context = multiprocessing.get_context("forkserver")  # imports once: a writer starts in a fraction of a second
    context.set_forkserver_preload(_PRELOAD)
    rng = random.Random(seed)
    report = KillReport()
    took: dict[str, list[float]] = defaultdict(lambda: [0.03])
    MemoryIndex.create(path, SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="random", codec="exact").close()
    live: set[int] = set()
    for turn in range(kills):
        ours, theirs = context.Pipe(duplex=False)
        writer = context.Process(target=write_until_killed, args=(path, rng.randrange(2**32), theirs), daemon=True)
        writer.start()
        theirs.close()
        target, passes = KINDS[turn % len(KINDS)], rng.randint(0, 2)
        states = _acknowledged(ours, live, target, passes, took)
        time.sleep(rng.uniform(0, 1.2 * median(took[target])))
        writer.kill()
        writer.join()
        for said in _remaining(ours):  # it may have got further before it died
            states = _next_state(states, said)
        live = _look(path, *states, report)
    with MemoryIndex.open(path) as index:
        index.compact(erase=True)
        assert_holds(index, _subset(live))
    report.chunks = len(live)
    return report


_States = tuple[str, set[int], set[int]]
"""What is under way ("" for nothing), the chunks before it, the chunks after it."""


def _acknowledged(pipe: Connection, live: set[int], target: str, passes: int, took: dict[str, list[float]]) -> _States:
    """Follow the writer until it begins the target operation for the (passes + 1)th time."""
    states: _States = ("", live, live)
    began = time.perf_counter()
    while True:
        said = pipe.recv()
        if said is None:
            took[states[0]].append(time.perf_counter() - began)
        states, began = _next_state(states, said), time.perf_counter()
        if said is not None and said[0] == target:
            if passes == 0:
                return states
            passes -= 1


def _next_state(states: _States, said: tuple[str, list[int]] | None) -> _States:
    after = states[2]
    if said is None:
        return "", after, after
    kind, chosen = said
    return kind, after, after | set(chosen) if kind == "add" else after - set(chosen)


def _remaining(pipe: Connection) -> Iterator[tuple[str, list[int]] | None]:
    """What a dead writer had said before it died."""
    try:
        while True:
            yield pipe.recv()
    except EOFError:
        return


def _look(path: Path, kind: str, before: set[int], after: set[int], report: KillReport) -> set[int]:
    """Compare the index with what it may hold, finish what was interrupted, and return what it holds then."""
    report.kills += 1
    if kind:
        report.during[kind] += 1
    with warnings.catch_warnings(), MemoryIndex.open(path) as index:
        warnings.simplefilter("error")
        held = {_NUMBERS[c.id] for c in index.chunks()}
        report.lost += len((before & after) - held)
        report.duplicated += index._table.count_rows() - len(held)
        if held not in (before, after):
            report.complaints.append(f"{kind}: {len(held)} chunks, expected {len(before)} or {len(after)}")
        report.committed += held == after != before
        try:
            assert_holds(index, _subset(held))
            # what was interrupted is done by doing it again, and only what is missing of it is done
            index.delete(chunk_ids=[_IDS[i] for i in held - after])
            again = _subset(after).add_to(index) if after else None
            if again and again.added != len(after - held):
                report.complaints.append(f"{kind}: {again.added} chunks added again, {len(after - held)} were missing")
            assert_holds(index, _subset(after))
        except Exception as error:
            report.complaints.append(f"{kind}: {error}")
    return after


def _subset(numbers: set[int] | list[int]) -> Corpus:
    chosen = sorted(numbers)
    return Corpus([_CORPUS.chunks[i] for i in chosen], [_CORPUS.spans[i] for i in chosen], _CORPUS.vectors[chosen])
