"""Choosing tokens and knowing when to stop."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from ctxcomp_rag.decoding.quoting import Quoting, likeliest, narrowed, squeezed, whole_characters
from ctxcomp_rag.decoding.splice import PromptUsage
from ctxcomp_rag.errors import InputError, PromptTooLongError
from ctxcomp_rag.tokenization import TextTokenizer

FinishReason = Literal["stop", "length"]
_HALF = "\ufffd"  # what tokenizers decode the first bytes of a character to
_GREEDY_BELOW = 1e-4  # logits divided by less overflow; the sample is the greedy token anyway


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate.

    Attributes:
        max_new_tokens: upper bound on generated tokens.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens whose probability reaches this (temperature > 0 only).
        stop: the answer ends before the first of these strings.
        seed: of the sampling; the same prompt, settings and seed give the same answer, alone or in a batch.
        quote_from: texts; where there are any, the answer is a run of words of one of them (see
            `ctxcomp_rag.decoding.quoting`), or empty if the decoder ends it at once. They are not read by the decoder
            and take no position.
        refusals: what an answer that quotes may say instead [default: what the embedded decoder says that finds none].
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    quote_from: tuple[str, ...] = field(default=(), repr=False)
    refusals: tuple[str, ...] = ("not stated",)

    def __post_init__(self) -> None:
        for name in ("stop", "quote_from", "refusals"):
            given = getattr(self, name)  # a string is a sequence of strings: it would stop at every letter
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        object.__setattr__(self, "seed", self.seed % 2**63)
        if self.max_new_tokens < 1:
            raise InputError(f"expected max_new_tokens of at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise InputError(f"expected temperature >= 0 and 0 < top_p <= 1, got {self.temperature} and {self.top_p}")
        if any(not s for s in self.stop):
            raise InputError("a stop string must not be empty")
        for text in (*self.quote_from, *self.refusals):
            if lone := re.search("[\ud800-\udfff]", text):
                raise InputError(f"a text to quote from is not valid Unicode: character {lone.start()} is the lone "
                                 f"surrogate {lone[0]!a}; repair it where it was decoded")
        if self.quote_from and not any(text.strip() for text in self.quote_from):
            raise InputError("expected texts to quote from, got only white space; leave quote_from empty for an answer "
                             "in the decoder's own words")


@dataclass(frozen=True)
class RequestLimits:
    """What one request may cost; None for what only the decoder's window bounds.

    Attributes:
        max_prompt_positions: text tokens and slots of the prompt.
        max_new_tokens: of the answer.
    """

    max_prompt_positions: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_prompt_positions", "max_new_tokens"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise InputError(f"expected {name} of at least 1, got {limit}; leave it out for no limit")

    def check_answer(self, max_new_tokens: int) -> None:
        """Raises PromptTooLongError for an answer that may become longer than allowed."""
        if self.max_new_tokens is not None and max_new_tokens > self.max_new_tokens:
            raise PromptTooLongError(f"an answer of {max_new_tokens} tokens was asked for, the limit is "
                                     f"{self.max_new_tokens}; ask for a shorter one")

    def check_prompt(self, positions: int) -> None:
        """Raises PromptTooLongError for a prompt of more positions than allowed."""
        if self.max_prompt_positions is not None and positions > self.max_prompt_positions:
            raise PromptTooLongError(f"the prompt takes {positions} positions, the limit is "
                                     f"{self.max_prompt_positions}; retrieve fewer chunks, or shorten the text")


@dataclass(frozen=True)
class Generation:
    """An answer: its text, token ids (the stop token left out), why it ended, and what it cost."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: PromptUsage
    completion_tokens: int


