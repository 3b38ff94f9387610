"""The decode loop: rows join after their prefill, every round picks one token a row, finished rows leave."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding.batching import DecodingState, merge, prefill, step
from ctxcomp_rag.decoding.generation import Generation, Progress, Sampler
from ctxcomp_rag.decoding.splice import SplicedPrompt


@dataclass(eq=False)
class Request:
    """One prompt on its way to an answer."""

    prompt: SplicedPrompt
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
    """Rows that decode together. Not thread-safe: one thread owns a loop."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.rows: list[Request] = []
        self._state: DecodingState | None = None
        self._owed = False  # the tokens picked last are not fed yet: an answer that ends costs no step

    @torch.inference_mode()
    def admit(self, requests: Sequence[Request]) -> None:
        """Prefill the prompts and let them join. Where that fails, the rows that are there are as they were.

        Call `feed` before: its failure is not the new rows' fault.
        """
        if not requests:
            return
        fresh = prefill([r.prompt for r in requests], self.backbone)
        self.feed()
        self._state = fresh if self._state is None else merge([self._state, fresh], self.backbone)
        self.rows += requests
        for request in requests:  # the cache holds it now; a caller may keep its request for long
            request.prompt = replace(request.prompt, runs=())

    @torch.inference_mode()
    def advance(self) -> list[Request]:
        """Pick one token for every row; returns the requests that ended, well or with an `error`, which leave."""
        self.feed()
        assert self._state is not None
        for row, request in enumerate(self.rows):
            try:
                request.progress.accept(request.sampler.pick(self._state.logits[row]))
            except Exception as error:  # logits that are not numbers, say: the other rows' are
                request.error = error
        self._owed = True
        ended = [r for r in self.rows if r.progress.finish_reason is not None or r.error is not None]
        self.drop(ended)
        return ended

    @torch.inference_mode()
    def drop(self, requests: Collection[Request]) -> None:
        """Let requests leave, finished or not."""
        if not requests:
            return
        kept = [row for row, r in enumerate(self.rows) if r not in requests]
        self.rows = [self.rows[row] for row in kept]
        if not kept:
            self._state, self._owed = None, False
        elif self._state is not None:
            self._state.keep(kept)

    @torch.inference_mode()
    def feed(self) -> None:
        """Run the decoder on the tokens picked last, if that is still to do. Not to be gone on from if it fails."""
        if self._owed and self._state is not None:
            step(self._state, [r.progress.token_ids[-1] for r in self.rows], self.backbone)
        self._owed = False


__all__ = ["DecodingLoop", "Request"]
