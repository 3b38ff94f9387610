"""FrozenDecoder: a Hugging Face causal language model that reads text and spans and is never changed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding.batching import all_logits
from ctxcomp_rag.decoding.budget import BoundedPrompt, CacheBudget
from ctxcomp_rag.decoding.generation import Generation, GenerationSettings, Progress, Sampler
from ctxcomp_rag.decoding.loop import DecodingLoop, Request
from ctxcomp_rag.decoding.prefix import PrefixCache
from ctxcomp_rag.decoding.prompt import Part
from ctxcomp_rag.decoding.splice import SplicedPrompt, lay_out, place, splice
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.kv.scores import ScoringRule


class FrozenDecoder:
    """Generates from prompts whose parts are text, soft spans and KV spans in any order.

    Thread-safe: nothing is kept between calls but the text that prompts begin with (`prefixes`), and parameters are
    never written to.

    Args:
        backbone: the model.
        cache_budget: bound |M| on the cache entries, and so on the positions, of each prompt with its answer. Inputs
            of any length are then read with InfiniPot's continual distillation: whenever |M| entries are there, the
            catalyst prompt's counted, what matters is kept and moved to the front, while the prompt is read as while
            the answer is written. Prompts that fit, answer included, are read exactly as without a budget. Only for
            decoders that keep all keys and rotate them (RoPE).
        cache_rule: what matters, where a cache budget is given [default: InfiniPot].
        end_ids: what ends an answer [default: what the model's generation settings name].

    Raises:
        UnsupportedModelError, InputError: the budget cannot be kept with this decoder (see `CacheBudget`).
    """

    def __init__(self, backbone: Backbone, *, cache_budget: int | None = None, cache_rule: ScoringRule | None = None,
                 end_ids: Collection[int] = ()) -> None:
        self.backbone, self.cache_budget = backbone, cache_budget
        self.end_ids = frozenset(end_ids) or _end_ids(backbone)
        self.prefixes = PrefixCache(backbone)
        self._budget = CacheBudget(backbone, cache_budget, cache_rule) if cache_budget is not None else None

    def splice(self, parts: Sequence[Part]) -> SplicedPrompt:
        """Decoder inputs of a prompt; see `ctxcomp_rag.decoding.splice.splice` for the errors raised."""
        return splice(parts, self.backbone)

    @torch.inference_mode()
    def logits(self, parts: Sequence[Part], *, question: str | None = None) -> Tensor:
        """Logits (rows, vocab_size) at every text token and soft slot of the prompt."""
        layout = lay_out(parts, self.backbone)
        if self._budget is None or self._budget.holds(layout.num_positions):
            return all_logits(place(layout, self.backbone), self.backbone)
        pieces: list[Tensor] = []
        BoundedPrompt(layout, self._budget, question).prefill(pieces.append)
        return torch.cat(pieces)

    def generate(self, parts: Sequence[Part], settings: GenerationSettings | None = None, *,
                 question: str | None = None) -> Generation:
        """One answer.

        Args:
            question: what the prompt asks; where a cache budget makes the decoder forget, it keeps what the question
                attends to (CaP-Q). Without it, what a generic catalyst attends to.
        """
        return self._run([self.request(parts, settings, question=question)])[0]

    def batch(self, prompts: Sequence[Sequence[Part]],
              settings: GenerationSettings | Sequence[GenerationSettings] | None = None) -> list[Generation]:
        """One answer for each prompt, in order, computed in one left-padded batch; equal to one at a time.

        Prompts beyond a cache budget keep a cache of their own, and step beside the batch.

        Args:
            settings: of all prompts, or one for each.
        """
        if isinstance(prompts, str):
            raise InputError("expected a list of prompts, got one string; use generate for a single prompt")
        if not prompts:
            return []
        own = settings if isinstance(settings, Sequence) else [settings] * len(prompts)
        if len(own) != len(prompts):
            raise InputError(f"expected settings for each of {len(prompts)} prompts, got {len(own)}; pass one for all, "
                             "or as many")
        return self._run([self.request(parts, mine) for parts, mine in zip(prompts, own, strict=True)])

    def _run(self, requests: Sequence[Request]) -> list[Generation]:
        loop = self.loop()
        loop.admit(requests)
        while loop.rows:
            loop.advance()
        return [r.generation for r in requests]

    def stream(self, parts: Sequence[Part], settings: GenerationSettings | None = None, *,
               question: str | None = None) -> Iterator[str]:
        """Pieces of the answer as they settle; joined they equal `generate(...).text`, `question` as there.

        Runs in the consumer's thread: an exception reaches the consumer, and closing the iterator cancels.
        """
        request = self.request(parts, settings, question=question)
        loop = self.loop()
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

    def loop(self) -> DecodingLoop:
        """An empty loop for requests to this decoder."""
        return DecodingLoop(self.backbone, self.prefixes)

    @torch.inference_mode()
    def request(self, parts: Sequence[Part], settings: GenerationSettings | None = None, *,
                question: str | None = None) -> Request:
        """A prompt made ready for a `DecodingLoop`; raises what `splice` raises."""
        settings = settings or GenerationSettings()
        layout = lay_out(parts, self.backbone)
        prompt: SplicedPrompt | BoundedPrompt
        if self._budget is None or self._budget.holds(layout.num_positions + settings.max_new_tokens):
            prompt = place(layout, self.backbone)
            room = self.backbone.max_positions - prompt.next_position
            if room < settings.max_new_tokens:
                settings = replace(settings, max_new_tokens=room)
        else:
            prompt = BoundedPrompt(layout, self._budget, question)
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
