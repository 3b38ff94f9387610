"""Which cache entries to keep: one small rule each. A new rule is a frozen dataclass that writes only its formula.

    @scoring_rule
    @dataclass(frozen=True)
    class FirstTokens(ScoringRule):
        name = "first_tokens"

        def score(self, entries): return -entries.indices.float()

Reading the text, gathering what the rule asked for (`queries`, `novelty`), keeping the best and moving their keys is
the work of `kv/pot.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ctxcomp_rag.errors import InputError

Reduce = Literal["sum", "mean", "max"]
Queries = Literal["none", "catalyst", "window", "all"]


@dataclass(frozen=True, eq=False)
class Reading:
    """What the attention module of a layer was given for the last r tokens read (since the last distillation).

    Attributes:
        module: the attention module.
        rotary: the decoder's rotary embedding.
        hidden_states: (1, r, hidden_size), the module's input.
        position_embeddings: cos and sin, (1, r, rotary_dim) each.
    """

    module: nn.Module
    rotary: nn.Module
    hidden_states: Tensor
    position_embeddings: tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Entries:
    """What a rule sees of one layer: its n candidates, oldest first.

    Attributes:
        keys: (num_kv_heads, n, head_dim), rotated for their present positions.
        values: (num_kv_heads, n, head_dim).
        indices: (num_kv_heads, n) place of each entry's token in the whole text; heads may hold different tokens.
        novelty: (num_kv_heads, n) -log p of each entry's token when it was read, inf for the first token of all
            (nothing foretold it), -inf where there is no such number: slots of spans, and the first token after
            cached ones; None unless the rule asks for it.
        attention: (num_kv_heads, n) attention mass from the rule's `queries`; None for a rule that has none.
        num_keep: how many of the candidates will be kept.
        num_read: tokens of the text read so far.
        layer: number of the layer.
        reading: inputs of the layer's attention; None unless the rule asks for them.
    """

    keys: Tensor
    values: Tensor
    indices: Tensor
    novelty: Tensor | None
    attention: Tensor | None
    num_keep: int
    num_read: int
    layer: int
    reading: Reading | None = None


class ScoringRule(ABC):
    """Scores for the entries of one layer; the highest are kept.

    Attributes:
        queries: whose attention the rule wants to see: of the catalyst prompt, of the last `window` tokens read, of
            "all" tokens read (accumulated since the entry came in), or of "none".
        novelty: whether it wants to see -log p of the tokens.
        reading: whether it wants to see the inputs of the attention modules. They are kept from one distillation to
            the next, (|M| - |C|) x hidden_size numbers for each layer.
        reduce: how the masses of several queries, and of the query heads that share a kv head, become one number
            ("sum" or "max" for a rule that accumulates over "all").
        window: queries of a "window" rule.
        sink, recent: entries at either end that are kept without being scored.
    """

    name: ClassVar[str]
    queries: ClassVar[Queries] = "none"
    novelty: ClassVar[bool] = False
    reading: ClassVar[bool] = False
    reduce: Reduce = "sum"
    window: int = 0

    @property
    def sink(self) -> int:
        return 0

    @property
    def recent(self) -> int:
        return 0

    def prepare(self, model: PreTrainedModel) -> None:  # noqa: B027
        """Called with the decoder before it reads; most rules need nothing from it."""

    @abstractmethod
    def score(self, entries: Entries) -> Tensor:
        """(num_kv_heads, n), or (n,) where the heads agree."""

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, JSON-ready."""
        settings: Any = self
        return {"name": self.name, **asdict(settings)}


RULES: dict[str, type[ScoringRule]] = {}
"""The rules by name; `scoring_rule` adds one."""

_WITH_EXTRA_PACKAGES = {"kvpress": "ctxcomp_rag.kv.press:KVPress"}

_Rule = TypeVar("_Rule", bound=type[ScoringRule])


def scoring_rule(rule: _Rule) -> _Rule:
    """Class decorator: makes a rule known by its name."""
    RULES[rule.name] = rule
    return rule


def make_rule(name: str, settings: Mapping[str, Any] | None = None) -> ScoringRule:
    """The rule of that name; raises InputError naming the rules, or the settings, that there are."""
    rule: Any = RULES.get(name)
    if name in _WITH_EXTRA_PACKAGES:
        module, attribute = _WITH_EXTRA_PACKAGES[name].split(":")
        rule = getattr(import_module(module), attribute)
    if rule is None:
        known = sorted({*RULES, *_WITH_EXTRA_PACKAGES})
        raise InputError(f"there is no scoring rule {name!r}; expected one of {', '.join(known)}")
    known = [f.name for f in fields(rule)]
    unknown = sorted(set(settings or {}) - set(known))
    if unknown:
        raise InputError(f"the scoring rule {name!r} has no setting {unknown[0]!r}; "
                         f"expected one of {', '.join(known) or 'none at all'}")
    made: ScoringRule = rule(**(settings or {}))
    return made


def _check_reduce(reduce: str) -> None:
    if reduce not in ("sum", "mean", "max"):
        raise InputError(f"expected reduce='sum', 'mean' or 'max', got {reduce!r}")


def seen(tensor: Tensor | None) -> Tensor:
    """What a rule asked for is there; anything else is our own mistake."""
    assert tensor is not None, "a rule reads what it did not ask for in `queries` or `novelty`"
    return tensor


@scoring_rule
@dataclass(frozen=True)
class CaP(ScoringRule):
    """What the catalyst prompt attends to (InfiniPot, arXiv 2410.01518); each head on its own."""

    name: ClassVar[str] = "cap"
    queries: ClassVar[Queries] = "catalyst"
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        _check_reduce(self.reduce)

    def score(self, entries: Entries) -> Tensor:
        return seen(entries.attention)


