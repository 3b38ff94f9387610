"""Parts to decoder inputs. Positions are decided here, once.

    [text][soft span][text][KV span][text]  ->  runs:  embedded rows | cached keys and values | embedded rows
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.codes import Latent, decoded, write
from ctxcomp_rag.decoding.prompt import Blended, Delimiter, Part, Text, TokenIds, text_ids
from ctxcomp_rag.errors import IncompatibleSpanError, InputError, PromptTooLongError
from ctxcomp_rag.rope import Rotation, require_full_attention
from ctxcomp_rag.spans import KVSpan, SoftSpan


@dataclass(frozen=True, eq=False)
class EmbeddedRun:
    """Rows that go through the decoder: embeds (n, hidden_size) at positions (n,)."""

    embeds: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class CachedRun:
    """Entries that go straight to the cache.

    Attributes:
        keys, values: (num_layers, num_kv_heads, n, head_dim), as they are stored: in any dtype, or in codes.
        rotation: moves the keys to where they stand; None where they stand there.
    """

    keys: Latent
    values: Latent
    rotation: Rotation | None = None

    @property
    def num_entries(self) -> int:
        return int(self.keys.shape[2])

    def layer(self, number: int, backbone: Backbone) -> tuple[Tensor, Tensor]:
        """Keys, where they stand, and values of one layer of the decoder: (num_kv_heads, n, head_dim)."""
        keys, values = (decoded(latent[number]).to(backbone.device, backbone.dtype)
                        for latent in (self.keys, self.values))  # first: keys of fewer bits are not rounded twice
        return (self.rotation(keys) if self.rotation is not None else keys), values


@dataclass(frozen=True, eq=False)
class BlendedRun:
    """Cached entries of which some are computed anew (see `decoding.blend`).

    Attributes:
        cached: the entries as they are stored, in place.
        fresh: the rows they are computed from, at the same positions.
        num_fresh: how many are computed anew.
    """

    cached: CachedRun
    fresh: EmbeddedRun
    num_fresh: int


Run: TypeAlias = EmbeddedRun | CachedRun | BlendedRun


@dataclass(frozen=True)
class PromptUsage:
    """What a prompt is made of: text tokens, slots, and the source tokens that the slots stand for.

    Attributes:
        cached: those of the slots that enter as keys and values, so that no layer computes them.
    """

    text_tokens: int = 0
    slots: int = 0
    source_tokens: int = 0
    cached: int = 0

    @property
    def positions(self) -> int:
        """Entries that the prompt takes in the decoder's cache."""
        return self.text_tokens + self.slots


@dataclass(frozen=True, eq=False)
class SplicedPrompt:
    """Decoder inputs of one prompt.

    Attributes:
        next_position: where the first generated token stands.
        head: ids of the text before the first span, the first rows of the first run; () where there is no span.
    """

    runs: tuple[Run, ...]
    next_position: int
    usage: PromptUsage
    head: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Cache entries."""
        return sum(_entries(run) for run in self.runs)


def _entries(run: Run) -> int:
    if isinstance(run, BlendedRun):
        run = run.cached
    return run.embeds.shape[0] if isinstance(run, EmbeddedRun) else run.num_entries


@dataclass(frozen=True, eq=False)
class TextPiece:
    """Consecutive text of a prompt as token ids."""

    ids: list[int]

    @property
    def num_positions(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class RowsPiece:
    """Soft slots or delimiters: embeds (n, hidden_size) at `positions` (n,) from the piece's start."""

    embeds: Latent
    positions: Tensor
    num_positions: int


@dataclass(frozen=True, eq=False)
class EntriesPiece:
    """A KV span; for a blended one the rows (num_slots, hidden_size) or the token ids of its slots, and how many of
    them are computed anew."""

    span: KVSpan
    source: Tensor | list[int] | None = None
    num_fresh: int = 0

    @property
    def num_positions(self) -> int:
        return self.span.num_positions


Piece: TypeAlias = TextPiece | RowsPiece | EntriesPiece


@dataclass(frozen=True, eq=False)
class Layout:
    """A prompt checked and measured, before anything is embedded or moved."""

    pieces: tuple[Piece, ...]
    usage: PromptUsage

    @property
    def num_positions(self) -> int:
        return sum(p.num_positions for p in self.pieces)


