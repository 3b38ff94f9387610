"""What tells a run that learns from one that does not: plateaus with advice, and held-out losses that stop a stage."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ctxcomp_rag.training.spliced import Repeating

_WINDOW = 200  # steps
_LEAST_GAIN = 0.01  # of the loss, from one half of the window to the other
_LEARNED = 0.1  # nats per token: below it a loss is at its end, not on a plateau

_NOTHING = ("the decoder reads nothing from the slots yet: it repeats what is likely, not the text. Begin with a "
            "first stage at factor 1 or 2 (factors: [1, 2]), use optimizer: muon and slot_positions: spread with "
            "slots: proportional, and put LoRA on all linear layers")
_PART = ("the slots hold most of the text and lose the rest: train longer or at a lower learning rate, raise "
         "lora_rank, or lower the factor; names and numbers go first, so look at `ctxcomp eval --task reconstruction`")


@dataclass
class PlateauMonitor:
    """Watches the reconstruction losses of a stage and gives advice once where one stands still.

    The two places where the public ICAE code is known to stop are reconstruction losses of about 2 and of about 0.4
    nats per token. Where the loss of another objective stands says nothing of the kind: a continuation cannot be known,
    and a divergence from a teacher is not counted in what the slots hold.
    """

    window: int = _WINDOW
    _seen: dict[tuple[str, str], deque[float]] = field(default_factory=dict)
    _told: set[tuple[str, str]] = field(default_factory=set)

    def advice(self, record: Mapping[str, Any]) -> str | None:
        """What to do about the step's record ("stage", "step", "losses" by source and objective), or None."""
        for name, loss in record["losses"].items():
            if not name.endswith(f".{Repeating.__name__}"):
                continue
            key = str(record["stage"]), str(name)
            seen = self._seen.setdefault(key, deque(maxlen=self.window))
            seen.append(float(loss))
            if len(seen) < self.window or key in self._told:
                continue
            half = self.window // 2
            before, now = (statistics.fmean(part) for part in (list(seen)[:half], list(seen)[half:]))
            if now > _LEARNED and before - now < _LEAST_GAIN * before:
                self._told.add(key)
                return (f"stage {key[0]!r}, step {record['step']}: the loss of {key[1]} has stood at {now:.2f} nats "
                        f"per token for {self.window} steps; {_NOTHING if now > 1 else _PART}")
        return None


@dataclass(frozen=True)
class HeldOut:
    """Examples that are never trained on; a stage may end early where their loss stops falling.

    Attributes:
        samples: what the loss is of, the same every time.
        every: steps between evaluations.
        patience: evaluations without a new best after which the stage ends; 0 never ends it.
    """

    loss: Callable[[Sequence[Any]], Tensor]
    samples: Sequence[Any]
    every: int
    patience: int
    batch_size: int = 16

    def evaluate(self, compressor: nn.Module) -> float:
        """Mean loss in nats per labelled token."""
        was_training = compressor.training
        compressor.eval()
        total = 0.0
        with torch.no_grad():
            for begin in range(0, len(self.samples), self.batch_size):
                total += float(self.loss(self.samples[begin : begin + self.batch_size]))
        compressor.train(was_training)
        return total / max(1, sum(len(s.labels) for s in self.samples))

    def stops(self, history: Sequence[float]) -> bool:
        """Whether the losses of a stage so far end it."""
        best = min(range(len(history)), key=history.__getitem__, default=0)
        return bool(self.patience) and len(history) - 1 - best >= self.patience