@scoring_rule
@dataclass(frozen=True)
class NuC(ScoringRule):
    """What the model did not foresee (novelty under compression); a number per token, so heads agree."""

    name: ClassVar[str] = "nuc"
    novelty: ClassVar[bool] = True

    def score(self, entries: Entries) -> Tensor:
        return seen(entries.novelty)


@scoring_rule
@dataclass(frozen=True)
class InfiniPot(ScoringRule):
    """The first `alpha` of the places go to the most novel tokens, the rest, per head, to CaP."""

    name: ClassVar[str] = "infinipot"
    queries: ClassVar[Queries] = "catalyst"
    novelty: ClassVar[bool] = True
    alpha: float = 0.5
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        _check_reduce(self.reduce)
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha is a fraction of the places, from 0 to 1, got {self.alpha:g}")

    def score(self, entries: Entries) -> Tensor:
        attention = seen(entries.attention)
        novelty, novel = seen(entries.novelty).topk(int(self.alpha * entries.num_keep), dim=-1)
        # entries without a novelty are the catalyst's to judge, however many places are left
        return attention.scatter(-1, novel, attention.gather(-1, novel).where(novelty.isneginf(), torch.inf))


LOOKED_UP = InfiniPot(alpha=0.0, reduce="max")
"""For catalysts that say what is needed (a question and its answer, the text once more): what any one of their tokens
looked up is kept. A sum over them favours what many look at a little."""


@scoring_rule
@dataclass(frozen=True)
class SnapKV(ScoringRule):
    """What the last tokens attend to, smoothed over neighbours; those last tokens are kept (arXiv 2404.14469)."""

    name: ClassVar[str] = "snapkv"
    queries: ClassVar[Queries] = "window"
    reduce: Reduce = "mean"
    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        _check_reduce(self.reduce)
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"snapkv needs a window of at least 1 and an odd kernel, got {self.window}, {self.kernel}")

    @property
    def recent(self) -> int:
        return self.window

    def score(self, entries: Entries) -> Tensor:
        mass = seen(entries.attention)[None]
        return torch.nn.functional.avg_pool1d(mass, self.kernel, 1, self.kernel // 2, count_include_pad=False)[0]


@scoring_rule
@dataclass(frozen=True)
class StreamingLLM(ScoringRule):
    """The first few tokens, which attention falls back to, and the most recent ones (arXiv 2309.17453)."""

    name: ClassVar[str] = "streaming_llm"
    sinks: int = 4

    @property
    def sink(self) -> int:
        return self.sinks

    def score(self, entries: Entries) -> Tensor:
        return entries.indices.double()


@scoring_rule
@dataclass(frozen=True)
class H2O(ScoringRule):
    """Attention received from all tokens read since (heavy hitters, arXiv 2306.14048), and `recent_tokens`."""

    name: ClassVar[str] = "h2o"
    queries: ClassVar[Queries] = "all"
    recent_tokens: int = 0

    @property
    def recent(self) -> int:
        return self.recent_tokens

    def score(self, entries: Entries) -> Tensor:
        return seen(entries.attention)


@scoring_rule
@dataclass(frozen=True)
class KeyNorm(ScoringRule):
    """Keys of small norm tend to be attended to (arXiv 2406.11430); a rotation does not change the norm."""

    name: ClassVar[str] = "key_norm"

    def score(self, entries: Entries) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(entries.keys.float(), dim=-1)
        return -norms


@scoring_rule
@dataclass(frozen=True)
class Random(ScoringRule):
    """Chance, drawn anew at each distillation: what any other rule has to beat. The same text, the same draw."""

    name: ClassVar[str] = "random"
    seed: int = 0

    def score(self, entries: Entries) -> Tensor:
        mixed = (self.seed * 1_000_003 + entries.layer) * 1_000_003 + entries.num_read
        generator = torch.Generator().manual_seed(mixed)
        return torch.rand(entries.indices.shape, generator=generator).to(entries.keys.device)


def choose(rule: ScoringRule, entries: Entries, *, sink: int, recent: int) -> Tensor:
    """Places (num_kv_heads, num_keep) of the entries to keep, in their order.

    The first `sink` and the last `recent` entries are kept unscored; each may take half of the places at most, so
    that a span of very few slots is not all beginning or all end.
    """
    heads, n, keep = entries.keys.shape[0], entries.keys.shape[1], entries.num_keep
    sink, recent = min(sink, keep // 2), min(recent, keep // 2)
    inner = slice(sink, n - recent)
    candidates = Entries(
        entries.keys[:, inner], entries.values[:, inner], entries.indices[:, inner],
        None if entries.novelty is None else entries.novelty[:, inner],
        None if entries.attention is None else entries.attention[:, inner],
        keep - sink - recent, entries.num_read, entries.layer, entries.reading,
    )
    scores = rule.score(candidates).expand(heads, n - sink - recent)
    best = scores.topk(candidates.num_keep, dim=-1).indices.sort(dim=-1).values + sink
    ends = torch.cat([torch.arange(sink), torch.arange(n - recent, n)]).to(best.device).expand(heads, -1)
    return torch.cat([ends[:, :sink], best, ends[:, sink:]], dim=-1)


__all__ = [
    "H2O",
    "RULES",
    "CaP",
    "Entries",
    "InfiniPot",
    "KeyNorm",
    "NuC",
    "Random",
    "Reading",
    "ScoringRule",
    "SnapKV",
    "StreamingLLM",
    "choose",
    "make_rule",
    "scoring_rule",
    "seen",
]
