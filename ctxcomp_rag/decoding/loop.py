"""The decode loop: rows join after their prefill, every round picks one token a row, finished rows leave."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding.batching import DecodingState, merge, prefill, step
from ctxcomp_rag.decoding.budget import BoundedPrompt
from ctxcomp_rag.decoding.generation import Generation, Progress, Sampler
from ctxcomp_rag.decoding.prefix import PrefixCache
from ctxcomp_rag.decoding.splice import SplicedPrompt


@dataclass(eq=False)
class Request:
    """One prompt on its way to an answer. A bounded prompt has a cache of its own; the others share one."""

    prompt: SplicedPrompt | BoundedPrompt
    progress: Progress
    sampler: Sampler
    error: Exception | None = None

    @property
    def generation(self) -> Generation:
        """The finished answer; raises what went wrong in this row."""
        if self.error is not None:
            raise self.error
        done = self.progress
        assert done.finish_reason is not None
        return Generation(done.text, tuple(done.token_ids), done.finish_reason, self.prompt.usage, done.num_generated)


class DecodingLoop:
    """Rows that decode together. Not thread-safe: one thread owns a loop.

    Args:
        prefixes: what prompts of this decoder begin with, shared by its loops.
    """

    def __init__(self, backbone: Backbone, prefixes: PrefixCache | None = None) -> None:
        self.backbone, self.prefixes = backbone, prefixes
        self._together: list[Request] = []  # row i of the state
        self._state: DecodingState | None = None
        self._alone: list[tuple[Request, BoundedPrompt]] = []
        self._owed = False  # the tokens picked last are not fed yet: an answer that ends costs no step

    @property
    def rows(self) -> list[Request]:
        """The requests that are decoding."""
        return [*self._together, *(request for request, _ in self._alone)]

    @torch.inference_mode()
    def admit(self, requests: Sequence[Request]) -> None:
        """Prefill the prompts and let them join. Where that fails, the rows that are there are as they were.

        Call `feed` before: its failure is not the new rows' fault.
        """
        if not requests:
            return
        spliced = [(r, r.prompt) for r in requests if isinstance(r.prompt, SplicedPrompt)]
        bounded = [(r, r.prompt) for r in requests if isinstance(r.prompt, BoundedPrompt)]
        for _, prompt in bounded:
            prompt.prefill()
        fresh = prefill([prompt for _, prompt in spliced], self.backbone, self.prefixes) if spliced else None
        self.feed()
        if fresh is not None:
            self._state = fresh if self._state is None else merge([self._state, fresh], self.backbone)
        self._together += [r for r, _ in spliced]
        self._alone += bounded
        for request, runs in spliced:  # the cache holds it now; a caller may keep its request for long
            request.prompt = replace(runs, runs=())

    @torch.inference_mode()
    def advance(self) -> list[Request]:
        """Pick one token for every row; returns the requests that ended, well or with an `error`, which leave."""
        self.feed()
        for row, request in enumerate(self._together):
            assert self._state is not None
            self._pick(request, self._state.logits[row])
        for request, prompt in self._alone:
            self._pick(request, prompt.logits)
        self._owed = True
        ended = [r for r in self.rows if r.progress.finish_reason is not None or r.error is not None]
        self.drop(ended)
        return ended

    @torch.inference_mode()
    def drop(self, requests: Collection[Request]) -> None:
        """Let requests leave, finished or not."""
        if not requests:
            return
        kept = [row for row, r in enumerate(self._together) if r not in requests]
        if not kept:
            self._state = None
        elif self._state is not None and len(kept) < len(self._together):
            self._state.keep(kept)
        self._together = [self._together[row] for row in kept]
        self._alone = [(r, prompt) for r, prompt in self._alone if r not in requests]
        self._owed = self._owed and bool(self.rows)

    @torch.inference_mode()
    def feed(self) -> None:
        """Run the decoder on the tokens picked last, if that is still to do. Not to be gone on from if it fails."""
        if not self._owed:
            return
        if self._state is not None:
            step(self._state, [r.progress.token_ids[-1] for r in self._together], self.backbone)
        for request, prompt in self._alone:
            prompt.feed(request.progress.token_ids[-1])
        self._owed = False

    @staticmethod
    def _pick(request: Request, logits: Tensor) -> None:
        try:
            request.progress.take(logits, request.sampler)
        except Exception as error:  # logits that are not numbers, say: the other rows' are
            request.error = error


__all__ = ["DecodingLoop", "Request"]
