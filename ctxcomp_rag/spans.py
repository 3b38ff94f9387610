"""Memory spans: one chunk in latent form, and the specification of who may read it.

    MemorySpan            chunk_id, num_source_tokens, positions, num_positions
    ├── SoftSpan          embeds (num_slots, hidden_size)                      enters through inputs_embeds
    ├── KVSpan            keys, values (num_layers, num_kv_heads, num_slots, head_dim)   enters through the cache
    └── LatentSpan        memory (num_slots, encoder_size)                   enters no decoder; a compressor reads it

`positions` count from the span's start: consecutive (official ICAE and PCC), or spread over the places
of the text that the slots stand for (EPL, arXiv 2409.14364). `num_positions` is how far the text that
follows the span is moved on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from ctxcomp_rag.codes import Latent, ScaledCodes
from ctxcomp_rag.errors import IncompatibleSpanError, SpanShapeError

SpanKind = Literal["soft", "kv", "latent"]
SlotPositions = Literal["consecutive", "spread"]


class _LatentField:
    """A tensor of a span. What is held may be codes, until somebody asks for the tensor (`MemorySpan.held` does not).

    Set to detached tensors; what else is wrong with them is for the span to say.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, span: MemorySpan | None, owner: type) -> Tensor:
        if span is None:
            raise AttributeError(self.name)  # a dataclass asks for a default: there is none
        held: Latent = span.__dict__[self.name]
        if isinstance(held, ScaledCodes):
            with torch.inference_mode(False):  # it stays, and may be asked for again where gradients are wanted
                held = span.__dict__[self.name] = held.decoded()
        return held

    def __set__(self, span: MemorySpan, value: Latent) -> None:
        span.__dict__[self.name] = value if isinstance(value, ScaledCodes) else value.detach()


