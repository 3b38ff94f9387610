"""How many steps a stage has, and its learning rate at each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

# The learning rate, relative to the largest one, and what it falls to. Copying forms at the largest; SQuAD's answers
# differ so much that at this rate most of what a step moves is noise (benchmarks/LOG.md).
RATES = {"text": (1.0, 0.4), "compressor": (0.2, 0.006)}
# In the joint stage it falls several times: by when (share of the stage), from what, to what. The mean of the weights
# that falls end with answers better, and more of it from slots, than any of them (benchmarks/LOG.md).
FALLS = ((0.56, 0.5, 0.015), (0.8, 0.34, 0.015), (0.94, 0.25, 0.012), (1.0, 0.2, 0.012))
MORE_FALLS = ((1.0, 0.25, 0.012),)  # of released weights that go on


@dataclass
class Schedule:
    """Steps of each stage and where its learning rate starts to fall (share of the stage, or of its fall)."""

    text: int = 3200
    joint: int = 7100
    compressor: int = 0
    decay_from: float = 0.5
    muon_lr: float = 2e-3
    adam_lr: float = 3e-3
    warmup: int = 60
    max_factor: float = 16.0
    curriculum: float = 0.25
    begun: bool = False  # the weights read slots already

    @property
    def falls(self) -> tuple[tuple[float, float, float], ...]:
        return MORE_FALLS if self.begun else FALLS

    def ends(self) -> list[int]:
        """The steps of the joint stage at which a fall of its rate has ended."""
        return [round(share * self.joint) for share, _, _ in self.falls]

    def learning_rate(self, stage: str, step: int) -> float:
        begin, end = 0, getattr(self, stage)
        if stage == "joint":
            falls = zip(pairwise([0, *self.ends()]), self.falls, strict=True)
            (begin, end), (_, first, last) = next(fall for fall in falls if step < fall[0][1])
        elif stage == "compressor" and not self.joint:  # a control: its compressor has everything to learn
            _, first, last = FALLS[0]
        else:
            first, last = RATES[stage]
        share = (step - begin) / (end - begin)
        fallen = max(0.0, share - self.decay_from) / (1 - self.decay_from)
        return min(1.0, (step - begin + 1) / self.warmup) * (first + (last - first) * fallen)

    def progress(self, stage: str, step: int) -> float:
        """How far the factor curriculum is, from 0 to 1: it takes a share (`curriculum`) of the first stage with slots
        (a control has no joint stage); none where the weights already read slots."""
        if stage == "text" or self.begun or not self.curriculum or stage != ("joint" if self.joint else "compressor"):
            return 1.0
        return min(1.0, step / (getattr(self, stage) * self.curriculum))

    def naming(self, stage: str, step: int) -> float:
        """Weight of the naming loss: 1 when slots begin, nothing from two thirds of the curriculum on."""
        return max(0.0, 1 - self.progress(stage, step) * 1.5) if stage != "text" else 0.0
