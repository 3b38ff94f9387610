"""Token embeddings out of counts: which tokens stand near which (PPMI and its SVD, Levy and Goldberg 2014).

Counting reads a million tokens a second where training reads two thousand, so what words have in common is known
before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BESIDE = (1, 2)  # distances counted by direction: what may follow what
NEAR = range(3, 9)  # distances counted together: what is spoken of together


def count_pairs(texts: Sequence[Sequence[int]], vocab_size: int) -> list[np.ndarray]:
    """Matrices (vocab_size, vocab_size) of counts: one for each distance of BESIDE, one for all of NEAR."""
    gap = max(NEAR)
    ids = np.concatenate([np.append(np.asarray(text, dtype=np.int64), [-1] * gap) for text in texts])

    def at(distance: int) -> np.ndarray:
        left, right = ids[:-distance], ids[distance:]
        both = (left >= 0) & (right >= 0)
        pairs = np.bincount(left[both] * vocab_size + right[both], minlength=vocab_size**2)
        return pairs.reshape(vocab_size, vocab_size).astype(np.float32)

    return [at(distance) for distance in BESIDE] + [sum(at(distance) for distance in NEAR)]  # type: ignore[list-item]


def positive_pmi(counts: np.ndarray) -> np.ndarray:
    """max(0, log P(a, b) / (P(a) P(b))), with P(b) smoothed by the power 0.75."""
    context = counts.sum(0) ** 0.75
    expected = np.outer(counts.sum(1), context / max(context.sum(), 1.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(counts / expected)
    return np.where(counts > 0, np.maximum(pmi, 0), 0).astype(np.float32)


def embeddings_from_counts(texts: Sequence[Sequence[int]], vocab_size: int, size: int, norm: float,
                           share: float = 0.5) -> Tensor:
    """(vocab_size, size) rows of length `norm`; `share` of their squared length tells what a token is like, the rest
    is random and tells it apart."""
    views = []
    for number, counts in enumerate(count_pairs(texts, vocab_size)):
        views += [positive_pmi(counts), positive_pmi(counts.T)] if number < len(BESIDE) else [
            positive_pmi(counts + counts.T)]
    gram = sum(torch.from_numpy(v @ v.T) / max(float((v**2).sum()), 1.0) for v in views)
    values, vectors = torch.linalg.eigh(gram)  # type: ignore[arg-type]
    vectors, values = vectors[:, -size:], values[-size:]
    like = vectors * values.clamp(min=0) ** 0.25
    like = like - like.mean(0)
    apart = torch.randn(vocab_size, size)
    return norm * (share**0.5 * F.normalize(like) + (1 - share) ** 0.5 * F.normalize(apart))
