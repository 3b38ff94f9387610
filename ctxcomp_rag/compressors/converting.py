"""The half of PCC that belongs to a decoder: from the encoder's memory to spans, without the encoder.

`Converting` is what a whole PCC compressor and a `PCCReader` have in common. A reader is opened from the folder of a
saved compressor and loads the converter and the three special rows only, so that an index of latent spans is read at
the cost of a few matrices, however large the encoder is.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors.base import (
    Compressor,
    checked_factor,
    deciding,
    layout_of,
    read_config,
    require_same_decoder,
)
from ctxcomp_rag.compressors.places import spread_places
from ctxcomp_rag.errors import IncompatibleSpanError, InputError, ModelLoadError
from ctxcomp_rag.spans import (
    DecoderFingerprint,
    LatentSpan,
    MemorySpan,
    PromptLayout,
    SlotPositions,
    SoftSpan,
    SpanSpec,
)

BRACKETS = ("before", "reconstruct", "after")
"""Rows of the special table, in the official order: <mem>, <ae>, </mem>."""

CONVERTER_FILE = "converter.safetensors"


@dataclass(frozen=True)
class Segment:
    """A piece of a text that the encoder reads alone.

    Attributes:
        num_tokens: encoder tokens.
        places: positions of its slots, from its first token (spread) or its first slot (consecutive).
        num_positions: positions it occupies in the decoder.
    """

    num_tokens: int
    places: tuple[int, ...]
    num_positions: int


@dataclass(frozen=True)
class PCCConfig:
    """Settings of a PCC compressor; the defaults are those of the official code.

    Attributes:
        segment_tokens: encoder tokens of a segment; the last one of a text may be shorter.
        slots_per_segment: memory tokens read after a whole segment.
        slot_positions: "consecutive" gives every segment `slots_per_segment` slots, however short it is, and numbers
            them on after the text (official); "spread" gives it ceil(length / factor), any factor >= 1, each on the
            last token of the piece of text it stands for, in the encoder and in the decoder.
        padding: what the shorter texts of one `encode` call are given. "masked" hides padding, so that a text gives
            the same slots in every company; "attended" pads the texts to one length and lets the encoder read the
            padding, as the official training does. `compress` gives no padding to read in either case.
        encoder: where the encoder came from; with LoRA, where its base is loaded from.
        layout: the prompt it was trained with; None for the decoder's chat template. Its `context_ids`, ids of the
            encoder, are read before every text that `compress` is given (not before the ids of a training sample).
    """

    segment_tokens: int = 256
    slots_per_segment: int = 64
    padding: Literal["masked", "attended"] = "masked"
    encoder: str = ""
    layout: PromptLayout | None = None
    slot_positions: SlotPositions = "consecutive"

    @property
    def context_ids(self) -> tuple[int, ...]:
        """Ids of the encoder that `compress` reads before every text."""
        return self.layout.context_ids if self.layout else ()

    def segment_lengths(self, num_tokens: int) -> list[int]:
        """Lengths of the segments that a text is cut into."""
        return [min(self.segment_tokens, num_tokens - begin) for begin in range(0, num_tokens, self.segment_tokens)]

    def segments(self, num_tokens: int, factor: float) -> list[Segment]:
        """The segments of a text of so many tokens, with their slots."""
        lengths = self.segment_lengths(num_tokens)
        if self.slot_positions == "consecutive":
            return [Segment(n, tuple(range(self.slots_per_segment)), self.slots_per_segment) for n in lengths]
        return [Segment(n, tuple(spread_places(n, math.ceil(n / factor))), n) for n in lengths]


class Converter(nn.Module):
    """From the encoder's hidden states to rows of the decoder's embedding space."""

    def __init__(self, encoder_size: int, decoder_size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(encoder_size, eps=1e-6)
        self.dense_in = nn.Linear(encoder_size, decoder_size)
        self.dense_out = nn.Linear(decoder_size, decoder_size)

    def forward(self, hidden: Tensor) -> Tensor:
        rows: Tensor = self.dense_out(nn.functional.gelu(self.dense_in(self.norm(hidden))))
        return rows


class Converting(Compressor):
    """Reads latent spans: settings, converter and special rows (3, hidden_size) of <mem>, <ae>, </mem>."""

    config: PCCConfig
    converter: Converter
    special_rows: Tensor

    @property
    @abstractmethod
    def memory_spec(self) -> SpanSpec:
        """Specification of the memory that is converted: encoder, segments and slots, and no decoder."""

    def soft_spec(self) -> SpanSpec:
        """Specification of the spans of this decoder; hashes the converter."""
        rows = self.special_rows.detach().to(self.backbone.dtype)
        delimiters = {name: rows[i : i + 1].clone() for i, name in enumerate(BRACKETS)}
        return SpanSpec("soft", self.backbone.fingerprint, f"{self.name}-{self.digest()[:16]}",
                        self.config.slot_positions, delimiters, self.config.layout)

    def digest(self) -> str:
        """sha256 over settings and weights."""
        settings = {k: v for k, v in deciding(self.config).items() if k != "encoder"}  # a place, not a weight
        encoder = self.memory_spec.decoder
        digest = hashlib.sha256(json.dumps([settings, encoder.weights_digest, encoder.tokenizer_digest],
                                           sort_keys=True).encode())
        for name, tensor in sorted([*self.converter.state_dict().items(), ("special_rows", self.special_rows)]):
            digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def max_chunk_tokens(self) -> int:
        return self.config.segment_tokens - len(self.config.context_ids)

    @property
    def compression_factor(self) -> float:
        return self.config.segment_tokens / self.config.slots_per_segment

    def num_slots(self, num_tokens: int, compression_factor: float | None = None) -> int:
        """Slots of the span of a text of so many tokens: those of its segments, and the brackets between them.

        Segments are cut by the encoder's tokenizer, so for a number of decoder tokens this is an estimate; see
        `chunk_slots`. Raises InputError for a factor that the compressor cannot make.
        """
        segments = self.config.segments(num_tokens + len(self.config.context_ids), self.factor(compression_factor))
        return sum(len(s.places) for s in segments) + 2 * max(0, len(segments) - 1)

    def factor(self, compression_factor: float | None) -> float:
        """The factor asked for, or the compressor's own; raises InputError for one that it cannot make."""
        if compression_factor in (None, self.compression_factor):
            return self.compression_factor
        if self.config.slot_positions == "consecutive":
            raise InputError(f"this compressor makes {self.config.slots_per_segment} slots of every segment of "
                             f"{self.config.segment_tokens} tokens ({self.compression_factor:g}x); it cannot make "
                             f"{compression_factor:g}x")
        assert compression_factor is not None
        return checked_factor(compression_factor)

    def convert(self, memory: Tensor) -> Tensor:
        """Slots (num_slots, hidden_size) of this decoder from hidden states (num_slots, encoder size); differentiable.
        """
        slots: Tensor = self.converter(memory.to(self.special_rows.device, torch.float32))
        return slots

    def bracketed(self, slots: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor, int]:
        """Slots (num_slots, hidden_size) of some segments as rows of a span, with brackets between the segments.

        Returns:
            (rows (n, hidden_size), their positions (n,) from the span's start, positions the whole span occupies).
        """
        opening, _, closing = self.special_rows.to(slots.dtype)
        rows: list[Tensor] = []
        positions: list[int] = []
        base = 0
        for segment, own in zip(segments, torch.split(slots, [len(s.places) for s in segments]), strict=True):
            if rows:
                rows += [closing[None], opening[None]]
                positions += [base, base + 1]
                base += 2
            rows.append(own)
            positions += [base + p for p in segment.places]
            base += segment.num_positions
        return torch.cat(rows), torch.tensor(positions), base

    def convert_span(self, span: LatentSpan, chunk: Chunk) -> SoftSpan:
        """The span of this decoder that the encoder's memory of a chunk stands for."""
        with torch.inference_mode():
            embeds, positions, occupied = self.bracketed(self.convert(span.memory), self._segments(span))
        length = len(self.backbone.tokenizer.encode(chunk.text))
        return SoftSpan(chunk.id, length, positions, occupied, embeds.to(self.backbone.dtype, copy=True))

    def _segments(self, span: LatentSpan) -> list[Segment]:
        """The segments that a latent span was made of; the factor it was made with shows in its positions."""
        segments = self.config.segments(span.num_source_tokens + len(self.config.context_ids), self.compression_factor)
        if self.config.slot_positions == "consecutive":
            return segments
        ends = accumulate(s.num_positions for s in segments)
        return [replace(s, places=tuple(int(p) - end + s.num_positions for p in span.positions
                                        if end - s.num_positions <= p < end))
                for s, end in zip(segments, ends, strict=True)]

    def read(self, span: MemorySpan, chunk: Chunk) -> MemorySpan:
        """The span that `compress` would make of the chunk, from the encoder's memory of it."""
        return self.convert_span(span, chunk) if isinstance(span, LatentSpan) else span

    def reading(self, stored: SpanSpec) -> SpanSpec:
        if stored.reader:
            return super().reading(stored)
        mine = self.memory_spec
        if stored.fingerprint != mine.fingerprint:
            different = ", ".join(stored.decoder.differences(mine.decoder)) or (
                "segment_tokens, slots_per_segment or slot_positions")
            raise IncompatibleSpanError(
                f"these spans are the memory of the encoder {stored.decoder} ({stored.compressor}), but this "
                f"compressor converts that of {mine.decoder} ({mine.compressor}); they differ in {different}. Use a "
                f"compressor with the encoder that made the spans, or precompress the documents again"
            )
        return self.spec