@dataclass(frozen=True, eq=False)
class MemorySpan:
    """What every span knows about itself. Immutable; tensors are detached and must not be written to.

    Attributes:
        chunk_id: id of the chunk the span stands for.
        num_source_tokens: decoder tokens of that chunk's text; encoder tokens in a latent span.
        positions: (num_slots,) int64, strictly increasing, from the span's start.
        num_positions: positions the whole span occupies, at least `positions[-1] + 1`.
        retention: number of slots -> share of the chunk's numbers, dates and names that the decoder reads out of so
            many of its slots; empty where it was not measured (see `ctxcomp_rag.retention`).
    """

    chunk_id: str
    num_source_tokens: int
    positions: Tensor
    num_positions: int
    retention: Mapping[int, float] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        positions = self.positions.detach().to(torch.int64)
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "retention", MappingProxyType(dict(self.retention)))
        if positions.ndim != 1 or positions.numel() == 0:
            raise SpanShapeError(f"positions must be (num_slots,) with at least one slot, got {tuple(positions.shape)}")
        if self.num_source_tokens < 1:
            raise SpanShapeError(f"num_source_tokens must be at least 1, got {self.num_source_tokens}")
        places = positions.cpu().numpy()  # every span that is read comes by here, and torch takes three times as long
        if places[0] < 0 or (places[1:] <= places[:-1]).any():
            raise SpanShapeError(f"positions must be strictly increasing from 0 or more, got {positions.tolist()}")
        if self.num_positions <= places[-1]:
            raise SpanShapeError(f"num_positions must be greater than the last slot's position {places[-1]}, "
                                 f"got {self.num_positions}")

    def held(self, name: str) -> Latent:
        """A tensor of the span as it is held: spans read from an index may hold codes."""
        latent: Latent = self.__dict__[name]
        return latent

    @property
    def num_slots(self) -> int:
        """Length of the span inside the decoder."""
        return int(self.positions.numel())

    @property
    def compression_factor(self) -> float:
        """Source tokens per slot: 4.0 means 4x."""
        return self.num_source_tokens / self.num_slots

    @property
    def kind(self) -> SpanKind:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of the latent tensors, decoded."""
        raise NotImplementedError

    def first(self, num_slots: int) -> MemorySpan:
        """The span of fewer slots that a nested span holds: those that come first in its order, in text order.

        Raises:
            SpanShapeError: the span is not nested, or has fewer slots.
        """
        if num_slots == self.num_slots:
            return self
        raise SpanShapeError(f"the {self.kind} span of chunk {self.chunk_id!r} is read with all its {self.num_slots} "
                             f"slots, not with {num_slots}: it is not nested; only a compressor that was trained so "
                             "makes nested spans")


@dataclass(frozen=True, eq=False)
class SoftSpan(MemorySpan):
    """A span of embeddings.

    Attributes:
        embeds: (num_slots, hidden_size), floating point; rows enter the decoder through `inputs_embeds`.
        order: (num_slots,) int64, the slots of a nested span from coarse to fine: for every number of slots that its
            specification allows, the first so many of them are a valid span. None where all slots belong together.
    """

    embeds: _LatentField = _LatentField()
    order: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shape("embeds", self.held("embeds"), (self.num_slots, None))
        if self.order is not None:
            order = self.order.detach().to(torch.int64)
            object.__setattr__(self, "order", order)
            if not order.sort().values.equal(torch.arange(self.num_slots)):
                raise SpanShapeError(f"order must name each of the {self.num_slots} slots once, got {order.tolist()}")

    def first(self, num_slots: int) -> SoftSpan:
        if self.order is None or not 1 <= num_slots < self.num_slots:
            super().first(num_slots)
            return self
        chosen = self.order[:num_slots]
        kept = chosen.sort().values
        embeds = self.held("embeds")
        return SoftSpan(self.chunk_id, self.num_source_tokens, self.positions[kept], self.num_positions,
                        embeds.rows(kept) if isinstance(embeds, ScaledCodes) else embeds[kept],
                        torch.searchsorted(kept, chosen),
                        retention={n: share for n, share in self.retention.items() if n <= num_slots})

    @property
    def kind(self) -> SpanKind:
        return "soft"

    @property
    def hidden_size(self) -> int:
        return int(self.held("embeds").shape[1])

    @property
    def nbytes(self) -> int:
        return self.held("embeds").nbytes


@dataclass(frozen=True, eq=False)
class KVSpan(MemorySpan):
    """A span of cache entries.

    Attributes:
        keys: (num_layers, num_kv_heads, num_slots, head_dim), rotated as if the span began at position 0,
            slot j at `positions[j]`.
        values: same shape.
        kept: (num_layers, num_kv_heads, num_slots) int32, increasing: which of the chunk's tokens each slot was made
            from, heads may hold different ones; None where slots are not made from single tokens.
    """

    keys: _LatentField = _LatentField()
    values: _LatentField = _LatentField()
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shape("keys", self.held("keys"), (None, None, self.num_slots, None))
        _check_shape("values", self.held("values"), (self.num_layers, self.num_kv_heads, self.num_slots, None))
        if self.kept is not None:
            object.__setattr__(self, "kept", self._checked(self.kept))

    def _checked(self, kept: Tensor) -> Tensor:
        wanted = tuple(self.held("keys").shape[:3])
        if tuple(kept.shape) != wanted or kept.is_floating_point():
            raise SpanShapeError(f"kept must be integers of shape {wanted}, got {kept.dtype} of "
                                 f"shape {tuple(kept.shape)}")
        if int(kept.min()) < 0 or int(kept.max()) >= self.num_source_tokens or bool((kept.diff(dim=-1) <= 0).any()):
            raise SpanShapeError(f"kept must increase from slot to slot and name tokens 0 to "
                                 f"{self.num_source_tokens - 1} of the chunk, got {int(kept.min())} to "
                                 f"{int(kept.max())}")
        return kept.detach().to(torch.int32)

    @property
    def kind(self) -> SpanKind:
        return "kv"

    @property
    def num_layers(self) -> int:
        return int(self.held("keys").shape[0])

    @property
    def num_kv_heads(self) -> int:
        return int(self.held("keys").shape[1])

    @property
    def nbytes(self) -> int:
        return self.held("keys").nbytes + self.held("values").nbytes


@dataclass(frozen=True, eq=False)
class LatentSpan(MemorySpan):
    """What an encoder outside the decoders remembers of a chunk, before a converter makes it a span of one of them.

    Attributes:
        memory: (num_slots, encoder_size), floating point: the encoder's last hidden states at its memory tokens.
    """

    memory: _LatentField = _LatentField()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shape("memory", self.held("memory"), (self.num_slots, None))

    @property
    def kind(self) -> SpanKind:
        return "latent"

    @property
    def nbytes(self) -> int:
        return self.held("memory").nbytes


def _check_shape(name: str, tensor: Latent, expected: tuple[int | None, ...]) -> None:
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(e not in (None, s) for e, s in zip(expected, shape, strict=True)):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise SpanShapeError(f"{name} must have shape ({wanted}), got {shape}")
    if not tensor.dtype.is_floating_point:
        raise SpanShapeError(f"{name} must be a floating point tensor, got {tensor.dtype}")


@dataclass(frozen=True)
class DecoderFingerprint:
    """What makes two decoders the same to a span. `model_id` and `revision` are for people; the rest decides.

    Attributes:
        weights_digest: sha256 over names, shapes, dtypes and bytes of all parameters.
        tokenizer_digest: sha256 of the tokenizer's definition, "" for a decoder fed with ids only.
        rope: RoPE parameters of the config, as canonical JSON; "" without RoPE.
    """

    model_id: str
    revision: str
    weights_digest: str
    tokenizer_digest: str
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope: str
    dtype: str

    def differences(self, other: DecoderFingerprint) -> list[str]:
        """Names of the deciding fields in which the two differ."""
        skip = {"model_id", "revision"}
        return [f.name for f in fields(self) if f.name not in skip and getattr(self, f.name) != getattr(other, f.name)]

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.model_id}{revision} ({self.dtype}, weights {self.weights_digest[:12]})"


@dataclass(frozen=True)
class PromptLayout:
    """The ids that a compressor met around its texts and spans in training, where a chat template would not do.

    Attributes:
        context_ids: what the compressor reads before every text (BOS, in the official inference code).
        left_ids: what the decoder reads before the first span of a question's prompt; None: the layout of the question
            is that of the decoder's chat template.
        question: the text after the spans; "{question}" stands for what is asked.
        right_delimiter: name of the delimiter between question and answer, "" for none.
        right_ids: ids between question and answer.
        reconstruct_ids: what the decoder reads before a span that it is to repeat.
        end_ids: what ends an answer; () for the decoder's own.
    """

    context_ids: tuple[int, ...] = ()
    left_ids: tuple[int, ...] | None = None
    question: str = "{question}"
    right_delimiter: str = ""
    right_ids: tuple[int, ...] = ()
    reconstruct_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PromptLayout:
        """Inverse of `dataclasses.asdict`, lists as JSON gives them included."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**plain)


