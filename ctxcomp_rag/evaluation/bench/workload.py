"""What every row reads: the same chunks and question as token ids, drawn by a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ctxcomp_rag.errors import InputError


@dataclass(frozen=True)
class Workload:
    """`chunks` texts of `chunk_tokens` each, a question, and how many tokens to answer with."""

    chunks: int = 5
    chunk_tokens: int = 512
    question_tokens: int = 64
    new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("chunks", "chunk_tokens", "question_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"expected at least 1 for {name}, got {getattr(self, name)}")

    def chunk_ids(self, vocab_size: int) -> list[list[int]]:
        """Token ids of each chunk."""
        return [self._draw(number, self.chunk_tokens, vocab_size) for number in range(self.chunks)]

    def question_ids(self, vocab_size: int) -> list[int]:
        """Token ids of the question."""
        return self._draw(self.chunks, self.question_tokens, vocab_size)

    def _draw(self, number: int, count: int, vocab_size: int) -> list[int]:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        ids: list[int] = torch.randint(1, vocab_size, (count,), generator=generator).tolist()
        return ids
