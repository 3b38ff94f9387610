"""InfiniPot (arXiv 2410.01518): KV spans from any full-attention RoPE decoder, without training.

A text is read into a pot of `pot_tokens` cache entries. When it is full, the entries that matter are kept, moved to
the front, and reading goes on; at the end the span's slots are what is left. The paper's own choice of what matters
(catalyst prompt and novelty) is the default of several rules, see `kv/scores.py`.
"""

from __future__ import annotations

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
from ctxcomp_rag.kv.pot import GENERIC_CATALYST, QUESTION_CATALYST, ContextPot
from ctxcomp_rag.kv.scores import InfiniPot, ScoringRule, make_rule
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
        catalyst: prompt that is read after the pot and whose attention is the score (CaP). Generic by default; see
            `for_question` where the question, or the kind of question, is known.
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
                  "sink_slots": 0, "recent_slots": 0}
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

    def for_question(self, question: str) -> InfiniPotConfig:
        """The same with a catalyst that asks a question, or a kind of question (CaP-Q)."""
        return replace(self, catalyst=QUESTION_CATALYST.format(question=question))

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
        self.backbone, self.config = backbone, config or InfiniPotConfig()
        self._rope = backbone.rope
        # other modules over the same tensors: hooks must not fire for those who decode with the backbone meanwhile
        self._model = backbone.second_tree()
        self._lock = threading.Lock()
        observes = self.config.rule.queries
        if observes != "none" or self.config.rule.reading:
            require_observable(self._model)
        self._catalyst = backbone.tokenizer.encode(self.config.catalyst) if observes == "catalyst" else []
        window = backbone.max_positions
        pot = self.config.pot_tokens or min(_DEFAULT_POT, window)
        if pot > window:
            raise InputError(f"the pot of {pot} tokens is larger than the window of {backbone.model_id!r}, "
                             f"{window} positions; choose pot_tokens of at most {window}")
        self.room = pot - len(self._catalyst)
        if self.room < 2:
            raise InputError(f"the catalyst takes {len(self._catalyst)} of the {pot} tokens of the pot, which leaves "
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
            return cls(backbone)
        if budget.factor is not None:
            return cls(backbone, InfiniPotConfig(compression_factor=budget.factor))
        return cls(backbone, InfiniPotConfig(num_slots=budget.slots, span_bytes=budget.bytes))

    # -- what the layers around ask ------------------------------------------------------------------------------

    @cached_property
    def spec(self) -> SpanSpec:
        return SpanSpec("kv", self.backbone.fingerprint, f"{self.name}-{self.digest()[:16]}")

    @property
    def max_chunk_tokens(self) -> int:
        return min(self.config.chunk_tokens, self.room)

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
        if num_tokens > self.room and slots >= self.room:
            raise InputError(f"{slots} slots of a text of {num_tokens} tokens do not fit into a pot that takes "
                             f"{self.room} tokens of text; compress more, cut the text, or raise pot_tokens")
        return slots

    def distilled(self, ids: Sequence[int], keep: int) -> ContextPot:
        """The pot after reading a text of any length: `keep` entries, or all where the text has no more."""
        config = self.config
        with self._lock:
            pot = ContextPot(self._model, self._rope, config.rule, catalyst=self._catalyst,
                             step_tokens=config.step_tokens, sink=config.sink_slots, recent=config.recent_slots)
            while pot.num_read < len(ids):
                pot.read(ids[pot.num_read : pot.num_read + self.room - pot.size])
                if pot.size > keep:
                    pot.distil(keep)
            return pot

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
