"""InfiniPot (arXiv 2410.01518): KV spans from any full-attention RoPE decoder, without training.

A text is read into a pot of `pot_tokens` cache entries. When it is full, the entries that matter are kept, moved to
the front, and reading goes on; at the end the span's slots are what is left. The paper's own choice of what matters
(catalyst prompt and novelty) is the default of several rules, see `kv/scores.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors.base import (
    CONFIG_NAME,
    Budget,
    Compressor,
    checked_factor,
    decoder_differences,
    read_config,
)
from ctxcomp_rag.errors import IncompatibleSpanError, InputError
from ctxcomp_rag.kv.attention import require_observable
from ctxcomp_rag.kv.catalyst import (
    DRAFT_TOKENS,
    GENERIC_CATALYST,
    QUESTION_CATALYST,
    REPEAT_CATALYST,
    Catalyst,
    catalyst,
)
from ctxcomp_rag.kv.pot import ContextPot
from ctxcomp_rag.kv.scores import LOOKED_UP, InfiniPot, ScoringRule, make_rule
from ctxcomp_rag.rope import require_full_attention
from ctxcomp_rag.spans import DecoderFingerprint, KVSpan, SpanSpec

_DEFAULT_POT = 4096


@dataclass(frozen=True)
class InfiniPotConfig:
    """Settings of InfiniPot.

    Attributes:
        pot_tokens: |M|, cache entries that reading may take, the catalyst's included; the smaller of 4096 and the
            decoder's window by default.
        compression_factor: source tokens per slot.
        num_slots: |C| as a number, for texts of any length; takes the place of the factor.
        span_bytes: keys and values of a span may take so many bytes, for texts of any length; takes the place of the
            factor too. As they leave the pot (`slot_dtype`), before anything that an index does to them.
        chunk_tokens: length that documents are chunked to. Longer texts are read too, as many pots as it takes.
        catalyst: prompt that is read after the pot, followed by the decoder's turn of its chat template, and whose
            attention is the score (CaP). Generic by default; see `for_question` where the question, or the kind of
            question, is known, and `repeating`.
        repeats: the catalyst goes on with the text itself (KVzip). Half of the pot's room is then for the repetition.
        draft_tokens: the catalyst goes on with what the decoder itself says next, so many tokens at most.
        rule: what to keep.
        sink_slots, recent_slots: entries at either end that are always kept, half of the slots each at most.
        step_tokens: longest piece of text in one forward pass.
        slot_dtype: how keys and values leave the pot. "bfloat16" halves the spans of a float32 decoder, for a rounding
            error of at most 2^-8 of each number; reading itself always uses the decoder's own type.
    """

    pot_tokens: int | None = None
    compression_factor: float = 4.0
    num_slots: int | None = None
    span_bytes: int | None = None
    chunk_tokens: int = 512
    catalyst: str = GENERIC_CATALYST
    repeats: bool = False
    draft_tokens: int = 0
    rule: ScoringRule = field(default_factory=InfiniPot)
    sink_slots: int = 0
    recent_slots: int = 0
    step_tokens: int = 512
    slot_dtype: Literal["decoder", "bfloat16"] = "decoder"

    def __post_init__(self) -> None:
        checked_factor(self.compression_factor)
        if self.num_slots is not None and self.span_bytes is not None:
            raise InputError(f"a budget is a number of slots or of bytes, got num_slots={self.num_slots} and "
                             f"span_bytes={self.span_bytes}")
        lowest = {"pot_tokens": 1, "num_slots": 1, "span_bytes": 1, "chunk_tokens": 1, "step_tokens": 1,
                  "sink_slots": 0, "recent_slots": 0, "draft_tokens": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"expected {name} of at least {least}, got {value}")
        if self.slot_dtype not in ("decoder", "bfloat16"):
            raise InputError(f"expected slot_dtype='decoder' or 'bfloat16', got {self.slot_dtype!r}")
        if self.rule.reading and (self.sink_slots or self.recent_slots):
            raise InputError(f"the rule {self.rule.name!r} scores all entries together and keeps ends of its own; "
                             "leave sink_slots and recent_slots at 0")
        if self.rule.queries == "catalyst" and not self.catalyst:
            raise InputError(f"the rule {self.rule.name!r} scores by a catalyst prompt; `catalyst` must not be empty")

        if self.repeats and self.rule.queries == "catalyst" and self.rule.reduce == "mean":
            raise InputError("the attention of a catalyst that repeats the text adds up over all pots; expected a rule "
                             "with reduce='max' or 'sum', got 'mean'")

    def for_question(self, question: str) -> InfiniPotConfig:
        """The same with a catalyst that asks a question, or a kind of question, and drafts the answer (CaP-Q); what
        they look up is kept, unless a rule was chosen."""
        rule = LOOKED_UP if self.rule == InfiniPot() else self.rule
        return replace(self, catalyst=QUESTION_CATALYST.format(question=question), repeats=False,
                       draft_tokens=DRAFT_TOKENS, rule=rule)

    def repeating(self) -> InfiniPotConfig:
        """The same with the catalyst that kept most for questions unknown (docs/infinipot.md): the text once more."""
        return replace(self, catalyst=REPEAT_CATALYST, repeats=True, draft_tokens=0, rule=LOOKED_UP)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "rule": self.rule.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> InfiniPotConfig:
        """Inverse of `to_dict`."""
        rule = dict(data["rule"])
        return cls(**{**data, "rule": make_rule(rule.pop("name"), rule)})


class InfiniPotCompressor(Compressor):
    """KV spans by reading and forgetting; nothing is trained.

    Args:
        backbone: any decoder that keeps all keys in all layers and rotates them (RoPE).

    Raises:
        UnsupportedModelError: it is not such a decoder; the message says why.
        InputError: the pot is larger than the decoder's window, or too small for the catalyst.
    """

    name: ClassVar[str] = "infinipot"

    def __init__(self, backbone: Backbone, config: InfiniPotConfig | None = None) -> None:
        require_full_attention(backbone.config)
        self.backbone = backbone
        self._rope = backbone.rope
        # other modules over the same tensors: hooks must not fire for those who decode with the backbone meanwhile
        self._model = backbone.second_tree()
        self._lock = threading.Lock()
        config = config or InfiniPotConfig()
        if config.rule.queries != "none" or config.rule.reading:
            require_observable(self._model)
        self._set(config)

    def _set(self, config: InfiniPotConfig) -> None:
        self.config, backbone = config, self.backbone
        observes = config.rule.queries
        self._catalyst = (catalyst(backbone.tokenizer, self.config.catalyst, repeats=self.config.repeats,
                                   draft_tokens=self.config.draft_tokens) if observes == "catalyst" else Catalyst())
        window = backbone.max_positions
        pot = self.config.pot_tokens or min(_DEFAULT_POT, window)
        if pot > window:
            raise InputError(f"the pot of {pot} tokens is larger than the window of {backbone.model_id!r}, "
                             f"{window} positions; choose pot_tokens of at most {window}")
        self.room = pot - self._catalyst.length
        if self.room < 2 + 2 * self._catalyst.repeats:
            raise InputError(f"the catalyst takes {self._catalyst.length} of the {pot} tokens of the pot, which leaves "
                             "no room for text; raise pot_tokens or shorten the catalyst")
        self._fixed_slots = self.config.num_slots
        if self.config.span_bytes is not None:
            self._fixed_slots = self.config.span_bytes // self.slot_bytes
            if not self._fixed_slots:
                raise InputError(f"a slot of {backbone.model_id!r} takes {self.slot_bytes:,} bytes, so a budget of "
                                 f"{self.config.span_bytes:,} bytes holds none; raise it")

    @classmethod
    def ready_for(cls, backbone: Backbone, budget: Budget | None = None) -> Self:
        if budget is None:
            return cls(backbone, InfiniPotConfig().repeating())
        if budget.factor is not None:
            return cls(backbone, InfiniPotConfig(compression_factor=budget.factor).repeating())
        return cls(backbone, InfiniPotConfig(num_slots=budget.slots, span_bytes=budget.bytes).repeating())

    # -- what the layers around ask ------------------------------------------------------------------------------

    @cached_property
    def spec(self) -> SpanSpec:
        return SpanSpec("kv", self.backbone.fingerprint, f"{self.name}-{self.digest()[:16]}")

    @property
    def max_chunk_tokens(self) -> int:
        return min(self.config.chunk_tokens, self._next_piece(0))

    @property
    def compression_factor(self) -> float:
        if self._fixed_slots is not None:
            return max(1.0, self.max_chunk_tokens / self._fixed_slots)
        return self.config.compression_factor

    @property
    def slot_bytes(self) -> int:
        b = self.backbone
        return 2 * int(b.config.num_hidden_layers) * b.num_kv_heads * b.head_dim * self._slot_dtype.itemsize

    def digest(self) -> str:
        """sha256 over everything that decides the spans besides the decoder."""
        settings = {**self.config.to_dict(), "room": self.room}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    # -- compression -----------------------------------------------------------------------------------------------

    def compress(self, chunks: Sequence[Chunk], *, compression_factor: float | None = None) -> list[KVSpan]:  # type: ignore[override]
        texts = [self.backbone.tokenizer.encode(chunk.text) for chunk in chunks]
        budgets = []
        for chunk, ids in zip(chunks, texts, strict=True):  # everything is checked before anything is computed
            if not ids:
                raise InputError(f"chunk {chunk.id} of document {chunk.document_id!r} has no text to compress")
            budgets.append(self.num_slots(len(ids), compression_factor))
        made = []
        for chunk, ids, keep in zip(chunks, texts, budgets, strict=True):
            pot = self.distilled(ids, keep)
            made.append(KVSpan(chunk.id, len(ids), torch.arange(pot.size), pot.size, self._slots(pot.keys),
                               self._slots(pot.values), pot.indices.to("cpu", torch.int32)))
        return made

    def _slots(self, layers: Sequence[Tensor]) -> Tensor:
        # To main memory at once: a batch of KV spans can be larger than the model that made them.
        return torch.stack([layer.to("cpu", self._slot_dtype) for layer in layers])

    @property
    def _slot_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.slot_dtype == "bfloat16" else self.backbone.dtype

    def num_slots(self, num_tokens: int, compression_factor: float | None = None) -> int:
        """Slots of a text; raises InputError for a factor below 1 or a budget that the pot cannot hold."""
        factor = checked_factor(self.config.compression_factor if compression_factor is None else compression_factor)
        fixed = self._fixed_slots if compression_factor in (None, self.compression_factor) else None
        slots = min(num_tokens, fixed if fixed is not None else math.ceil(num_tokens / factor))
        if num_tokens > self._next_piece(0) and self._next_piece(slots) < 1:
            raise InputError(f"{slots} slots of a text of {num_tokens} tokens do not fit into a pot that takes "
                             f"{self._next_piece(0)} tokens of text; compress more, cut the text, or raise pot_tokens")
        return slots

    def _next_piece(self, size: int) -> int:
        """Tokens that can be read into a pot of so many entries."""
        free = self.room - size
        return free // 2 if self._catalyst.repeats else free

    def distilled(self, ids: Sequence[int], keep: int) -> ContextPot:
        """The pot after reading a text of any length: `keep` entries, or all where the text has no more."""
        config = self.config
        with self._lock:
            pot = ContextPot(self._model, self._rope, config.rule, catalyst=self._catalyst,
                             step_tokens=config.step_tokens, sink=config.sink_slots, recent=config.recent_slots)
            while pot.num_read < len(ids):
                pot.read(ids[pot.num_read : pot.num_read + self._next_piece(pot.size)])
                if pot.size > keep:
                    pot.distil(keep)
            return pot

    def for_question(self, question: str) -> Self:
        """A compressor whose spans keep what a question asks for (CaP-Q); modules, weights and lock are shared.

        Raises:
            InputError: the question does not fit into the pot.
        """
        made = copy.copy(self)
        made.__dict__.pop("spec", None)  # another catalyst makes other spans
        made._set(self.config.for_question(question))
        return made

    # -- saving ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """The settings, with the decoder they were chosen for; there are no weights."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"method": self.name, **self.config.to_dict(), "decoder": asdict(self.backbone.fingerprint)}
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path: str | Path, backbone: Backbone) -> Self:
        settings = read_config(Path(path))
        made_for = DecoderFingerprint(**settings.pop("decoder"))
        settings.pop("method")
        different = decoder_differences(made_for, backbone.fingerprint)
        if different:
            raise IncompatibleSpanError(
                f"the settings in {str(path)!r} were saved for the decoder {made_for}, but this decoder is "
                f"{backbone.fingerprint}; they differ in {', '.join(different)}. Nothing is trained: make a new "
                "InfiniPotCompressor(backbone, config) for this decoder"
            )
        return cls(backbone, InfiniPotConfig.from_dict(settings))
