"""A cache of fixed size for prompts and answers of any length: read until it is full, distil, go on (InfiniPot online).

The same continual context distillation that makes KV spans offline (`kv/pot.py`), on a prompt of text, soft spans and
KV spans. Text is read token by token as the paper says; slots of spans have no novelty and are kept for what the
catalyst attends to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.codes import decoded
from ctxcomp_rag.decoding.splice import EntriesPiece, Layout, RowsPiece, TextPiece
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.kv.attention import require_observable
from ctxcomp_rag.kv.catalyst import GENERIC_CATALYST, catalyst, question_catalyst
from ctxcomp_rag.kv.pot import ContextPot
from ctxcomp_rag.kv.scores import InfiniPot, ScoringRule
from ctxcomp_rag.rope import require_full_attention, rotate_keys

_STEP_TOKENS = 512


class CacheBudget:
    """A bound on the cache entries, and on the positions, of one prompt with its answer.

    Args:
        size: |M|, the entries that the cache may ever hold, the catalyst prompt's included.
        rule: what to keep.

    Raises:
        UnsupportedModelError: the decoder does not keep all keys, its keys cannot be moved, or its attention cannot be
            observed; the message says why.
        InputError: the size is larger than the decoder's window, or too small for the catalyst.
    """

    def __init__(self, backbone: Backbone, size: int, rule: ScoringRule | None = None) -> None:
        require_full_attention(backbone.config)
        window = backbone.max_positions
        if size > window:
            raise InputError(f"the cache budget of {size} entries is larger than the window of {backbone.model_id!r}, "
                             f"{window} positions; choose at most {window}")
        self.backbone, self.size, self.rule = backbone, size, rule or InfiniPot()
        self._rope = backbone.rope
        # other modules over the same tensors, one user at a time: hooks must not fire for anybody else
        self._model = backbone.second_tree()
        self._lock = threading.Lock()
        require_observable(self._model)
        self.pot(None)

    def holds(self, num_positions: int) -> bool:
        """Whether so many positions fit without forgetting anything."""
        return num_positions <= self.size

    def pot(self, question: str | None) -> ContextPot:
        """An empty pot whose catalyst asks `question`, or what matters in general."""
        tokenizer = self.backbone.tokenizer
        prompt = question_catalyst(tokenizer, question) if question is not None else catalyst(tokenizer,
                                                                                              GENERIC_CATALYST)
        if self.size - prompt.length < 2:
            raise InputError(f"the catalyst prompt takes {prompt.length} of the {self.size} entries of the cache "
                             "budget, which leaves no room for text; raise the budget"
                             + (" or shorten the question" if question is not None else ""))
        # The paper's inputs end with the question, after the last distillation. Here one may fall into the question
        # or into the answer, which must not lose their thread: an eighth of what is kept is what was read last.
        return ContextPot(self._model, self._rope, self.rule, catalyst=prompt, step_tokens=_STEP_TOKENS,
                          recent=min(self.size // 2, (self.size - prompt.length) // 2) // 8)


class BoundedPrompt:
    """A prompt that does not fit into a budget, read piece by piece.

    Raises:
        InputError: a span is to be blended, which needs the exact entries before it; or as `CacheBudget.pot`.
    """

    def __init__(self, layout: Layout, budget: CacheBudget, question: str | None = None) -> None:
        if any(isinstance(p, EntriesPiece) and p.num_fresh for p in layout.pieces):
            raise InputError(f"a prompt with blended spans takes {layout.num_positions} positions, the cache budget is "
                             f"{budget.size}: spans cannot be blended with entries that are forgotten. Use fraction 0, "
                             "fewer spans, or a larger budget")
        self.layout, self.budget, self.question = layout, budget, question
        self.usage = layout.usage
        self._pot = budget.pot(question)
        self.room = budget.size - self._pot.catalyst.length
        self.keep = min(budget.size // 2, self.room // 2)

    @property
    def logits(self) -> Tensor:
        """Logits (vocab_size,) of the next token."""
        assert self._pot.foretold is not None
        return self._pot.foretold

    def prefill(self, each: Callable[[Tensor], None] | None = None) -> None:
        """Read the prompt from its beginning; `each` is called with the logits of the rows as they are read."""
        self._pot = self.budget.pot(self.question)
        for piece in self.layout.pieces:
            if isinstance(piece, TextPiece):
                begin = 0
                while begin < len(piece.ids):
                    end = min(begin + self._space(), begin + _STEP_TOKENS, len(piece.ids))
                    with self.budget._lock:
                        self._pot.read(piece.ids[begin:end], each)
                    begin = end
            else:
                self._read_slots(piece, each)

    def feed(self, token: int) -> None:
        """Append a generated token."""
        self._space()
        with self.budget._lock:
            self._pot.read([token])

    def _space(self) -> int:
        """Positions that are free; where there are none, the pot is distilled first."""
        if self._pot.next_position >= self.room:
            self._distil()
        return self.room - self._pot.next_position

    def _distil(self) -> None:
        with self.budget._lock:
            self._pot.distil(min(self.keep, self._pot.size))

    def _read_slots(self, piece: RowsPiece | EntriesPiece, each: Callable[[Tensor], None] | None) -> None:
        if isinstance(piece, RowsPiece):
            piece = replace(piece, embeds=decoded(piece.embeds))  # once, not at every step
        positions = piece.span.positions if isinstance(piece, EntriesPiece) else piece.positions
        n, begin, start = positions.numel(), 0, 0
        while begin < n:
            space = self._space()
            end = begin + int((positions[begin : begin + _STEP_TOKENS] - start < space).sum())
            if end == begin:  # the gap before the next slot is wider than what is free; distilling closes gaps
                self._distil()
                start = int(positions[begin])
                continue
            after = piece.num_positions if end == n else int(positions[end - 1]) + 1
            self._read_some(piece, slice(begin, end), positions[begin:end] - start, min(after - start, space), each)
            begin, start = end, after

    def _read_some(self, piece: RowsPiece | EntriesPiece, rows: slice, offsets: Tensor, num_positions: int,
                   each: Callable[[Tensor], None] | None) -> None:
        b = self.budget.backbone
        with self.budget._lock:
            if isinstance(piece, RowsPiece):
                logits = self._pot.read_rows(decoded(piece.embeds)[rows].to(b.device, b.dtype), offsets, num_positions)
                if each:
                    each(logits)
                return
            keys = piece.span.keys[:, :, rows].to(b.device, b.dtype)
            # rotated for their places in the span; the pot moves them on by its next position
            keys = rotate_keys(keys, offsets - piece.span.positions[rows], b.rope)
            self._pot.append(keys, piece.span.values[:, :, rows].to(b.device, b.dtype), offsets, num_positions)


__all__ = ["BoundedPrompt", "CacheBudget"]