class Sampler:
    """Picks the next token of one request."""

    def __init__(self, settings: GenerationSettings, device: torch.device) -> None:
        self.greedy = settings.temperature < _GREEDY_BELOW
        if not self.greedy:
            self.generator = torch.Generator(device=device).manual_seed(settings.seed)
            self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(settings.temperature))])
            if settings.top_p < 1:
                self.warpers.append(TopPLogitsWarper(settings.top_p))

    def pick(self, logits: Tensor, allowed: Callable[[int], bool] | None = None) -> int | None:
        """Token id from logits (vocab_size,); None where no token is allowed.

        Args:
            allowed: of the tokens, those that may come next [default: all].

        Raises:
            InputError: the logits are not numbers; argmax would answer nonsense, and sampling would end the process
                on a GPU.
        """
        best = logits.max(-1)
        if not math.isfinite(best.values):
            raise InputError(f"the decoder's scores for the next token are not numbers (the largest is "
                             f"{float(best.values)}): a span of the prompt, or the weights, hold values that are not "
                             f"finite or overflow in {str(logits.dtype).removeprefix('torch.')}. Check the index with "
                             "verify, or load the decoder in float32")
        if self.greedy:
            token = int(best.indices)
            return token if allowed is None or allowed(token) else likeliest(logits, allowed)
        if allowed is not None:
            left = narrowed(logits, allowed)
            if left is None:
                return None
            logits = left
        seen: Any = torch.empty(1, 0, dtype=torch.long, device=logits.device)
        unscaled: Any = logits[None].float()
        scores = self.warpers(seen, unscaled)
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=self.generator))


@dataclass
class Progress:
    """The growing answer of one request: what may be shown, and whether it is over."""

    tokenizer: TextTokenizer
    settings: GenerationSettings
    end_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    num_generated: int = 0

    def __post_init__(self) -> None:
        self.quoting = Quoting(self.settings.quote_from, self.settings.refusals) if self.settings.quote_from else None

    def allows(self, token: int) -> bool:
        """Whether an answer that quotes may go on with this token."""
        assert self.quoting is not None
        if token in self.end_ids:
            return not self.text.strip() or self.quoting.may_end(self.text)
        if token in self.tokenizer.control_ids:
            return False
        text, half = self._spelt([*self.token_ids, token])
        if text is None:
            return False
        adds = half or squeezed(text) != squeezed(self.text) or not self.token_ids  # no spaces without end
        return bool(adds) and self.quoting.may_begin(text, half)

    def _spelt(self, ids: list[int]) -> tuple[str | None, bytes]:
        """The whole characters that tokens spell, and the first bytes of one more; None where they spell nonsense."""
        text = self.tokenizer.decode(ids)
        if not text.endswith(_HALF):
            return text, b""
        # a tokenizer with byte fallback decodes a run of bytes to nothing else until its last character is whole
        found = whole_characters(b"".join(map(self.tokenizer.token_bytes, ids)))
        if found is None:
            return None, b""
        whole, half = found
        return whole if text.startswith(" ") else whole.removeprefix(" "), half  # some decode without the first space

    def take(self, logits: Tensor, sampler: Sampler) -> int | None:
        """Pick the next token and take it in; None, and the answer is over, where it cannot go on quoting."""
        token = sampler.pick(logits) if self.quoting is None else sampler.pick(logits, self.allows)
        if token is None:
            self.finish_reason = "stop"
        else:
            self.accept(token)
        if self.quoting and self.finish_reason:  # it may not have ended by itself
            self.text = self.quoting.whole(self.text)
        return token

    def accept(self, token: int) -> None:
        """Take one more token in; sets `finish_reason` when the answer is over."""
        self.num_generated += 1
        if token in self.end_ids:
            self.finish_reason = "stop"
            return
        self.token_ids.append(token)
        self.text = self._spelt(self.token_ids)[0] or "" if self.quoting else self.tokenizer.decode(self.token_ids)
        found = [at for s in self.settings.stop if (at := self.text.find(s)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish_reason = "stop"
        elif self.num_generated >= self.settings.max_new_tokens:
            self.finish_reason = "length"

    @property
    def settled(self) -> str:
        """The text that no later token can change: without half a character, a half-spelled stop string, or where the
        answer quotes half a word."""
        if self.finish_reason:
            return self.text
        text = self.text.rstrip(_HALF)
        held = max((n for s in self.settings.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        text = text[: len(text) - held]
        return self.quoting.whole(text) if self.quoting else text
