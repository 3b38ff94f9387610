"""FrozenDecoder: a Hugging Face causal language model that reads text and spans and is never changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding.batching import all_logits
from ctxcomp_rag.decoding.generation import Generation, GenerationSettings, Progress, Sampler
from ctxcomp_rag.decoding.loop import DecodingLoop, Request
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

    def batch(self, prompts: Sequence[Sequence[Part]], settings: GenerationSettings | None = None) -> list[Generation]:
        """One answer for each prompt, in order, computed in one left-padded batch; equal to one at a time."""
        if isinstance(prompts, str):
            raise InputError("expected a list of prompts, got one string; use generate for a single prompt")
        if not prompts:
            return []
        requests = [self.request(parts, settings) for parts in prompts]
        loop = DecodingLoop(self.backbone)
        loop.admit(requests)
        while loop.rows:
            loop.advance()
        return [r.generation for r in requests]

    def stream(self, parts: Sequence[Part], settings: GenerationSettings | None = None) -> Iterator[str]:
        """Pieces of the answer as they settle; joined they equal `generate(...).text`.

        Runs in the consumer's thread: an exception reaches the consumer, and closing the iterator cancels.
        """
        request = self.request(parts, settings)
        loop = DecodingLoop(self.backbone)
        loop.admit([request])
        shown = 0
        while loop.rows:
            loop.advance()
            settled = request.progress.settled
            if len(settled) > shown:
                yield settled[shown:]
                shown = len(settled)
        if request.error is not None:
            raise request.error

    @torch.inference_mode()
    def request(self, parts: Sequence[Part], settings: GenerationSettings | None = None) -> Request:
        """A prompt made ready for a `DecodingLoop`; raises what `splice` raises."""
        settings = settings or GenerationSettings()
        prompt = self.splice(parts)
        room = self.backbone.max_positions - prompt.next_position
        if room < settings.max_new_tokens:
            settings = replace(settings, max_new_tokens=room)
        return Request(prompt, Progress(self.backbone.tokenizer, settings, self.end_ids),
                       Sampler(settings, self.backbone.device))


def _end_ids(backbone: Backbone) -> frozenset[int]:
    named = getattr(backbone.model.generation_config, "eos_token_id", None)
    named = named if named is not None else backbone.config.eos_token_id
    ids = {named} if isinstance(named, int) else set(named or ())
    if not ids:
        raise InputError(f"the model {backbone.model_id!r} names no end-of-text token; set eos_token_id in its "
                         "generation_config.json")
    return frozenset(ids)