@dataclass(frozen=True, eq=False)
class SpanSpec:
    """What a decoder must be to read the spans, and how they are laid out in its prompt.

    Attributes:
        kind: "soft", "kv" or "latent".
        decoder: the decoder the spans were made for; for latent spans the encoder that made them, described by its
            weights, tokenizer, hidden size and dtype (the other fields are 0 or "").
        compressor: method and digest of the compressor's weights and settings, e.g. "icae-1f0c...".
        slot_positions: "consecutive" or "spread".
        delimiters: name -> (n, hidden_size) embeddings that the compressor brings along. "before" and "after"
            enclose every span; "reconstruct" asks the decoder to repeat the span's text ([AE] of ICAE);
            "continue" asks it to go on ([LM]).
        layout: the prompt that the compressor was trained with; None for the decoder's chat template. No part of the
            fingerprint: the compressor's digest covers it.
        nested: source tokens per slot at which a span may be read, ascending, where its first slots are a span
            themselves (`MemorySpan.first`); () where they are not. Covered like `layout`.
    """

    kind: SpanKind
    decoder: DecoderFingerprint
    compressor: str
    slot_positions: SlotPositions = "consecutive"
    delimiters: Mapping[str, Tensor] = field(default_factory=dict)
    layout: PromptLayout | None = None
    nested: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        frozen = {name: rows.detach() for name, rows in sorted(self.delimiters.items())}
        for name, rows in frozen.items():
            _check_shape(f"delimiter {name!r}", rows, (None, self.decoder.hidden_size))
        object.__setattr__(self, "delimiters", MappingProxyType(frozen))

    @property
    def fingerprint(self) -> str:
        """32 hex digits over everything that decides whether two spans are interchangeable."""
        digest = hashlib.sha256()
        deciding = {k: v for k, v in asdict(self.decoder).items() if k not in ("model_id", "revision")}
        digest.update(json.dumps([self.kind, self.compressor, self.slot_positions, deciding], sort_keys=True).encode())
        for name, rows in self.delimiters.items():
            digest.update(name.encode() + rows.to(torch.float32).cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the delimiter tensors, JSON-ready."""
        return {
            "kind": self.kind,
            "decoder": asdict(self.decoder),
            "compressor": self.compressor,
            "slot_positions": self.slot_positions,
            "delimiters": {name: list(rows.shape) for name, rows in self.delimiters.items()},
            "layout": asdict(self.layout) if self.layout else None,
            "nested": list(self.nested),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], delimiters: Mapping[str, Tensor]) -> SpanSpec:
        """Inverse of `to_dict`; raises SpanShapeError where a delimiter is missing or of another shape."""
        shapes = {name: tuple(rows.shape) for name, rows in delimiters.items()}
        stated = {name: tuple(shape) for name, shape in data["delimiters"].items()}
        if shapes != stated:
            raise SpanShapeError(f"the manifest names the delimiters {stated}, the tensor file holds {shapes}")
        return cls(data["kind"], DecoderFingerprint(**data["decoder"]), data["compressor"], data["slot_positions"],
                   delimiters, PromptLayout.from_dict(data["layout"]) if data.get("layout") else None,
                   tuple(data.get("nested", ())))

    def slot_counts(self, span: MemorySpan) -> dict[float, int]:
        """Factor -> slots at which a nested span of this specification may be read; {} where it is not nested.

        A span that was stored with fewer slots is read as it is. Nested slots are spread over their text, whose length
        with all that the compressor read before it is the span's.
        """
        return {f: min(span.num_slots, math.ceil(span.num_positions / f)) for f in self.nested}

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What ends an answer that is read from the spans; () for what ends the decoder's answers anyway."""
        return self.layout.end_ids if self.layout else ()

    @property
    def reader(self) -> DecoderFingerprint | None:
        """The decoder that reads the spans as they are; None for latent spans, which none does."""
        return None if self.kind == "latent" else self.decoder

    def require_reader(self) -> DecoderFingerprint:
        """The decoder that reads the spans as they are; raises IncompatibleSpanError for latent spans."""
        if self.reader is None:
            raise IncompatibleSpanError(
                f"these spans are the memory of the encoder {self.decoder} (compressor {self.compressor}), which no "
                f"decoder reads as it is; pass the compressor that converts it for your decoder, as in "
                f"CompressedRAG.open(path, compressor=FOLDER) or ctxcomp ask --compressor FOLDER"
            )
        return self.reader

    def require_decoder(self, decoder: DecoderFingerprint) -> None:
        """Raises IncompatibleSpanError unless spans of this specification can be read by `decoder`."""
        different = self.require_reader().differences(decoder)
        if different:
            raise IncompatibleSpanError(
                f"these spans were made for the decoder {self.decoder}, but this decoder is {decoder}; "
                f"they differ in {', '.join(different)}. Load the decoder the spans were made for, "
                f"or precompress the documents again for this one."
            )

    def require_compressor(self, other: SpanSpec) -> None:
        """Raises IncompatibleSpanError unless spans of `other` may stand beside spans of this specification."""
        if self.reader and other.reader:
            self.require_decoder(other.reader)
        if self.fingerprint != other.fingerprint:
            raise IncompatibleSpanError(
                f"these spans were made by the compressor {self.compressor} ({self.kind}, {self.slot_positions}), "
                f"but the new ones come from {other.compressor} ({other.kind}, {other.slot_positions}). "
                f"Use the same compressor, or create another index."
            )

    def require_span(self, span: MemorySpan) -> None:
        """Raises SpanShapeError unless the span's kind and sizes are those of this specification."""
        if span.kind != self.kind:
            raise SpanShapeError(f"expected a {self.kind} span, got the {span.kind} span {span.chunk_id!r}")
        d = self.decoder
        if isinstance(span, SoftSpan):
            _check_shape(f"embeds of {span.chunk_id!r}", span.held("embeds"), (span.num_slots, d.hidden_size))
        if isinstance(span, KVSpan):
            shape = (d.num_layers, d.num_kv_heads, span.num_slots, d.head_dim)
            _check_shape(f"keys of {span.chunk_id!r}", span.held("keys"), shape)
            _check_shape(f"values of {span.chunk_id!r}", span.held("values"), shape)
        if isinstance(span, LatentSpan):
            _check_shape(f"memory of {span.chunk_id!r}", span.held("memory"), (span.num_slots, d.hidden_size))