class PCCReader(Converting):
    """A saved PCC compressor without its encoder: it reads what the encoder remembered, and compresses nothing."""

    name: ClassVar[str] = "pcc"

    def __init__(self, backbone: Backbone, config: PCCConfig, converter: Converter, special_rows: Tensor,
                 memory_spec: SpanSpec) -> None:
        self.backbone, self.config = backbone, config
        self.converter = converter.to(backbone.device).requires_grad_(False)
        self.special_rows = special_rows.to(backbone.device, torch.float32)
        self._memory_spec = memory_spec
        self._spec = self.soft_spec()

    @property
    def spec(self) -> SpanSpec:
        return self._spec

    @property
    def memory_spec(self) -> SpanSpec:
        return self._memory_spec

    def compress(self, chunks: Sequence[Chunk], *, compression_factor: float | None = None) -> list[SoftSpan]:  # type: ignore[override]
        raise InputError("this compressor was opened without its encoder, for reading; load it with load_compressor "
                         "to compress documents")

    def writer(self, stored: SpanSpec) -> Compressor:
        return self

    def save_pretrained(self, path: str | Path) -> None:
        raise InputError("this compressor was opened without its encoder, for reading; copy the folder it came from")

    @classmethod
    def from_pretrained(cls, path: str | Path, backbone: Backbone) -> Self:
        folder = Path(path)
        config, memory_spec = read_settings(folder, backbone)
        converter, special_rows = load_converter(folder, memory_spec.decoder.hidden_size, backbone.hidden_size)
        return cls(backbone, config, converter, special_rows, memory_spec)


