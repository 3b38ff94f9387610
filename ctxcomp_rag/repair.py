"""Damaged chunks of an index, made again from their text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.index.verify import Damage
from ctxcomp_rag.pipeline import CompressedRAG
from ctxcomp_rag.retention import with_retention
from ctxcomp_rag.retrieval import embed_texts
from ctxcomp_rag.spans import MemorySpan

_BATCH_CHUNKS = 64


def repair_index(rag: CompressedRAG, *, progress: Callable[[int], object] | None = None
                 ) -> tuple[list[str], list[Damage]]:
    """Compress again what `verify` finds damaged and whose text matches its checksum, each batch in one commit.

    Args:
        rag: opened by `CompressedRAG.create` with the compressor that made the index.
        progress: called with the number of chunks of each commit.

    Returns:
        Ids of the chunks that were repaired, and what is still damaged.
    """
    if rag.compressor is None or rag.memory.read_only:
        raise InputError("this index was opened for reading; use CompressedRAG.create(path) to repair it")
    memory, spec = rag.memory, rag.compressor.spec
    damaged = memory.verify().damaged
    if not damaged:
        return [], []
    repaired: list[str] = []
    maker = with_retention(rag.compressor, measured=_measured(memory, {d.chunk_id for d in damaged}), target=None)

    def store(intact: Sequence[tuple[Chunk, int]], files: Sequence[str]) -> None:
        chunks = [chunk for chunk, _ in intact]
        vectors = embed_texts(rag.encoder, [chunk.text for chunk in chunks])
        memory.replace(chunks, _spans(maker, intact), vectors, spec=spec, unreadable_files=files)
        repaired.extend(chunk.id for chunk in chunks)
        if progress:
            progress(len(chunks))

    for file, intact in memory.intact_texts_of_unreadable_files().items():
        store(intact, [file])
    whole = memory.intact_texts([d.chunk_id for d in damaged])
    for start in range(0, len(whole), _BATCH_CHUNKS):
        store(whole[start : start + _BATCH_CHUNKS], [])
    return repaired, memory.verify().damaged


def _measured(memory: MemoryIndex, damaged: set[str]) -> bool:
    """Whether the index stores how much of its facts a span retains: then a span made again must say so too."""
    whole = next((chunk.id for chunk in memory.chunks() if chunk.id not in damaged), None)
    return whole is not None and bool(memory.get([whole])[0].span.retention)


def _spans(maker: Compressor, intact: Sequence[tuple[Chunk, int]]) -> list[MemorySpan]:
    """Spans with as many slots as there were, in order."""
    if maker.spec.nested:  # fewer slots are the first ones of a whole span
        whole = maker.compress([chunk for chunk, _ in intact])
        return [span.first(slots) for span, (_, slots) in zip(whole, intact, strict=True)]
    groups: dict[float | None, list[Chunk]] = defaultdict(list)
    for chunk, slots in intact:
        usual = maker.chunk_slots(chunk) == slots
        groups[None if usual else chunk.num_tokens / slots].append(chunk)
    made = {span.chunk_id: span for factor, chunks in groups.items()
            for span in maker.compress(chunks, compression_factor=factor)}
    return [made[chunk.id] for chunk, _ in intact]