def lay_out(parts: Sequence[Part], backbone: Backbone) -> Layout:
    """Parts as pieces, each checked against the decoder; raises what `splice` raises, but for the window."""
    layout = _Layout(backbone)
    for part in [parts] if isinstance(parts, str) else parts:
        layout.add(part)
    return layout.finish()


def splice(parts: Sequence[Part], backbone: Backbone) -> SplicedPrompt:
    """Lay parts out one after the other.

    Text takes one position a token. A span takes `num_positions`: its slots stand at their `positions` from the
    span's start, and the keys of a KV span are rotated there.

    Raises:
        InputError: the prompt is empty, ends with a KV span (nothing is left to compute the next token from),
            or does not fit into the decoder's window; or a span cannot be blended.
        IncompatibleSpanError: a span has other sizes than the decoder.
        UnsupportedModelError: a KV span would have to be moved on an architecture whose keys cannot be moved.
    """
    return place(lay_out(parts, backbone), backbone)


def place(layout: Layout, backbone: Backbone) -> SplicedPrompt:
    """A layout embedded and moved to its positions; raises PromptTooLongError where the decoder's window ends first."""
    window = backbone.max_positions
    if layout.num_positions >= window:
        raise PromptTooLongError(
            f"the prompt needs {layout.num_positions} positions, but the decoder {backbone.model_id!r} was made for "
            f"{window}. Retrieve fewer chunks (--top-k), compress more, or let the cache forget (--cache-budget)")
    builder = _Builder(backbone)
    for piece in layout.pieces:
        builder.add(piece)
    first = layout.pieces[0]
    head = tuple(first.ids) if isinstance(first, TextPiece) and len(layout.pieces) > 1 else ()
    return SplicedPrompt(builder.finish(), layout.num_positions, layout.usage, head)


class _Layout:
    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.pieces: list[Piece] = []
        self.ids: list[int] = []
        self.text_tokens = self.slots = self.source_tokens = self.cached = 0

    def add(self, part: Part) -> None:
        if isinstance(part, str | Text | TokenIds):
            self.ids += text_ids(part, self.backbone.tokenizer) if not isinstance(part, TokenIds) else part.ids
            return
        self._flush_text()
        if isinstance(part, Delimiter):
            self._rows(part.embeds, torch.arange(part.embeds.shape[0]), part.embeds.shape[0], "a delimiter")
            self.text_tokens += part.embeds.shape[0]
            return
        span = part.span if isinstance(part, Blended) else part
        if isinstance(part, SoftSpan):
            self._rows(part.held("embeds"), part.positions, part.num_positions, f"span {part.chunk_id!r}")
        elif isinstance(part, Blended):
            self._check_entries(part.span)
            fresh = math.ceil(part.fraction * part.span.num_slots)
            self.pieces.append(EntriesPiece(part.span, slot_source(part, self.backbone), fresh))
            self.cached += part.span.num_slots - fresh
        elif isinstance(part, KVSpan):
            self._check_entries(part)
            self.pieces.append(EntriesPiece(part))
            self.cached += part.num_slots
        else:
            raise InputError(f"a prompt is made of text and spans, got {type(part).__name__}")
        self.slots += span.num_slots
        self.source_tokens += span.num_source_tokens

    def _flush_text(self) -> None:
        if self.ids:
            self.pieces.append(TextPiece(self.ids))
            self.text_tokens += len(self.ids)
            self.ids = []

    def _rows(self, embeds: Latent, positions: Tensor, num_positions: int, what: str) -> None:
        if embeds.shape[1] != self.backbone.hidden_size:
            raise IncompatibleSpanError(f"{what} has rows of size {embeds.shape[1]}, the decoder "
                                        f"{self.backbone.model_id!r} reads rows of size {self.backbone.hidden_size}")
        self.pieces.append(RowsPiece(embeds, positions, num_positions))

    def _check_entries(self, span: KVSpan) -> None:
        b = self.backbone
        expected = (int(b.config.num_hidden_layers), b.num_kv_heads, span.num_slots, b.head_dim)
        for name in ("keys", "values"):
            shape = tuple(span.held(name).shape)
            if shape != expected:
                raise IncompatibleSpanError(f"span {span.chunk_id!r} holds {name} of shape {shape}, the decoder "
                                            f"{b.model_id!r} reads {expected} (layers, kv heads, slots, head size)")
        require_full_attention(b.config)

    def finish(self) -> Layout:
        self._flush_text()
        if not self.pieces or isinstance(self.pieces[-1], EntriesPiece):
            raise InputError("a prompt must end with text or a soft span: there is nothing to compute the next token "
                             "from. Put the question after the spans")
        return Layout(tuple(self.pieces), PromptUsage(self.text_tokens, self.slots, self.source_tokens,
                                                      self.cached))


