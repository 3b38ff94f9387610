"""Chunks of like length beside each other, so that batches are hardly padded."""

from __future__ import annotations

from collections.abc import Sequence

from ctxcomp_rag.chunking import Chunk


def batches_by_length(chunks: Sequence[Chunk], batch_tokens: int) -> list[list[Chunk]]:
    """All chunks in batches, shortest first. A batch of more than one has at most `batch_tokens` tokens when all are
    padded to the longest.
    """
    batches: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda c: c.num_tokens):
        if batches and (len(batches[-1]) + 1) * chunk.num_tokens <= batch_tokens:
            batches[-1].append(chunk)
        else:
            batches.append([chunk])
    return batches