def read_settings(folder: Path, backbone: Backbone) -> tuple[PCCConfig, SpanSpec]:
    """(settings, specification of the encoder's memory) of a saved compressor.

    Raises:
        IncompatibleSpanError: it was trained for another decoder.
        ModelLoadError: not the settings of a PCC compressor.
    """
    settings = read_config(folder)
    try:
        trained_for = DecoderFingerprint(**settings.pop("decoder"))
        memory_spec = SpanSpec.from_dict(settings.pop("memory"), {})
        settings.pop("method")
        config = PCCConfig(**{**settings, "layout": layout_of(settings)})
    except (KeyError, TypeError) as error:
        raise ModelLoadError(f"the settings of the compressor in {str(folder)!r} are not those of pcc: {error}; save "
                             "the compressor again") from error
    require_same_decoder(folder, trained_for, backbone.fingerprint)
    return config, memory_spec


def load_converter(folder: Path, encoder_size: int, decoder_size: int) -> tuple[Converter, Tensor]:
    """(converter, special rows) of a saved compressor; raises ModelLoadError where they are missing or damaged."""
    converter = Converter(encoder_size, decoder_size)
    try:
        tensors = load_file(folder / CONVERTER_FILE)
        special_rows = tensors.pop("special_rows")
        converter.load_state_dict(tensors)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(f"the compressor in {str(folder)!r} cannot be loaded: {error}") from error
    return converter, special_rows
