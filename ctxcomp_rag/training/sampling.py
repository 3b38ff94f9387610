"""Sources whose samples vary in factor and in number of spans, drawn anew at every step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ctxcomp_rag.training.spliced import SplicedObjective, SplicedSample
from ctxcomp_rag.training.trainer import Source


@dataclass(frozen=True)
class SampledSource(Source):
    """Examples in prompts of one to `max_spans` spans, the example's own at a random place, at a random factor.

    Attributes:
        factors: source tokens per slot, each as likely; empty for the compressor's own.
    """

    objective: SplicedObjective
    factors: Sequence[float] = field(default=())
    max_spans: int = 1

    def draw(self, rng: random.Random) -> SplicedSample:
        example = rng.choice(self.examples)
        contexts = [e.context for e in rng.choices(self.examples, k=rng.randint(1, self.max_spans) - 1)
                    if e.context != example.context]
        contexts.insert(rng.randint(0, len(contexts)), example.context)
        return self.objective.sample(example, contexts, rng.choice(self.factors) if self.factors else None)

    def described(self) -> dict[str, Any]:
        return {**super().described(), "factors": list(self.factors), "max_spans": self.max_spans}