def slot_source(part: Blended, backbone: Backbone) -> Tensor | list[int]:
    """What the slots of a span are computed from, rows (num_slots, hidden_size) or token ids.

    Raises InputError where a slot is not one row, or one token in all layers and heads.
    """
    span, name = part.span, f"span {part.span.chunk_id!r}"
    source = part.source
    if isinstance(source, Tensor):
        if tuple(source.shape) != (span.num_slots, backbone.hidden_size):
            raise InputError(f"{name} has {span.num_slots} slots, so it is blended from rows of shape "
                             f"{(span.num_slots, backbone.hidden_size)}, got {tuple(source.shape)}; pass those that it "
                             "was rolled from")
        return source
    ids = list(source.ids) if isinstance(source, TokenIds) else text_ids(source, backbone.tokenizer)
    if len(ids) != span.num_source_tokens:
        raise InputError(f"{name} was made from {span.num_source_tokens} tokens, the source given to blend it has "
                         f"{len(ids)}; pass the text of its chunk")
    if span.kept is None and span.num_slots == span.num_source_tokens:
        return ids
    if span.kept is None or bool((span.kept != span.kept[:1, :1]).any()):
        raise InputError(f"{name} cannot be blended: its slots hold different tokens in different heads, and a token "
                         "has one position only when it is computed anew. Keep every token (a factor of 1), or choose "
                         "with a rule on which the heads agree (nuc, streaming_llm)")
    return [ids[i] for i in span.kept[0, 0].tolist()]


class _Builder:
    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.device, self.dtype = backbone.device, backbone.dtype  # asking the model walks through its parameters
        self.runs: list[Run] = []
        self.rows: list[Latent] = []
        self.places: list[Tensor] = []
        self.next_position = 0

    def add(self, piece: Piece) -> None:
        if isinstance(piece, EntriesPiece):
            self._cached(piece)
        elif isinstance(piece, RowsPiece):
            self.rows.append(piece.embeds)
            self.places.append(piece.positions + self.next_position)
        else:
            self.rows.append(self.backbone.embed(torch.tensor(piece.ids)))
            self.places.append(torch.arange(len(piece.ids)) + self.next_position)
        self.next_position += piece.num_positions

    def _cached(self, piece: EntriesPiece) -> None:
        b, span = self.backbone, piece.span
        self._close_run()
        rotation = (Rotation.by(self.next_position, span.num_slots, b.rope, self.device) if self.next_position
                    else None)
        run = CachedRun(span.held("keys"), span.held("values"), rotation)
        # nothing before it, nothing to blend with: the span is already what it would become
        if piece.source is None or not piece.num_fresh or not self.runs:
            self.runs.append(run)
            return
        rows = b.embed(torch.tensor(piece.source)) if isinstance(piece.source, list) else piece.source
        positions = (span.positions + self.next_position).to(self.device)
        self.runs.append(BlendedRun(run, EmbeddedRun(rows.to(self.device, self.dtype), positions), piece.num_fresh))

    def _close_run(self) -> None:
        if self.rows:
            places = torch.cat(self.places).to(self.device)
            embeds = torch.empty(len(places), self.backbone.hidden_size, dtype=self.dtype, device=self.device)
            write(self.rows, embeds)
            self.runs.append(EmbeddedRun(embeds, places))
            self.rows, self.places = [], []

    def finish(self) -> tuple[Run, ...]:
        self._close_run()
        return tuple(self.runs)
