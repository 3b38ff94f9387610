"""Parts to decoder inputs. Positions are decided here, once.

    [text][soft span][text][KV span][text]  ->  runs:  embedded rows | cached keys and values | embedded rows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding.prompt import Delimiter, Part, Text, TokenIds, text_ids
from ctxcomp_rag.errors import IncompatibleSpanError, InputError
from ctxcomp_rag.rope import require_full_attention, rotate_keys
from ctxcomp_rag.spans import KVSpan, SoftSpan


@dataclass(frozen=True, eq=False)
class EmbeddedRun:
    """Rows that go through the decoder: embeds (n, hidden_size) at positions (n,)."""

    embeds: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class CachedRun:
    """Entries that go straight to the cache: keys, values (num_layers, num_kv_heads, n, head_dim), in place."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class PromptUsage:
    """What a prompt is made of: text tokens, slots, and the source tokens that the slots stand for."""

    text_tokens: int = 0
    slots: int = 0
    source_tokens: int = 0

    @property
    def positions(self) -> int:
        """Entries that the prompt takes in the decoder's cache."""
        return self.text_tokens + self.slots


@dataclass(frozen=True, eq=False)
class SplicedPrompt:
    """Decoder inputs of one prompt; `next_position` is where the first generated token stands."""

    runs: tuple[EmbeddedRun | CachedRun, ...]
    next_position: int
    usage: PromptUsage

    @property
    def length(self) -> int:
        """Cache entries."""
        return sum(r.embeds.shape[0] if isinstance(r, EmbeddedRun) else r.keys.shape[2] for r in self.runs)


def splice(parts: Sequence[Part], backbone: Backbone) -> SplicedPrompt:
    """Lay parts out one after the other.

    Text takes one position a token. A span takes `num_positions`: its slots stand at their `positions` from the
    span's start, and the keys of a KV span are rotated there.

    Raises:
        InputError: the prompt is empty, ends with a KV span (nothing is left to compute the next token from),
            or does not fit into the decoder's window.
        IncompatibleSpanError: a span has other sizes than the decoder.
        UnsupportedModelError: a KV span would have to be moved on an architecture whose keys cannot be moved.
    """
    builder = _Builder(backbone)
    for part in [parts] if isinstance(parts, str) else parts:
        builder.add(part)
    return builder.finish()


class _Builder:
    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.runs: list[EmbeddedRun | CachedRun] = []
        self.rows: list[Tensor] = []
        self.places: list[Tensor] = []
        self.ids: list[int] = []
        self.next_position = 0
        self.text_tokens = self.slots = self.source_tokens = 0

    def add(self, part: Part) -> None:
        if isinstance(part, str | Text | TokenIds):
            self.ids += text_ids(part, self.backbone.tokenizer) if not isinstance(part, TokenIds) else part.ids
            return
        self._flush_text()
        if isinstance(part, Delimiter):
            self._embedded(part.embeds, torch.arange(part.embeds.shape[0]), part.embeds.shape[0], "a delimiter")
            self.text_tokens += part.embeds.shape[0]
            return
        if isinstance(part, SoftSpan):
            self._embedded(part.embeds, part.positions, part.num_positions, f"span {part.chunk_id!r}")
        elif isinstance(part, KVSpan):
            self._cached(part)
        else:
            raise InputError(f"a prompt is made of text and spans, got {type(part).__name__}")
        self.slots += part.num_slots
        self.source_tokens += part.num_source_tokens

    def _flush_text(self) -> None:
        if not self.ids:
            return
        ids, self.ids = self.ids, []
        self.text_tokens += len(ids)
        self._embedded(self.backbone.embed(torch.tensor(ids)), torch.arange(len(ids)), len(ids), "text")

    def _embedded(self, embeds: Tensor, positions: Tensor, num_positions: int, what: str) -> None:
        if embeds.shape[1] != self.backbone.hidden_size:
            raise IncompatibleSpanError(f"{what} has rows of size {embeds.shape[1]}, the decoder "
                                        f"{self.backbone.model_id!r} reads rows of size {self.backbone.hidden_size}")
        self.rows.append(embeds.to(self.backbone.device, self.backbone.dtype))
        self.places.append(positions + self.next_position)
        self.next_position += num_positions

    def _cached(self, span: KVSpan) -> None:
        b = self.backbone
        expected = (int(b.config.num_hidden_layers), b.num_kv_heads, span.num_slots, b.head_dim)
        if tuple(span.keys.shape) != expected:
            raise IncompatibleSpanError(f"span {span.chunk_id!r} holds keys of shape {tuple(span.keys.shape)}, the "
                                        f"decoder {b.model_id!r} reads {expected} (layers, kv heads, slots, head size)")
        require_full_attention(b.config)
        self._close_run()
        keys = span.keys.to(b.device, b.dtype)  # first: keys stored in less are not rounded a second time
        if self.next_position:
            keys = rotate_keys(keys, self.next_position, b.rope)
        self.runs.append(CachedRun(keys, span.values.to(b.device, b.dtype)))
        self.next_position += span.num_positions

    def _close_run(self) -> None:
        if self.rows:
            self.runs.append(EmbeddedRun(torch.cat(self.rows), torch.cat(self.places).to(self.backbone.device)))
            self.rows, self.places = [], []

    def finish(self) -> SplicedPrompt:
        self._flush_text()
        self._close_run()
        if not self.runs or isinstance(self.runs[-1], CachedRun):
            raise InputError("a prompt must end with text or a soft span: there is nothing to compute the next token "
                             "from. Put the question after the spans")
        window = self.backbone.max_positions
        if self.next_position >= window:
            raise InputError(f"the prompt needs {self.next_position} positions, but the decoder "
                             f"{self.backbone.model_id!r} was made for {window}. Retrieve fewer chunks (--top-k), "
                             "or compress more")
        return SplicedPrompt(tuple(self.runs), self.next_position,
                             PromptUsage(self.text_tokens, self.slots, self.source_tokens))
