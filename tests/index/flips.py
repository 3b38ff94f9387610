"""Flipped bits in every kind of file of an index: each is found, or changes nothing.

The index is read in a process of its own, so that a reader that dies of damaged bytes is seen and survived.
"""

from __future__ import annotations

import multiprocessing
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch

from ctxcomp_rag.errors import CtxcompError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.spans import SoftSpan
from tests.index.checks import QUERIES, same_span
from tests.index.conftest import SOFT, VECTOR_SIZE, Corpus, cosine, make_corpus

Outcome = Literal["refused", "named", "warned", "harmless", "wrong", "died"]
"""What a flip led to: the index would not open; `verify` names chunks or files, or mends the search vectors; a warning
only; nothing at all; something else was read than was written; the reader crashed or hung."""

_LARGE = 1100  # slots of a span that Lance keeps in a file of its own
_PRELOAD = ["lance", "faiss", "torch", "tests.index.flips"]
_SECONDS = 120.0


@dataclass
class FlipReport:
    """Kind of file -> outcome -> flips. `complaints`: the flips that were neither found nor harmless."""

    flips: int = 0
    outcomes: dict[str, Counter[Outcome]] = field(default_factory=lambda: defaultdict(Counter))
    complaints: list[str] = field(default_factory=list)


def corpus_with_large_spans() -> Corpus:
    """20 chunks, of which three have spans above 64 KB."""
    corpus = make_corpus(20, seed=11)
    spans = list(corpus.spans)
    for i in (3, 8, 15):
        embeds = torch.randn(_LARGE, 16, generator=torch.Generator().manual_seed(i))
        spans[i] = SoftSpan(corpus.chunks[i].id, 8, torch.arange(_LARGE), _LARGE, embeds)
    return Corpus(corpus.chunks, spans, corpus.vectors)


DELETED = (2, 12)


def make_index_of_every_file_kind(path: Path) -> None:
    """Two commits, a deletion and a snapshot."""
    corpus = corpus_with_large_spans()
    with MemoryIndex.create(path, SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="random",
                            codec="exact") as index:
        corpus.add_to(index, slice(0, 10))
        corpus.add_to(index, slice(10, 20))
        index.delete(chunk_ids=[corpus.ids[i] for i in DELETED])


def place_of_the_deleted_row(path: Path) -> tuple[Path, int]:
    """A deletion file, and where in it the number of the deleted row stands."""
    file = min((path / "spans.lance" / "_deletions").iterdir())
    return file, file.read_bytes().rindex(DELETED[0].to_bytes(4, "little"))


def files_by_kind(path: Path) -> dict[str, list[Path]]:
    """"_versions/*.manifest" and the like -> the files."""
    kinds: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size):
        place = file.relative_to(path).parts
        folder = next((p for p in place[:-1] if p in ("data", "_deletions", "_versions", "_transactions")), "")
        kinds[f"{folder}/*{file.suffix}" if folder else file.name.split("-")[0]].append(file)
    return kinds


def flip_bits(path: Path, flips: int, seed: int) -> FlipReport:
    """Flip one bit at a time, the same number in every kind of file, at random places; look; flip it back."""
    rng = random.Random(seed)
    kinds = sorted(files_by_kind(path).items())
    places = []
    for turn in range(flips):
        kind, files = kinds[turn % len(kinds)]
        file = rng.choice(files)
        places.append((kind, file, rng.randrange(file.stat().st_size), rng.randrange(8)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    whole = {file: file.read_bytes() for _, files in kinds for file in files}
    report = FlipReport()
    while report.flips < flips:
        ours, theirs = context.Pipe(duplex=False)
        reader = context.Process(target=_look_at_all, args=(path, places[report.flips :], theirs), daemon=True)
        reader.start()
        theirs.close()
        for kind, file, offset, bit in places[report.flips :]:
            outcome: Outcome
            try:
                outcome, why = ours.recv() if ours.poll(_SECONDS) else ("died", f"no answer for {_SECONDS:.0f} s")
            except EOFError:
                outcome, why = "died", "the process ended"
            report.flips += 1
            report.outcomes[kind][outcome] += 1
            if outcome in ("wrong", "died"):
                report.complaints.append(f"{file.name} byte {offset} bit {bit}: {outcome}: {why}")
            if outcome == "died":
                break
        reader.kill()
        reader.join()
        for file, data in whole.items():
            file.write_bytes(data)
    return report


def _look_at_all(path: Path, places: Sequence[tuple[str, Path, int, int]], pipe: Connection) -> None:
    corpus = corpus_with_large_spans()
    for _, file, offset, bit in places:
        whole = file.read_bytes()
        file.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << bit]) + whole[offset + 1 :])
        said = look(path, corpus)
        file.write_bytes(whole)
        pipe.send(said)


def look(path: Path | str, corpus: Corpus) -> tuple[Outcome, str]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with MemoryIndex.open(path, read_only=True) as index:
                false, other = _differences(index, corpus)
                report = index.verify()
        except CtxcompError as error:
            return "refused", str(error)
        except Exception as error:
            return "wrong", f"{type(error).__name__}: {error}"
    found = [d.reason for d in report.damaged] + report.notes
    if false or (other and not found and not warned):
        return "wrong", "; ".join([*false, *other])
    if found:
        return "named", found[0]
    return ("warned", str(warned[0].message)) if warned else ("harmless", "")


def _differences(index: MemoryIndex, corpus: Corpus) -> tuple[list[str], list[str]]:
    """What was read but never written; what is missing or should be gone (to be excused where the reader was told)."""
    live = [i for i in range(len(corpus.chunks)) if i not in DELETED]
    false, other = [], []
    for i in live:
        try:
            (found,) = index.get([corpus.ids[i]])
        except CtxcompError as error:
            other.append(str(error))
            continue
        if found.chunk != corpus.chunks[i] or not same_span(found.span, corpus.spans[i]):
            false.append(f"chunk {i} is another one")
    similarities = cosine(QUERIES, corpus.vectors)
    places = {chunk_id: i for i, chunk_id in enumerate(corpus.ids)}
    other += [f"chunk {places.get(c, c)} is back" for c in set(index._table.rows) - {corpus.ids[i] for i in live}]
    try:
        for hits, scores in zip(index.search(QUERIES, len(live)), similarities, strict=True):
            false += [f"the score of chunk {places.get(h.chunk.id)} is {h.score}" for h in hits
                      if h.chunk.id not in places or abs(h.score - scores[places[h.chunk.id]]) > 1e-5]
    except CtxcompError as error:
        other.append(str(error))
    return false, other
