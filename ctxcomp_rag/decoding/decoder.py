"""FrozenDecoder: a Hugging Face causal language model that reads text and spans and is never changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding.batching import all_logits, prefill, step
from ctxcomp_rag.decoding.generation import Generation, GenerationSettings, Progress, Sampler
from ctxcomp_rag.decoding.prompt import Part
from ctxcomp_rag.decoding.splice import SplicedPrompt, splice
from ctxcomp_rag.errors import InputError


class FrozenDecoder:
    """Generates from prompts whose parts are text, soft spans and KV spans in any order.

    Thread-safe: no state is kept between calls, and parameters are never written to.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.end_ids = _end_ids(backbone)

    def splice(self, parts: Sequence[Part]) -> SplicedPrompt:
        """Decoder inputs of a prompt; see `ctxcomp_rag.decoding.splice.splice` for the errors raised."""
        return splice(parts, self.backbone)

    @torch.inference_mode()
    def logits(self, parts: Sequence[Part]) -> Tensor:
        """Logits (rows, vocab_size) at every text token and soft slot of the prompt."""
        return all_logits(self.splice(parts), self.backbone)

    def generate(self, parts: Sequence[Part], settings: GenerationSettings | None = None) -> Generation:
        """One answer."""
        return self.batch([parts], settings)[0]

    @torch.inference_mode()
    def batch(self, prompts: Sequence[Sequence[Part]], settings: GenerationSettings | None = None) -> list[Generation]:
        """One answer for each prompt, in order, computed in one left-padded batch; equal to one at a time."""
        if isinstance(prompts, str):
            raise InputError("expected a list of prompts, got one string; use generate for a single prompt")
        if not prompts:
            return []
        settings = settings or GenerationSettings()
        spliced = [self.splice(parts) for parts in prompts]
        progress = [self._progress(p, settings) for p in spliced]
        samplers = [Sampler(settings, self.backbone.device) for _ in spliced]
        state = prefill(spliced, self.backbone)
        active = list(range(len(spliced)))
        while True:
            for row, request in enumerate(active):
                progress[request].accept(samplers[request].pick(state.logits[row]))
            rows = [row for row, request in enumerate(active) if progress[request].finish_reason is None]
            if not rows:
                break
            if len(rows) < len(active):
                state.keep(rows)
                active = [active[row] for row in rows]
            step(state, [progress[request].token_ids[-1] for request in active], self.backbone)
        return [_finished(p, s) for p, s in zip(progress, spliced, strict=True)]

    def stream(self, parts: Sequence[Part], settings: GenerationSettings | None = None) -> Iterator[str]:
        """Pieces of the answer as they settle; joined they equal `generate(...).text`.

        Runs in the consumer's thread: an exception reaches the consumer, and closing the iterator cancels.
        """
        settings = settings or GenerationSettings()
        with torch.inference_mode():
            spliced = self.splice(parts)
            progress = self._progress(spliced, settings)
            sampler = Sampler(settings, self.backbone.device)
            state = prefill([spliced], self.backbone)
        shown = 0
        while True:
            with torch.inference_mode():
                progress.accept(sampler.pick(state.logits[0]))
            settled = progress.settled
            if len(settled) > shown:
                yield settled[shown:]
                shown = len(settled)
            if progress.finish_reason:
                return
            with torch.inference_mode():
                step(state, progress.token_ids[-1:], self.backbone)

    def _progress(self, prompt: SplicedPrompt, settings: GenerationSettings) -> Progress:
        room = self.backbone.max_positions - prompt.next_position
        if room < settings.max_new_tokens:
            settings = GenerationSettings(**{**settings.__dict__, "max_new_tokens": room})
        return Progress(self.backbone.tokenizer, settings, self.end_ids)


def _finished(progress: Progress, prompt: SplicedPrompt) -> Generation:
    assert progress.finish_reason is not None
    return Generation(progress.text, tuple(progress.token_ids), progress.finish_reason, prompt.usage,
                      progress.num_generated)


def _end_ids(backbone: Backbone) -> frozenset[int]:
    named = getattr(backbone.model.generation_config, "eos_token_id", None)
    named = named if named is not None else backbone.config.eos_token_id
    ids = {named} if isinstance(named, int) else set(named or ())
    if not ids:
        raise InputError(f"the model {backbone.model_id!r} names no end-of-text token; set eos_token_id in its "
                         "generation_config.json")
    return frozenset(ids)
