"""What a compressor is trained on: a context, and a decoder prompt in which slots stand in its place.

    AutoencodingObjective   [slots][AE] context end               repeat the context
    ContinuationObjective   [slots]([LM]) what follows            go on after the context
    InstructionObjective    left [slots][FT] prompt right answer end

Layouts and numbering are those of the official ICAE v2 code.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.compressors.icae import ICAECompressor
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.training.examples import Example

IGNORED = -100
"""Label of a place that is not trained on."""


@dataclass(frozen=True)
class SampleIds:
    """Ids above the decoder's vocabulary: padding, memory tokens, [AE], [LM], [FT], in this order."""

    vocab_size: int
    num_memory_tokens: int

    @classmethod
    def of(cls, compressor: ICAECompressor) -> SampleIds:
        return cls(int(compressor.backbone.config.vocab_size), compressor.config.num_memory_tokens)

    @property
    def padding(self) -> int:
        return self.vocab_size

    @property
    def first_memory(self) -> int:
        return self.vocab_size + 1

    @property
    def reconstruct(self) -> int:
        return self.first_memory + self.num_memory_tokens

    @property
    def continue_(self) -> int:
        return self.reconstruct + 1

    @property
    def after(self) -> int:
        return self.reconstruct + 2


@dataclass(frozen=True)
class TrainingSample:
    """One training example, as plain ids.

    Attributes:
        context_ids: what the compressor reads.
        prompt_ids: what the decoder reads; every slot's place holds the first memory id.
        labels: same length; the id to be predicted, or IGNORED.
        compression_factor: of the slots; None for the compressor's own.
    """

    context_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    labels: tuple[int, ...]
    compression_factor: float | None = None


class _Objective(ABC):
    def __init__(self, compressor: ICAECompressor, *, end_id: int | None = None) -> None:
        self.compressor = compressor
        self.ids = SampleIds.of(compressor)
        self.end_id = default_end_id(compressor.backbone) if end_id is None else end_id

    def encode(self, text: str) -> list[int]:
        return self.compressor.backbone.tokenizer.encode(text)

    def _context(self, example: Example) -> list[int]:
        return [*self.compressor.config.context_ids, *self.encode(example.context)]

    @abstractmethod
    def whole(self, example: Example) -> TrainingSample:
        """An example with all slots of its context."""

    def from_example(self, example: Example, rng: random.Random) -> TrainingSample:
        """An example; for a nested compressor the decoder sees the slots of a factor that is drawn."""
        sample, nested = self.whole(example), self.compressor.config.nested
        return self.read_at(sample, rng.choice(nested)) if nested else sample

    def read_at(self, sample: TrainingSample, compression_factor: float) -> TrainingSample:
        """The same sample with as many slots as the context has at this factor."""
        begin, slots = sample.prompt_ids.index(self.ids.first_memory), sample.prompt_ids.count(self.ids.first_memory)
        fewer = len(self.compressor.span_positions(len(sample.context_ids), compression_factor)[0])

        def cut(ids: tuple[int, ...]) -> tuple[int, ...]:
            return ids[: begin + fewer] + ids[begin + slots :]

        return TrainingSample(sample.context_ids, cut(sample.prompt_ids), cut(sample.labels), compression_factor)

    def _slots(self, context_ids: Sequence[int]) -> list[int]:
        if not context_ids:
            raise InputError("the context of a training sample must hold at least one token")
        places, _ = self.compressor.span_positions(len(context_ids))
        return [self.ids.first_memory] * len(places)


class AutoencodingObjective(_Objective):
    """The decoder repeats the context from its slots.

    Args:
        end_id: what ends an answer; default is the decoder's end-of-text token.
    """

    def sample(self, context_ids: Sequence[int]) -> TrainingSample:
        return _sample(context_ids, [*self._slots(context_ids), self.ids.reconstruct], [*context_ids, self.end_id])

    def whole(self, example: Example) -> TrainingSample:
        """The whole context, with the BOS that the compressor's layout has before a text."""
        return self.sample(self._context(example))

    def draw(self, text_ids: Sequence[int], max_tokens: int, rng: random.Random) -> TrainingSample:
        """A sample from a random window of at most `max_tokens`, the whole text where it is short enough."""
        start = rng.randint(0, max(0, len(text_ids) - max_tokens))
        return self.sample(text_ids[start : start + max_tokens])


class ContinuationObjective(_Objective):
    """The decoder goes on after the context, which it knows from the slots only.

    Args:
        max_tokens: longest continuation.
        min_tokens: a continuation that is not longer is not worth a step: the sample becomes an autoencoding one.
        leave_tokens: leading tokens of the continuation without a label.
        with_token: put [LM] after the slots.
    """

    def __init__(self, compressor: ICAECompressor, *, max_tokens: int, min_tokens: int = 64, leave_tokens: int = 8,
                 with_token: bool = False, end_id: int | None = None) -> None:
        super().__init__(compressor, end_id=end_id)
        self.max_tokens, self.min_tokens, self.leave_tokens = max_tokens, min_tokens, leave_tokens
        self.with_token = with_token
        self.fallback = AutoencodingObjective(compressor, end_id=self.end_id)

    def sample(self, context_ids: Sequence[int], continuation_ids: Sequence[int]) -> TrainingSample:
        if len(continuation_ids) <= self.min_tokens:
            return self.fallback.sample(context_ids)
        prompt = self._slots(context_ids) + ([self.ids.continue_] if self.with_token else [])
        return _sample(context_ids, prompt, continuation_ids[: self.max_tokens], unlabelled=self.leave_tokens)

    def whole(self, example: Example) -> TrainingSample:
        """The whole context, with the BOS that the compressor's layout has before a text, and its continuation."""
        return self.sample(self._context(example), self.encode(example.continuation))

    def draw(self, text_ids: Sequence[int], max_tokens: int, rng: random.Random) -> TrainingSample:
        """A sample from a text cut at random; a long text gives a context of `max_tokens` at a random place."""
        if len(text_ids) <= max_tokens:
            start, end = 0, rng.randint(1, max(1, len(text_ids)))
        else:
            start = rng.randint(0, len(text_ids) - max_tokens)
            end = start + max_tokens
        return self.sample(text_ids[start:end], text_ids[end:])


class InstructionObjective(_Objective):
    """The decoder answers a prompt about the context.

    Args:
        left_ids, right_ids: what the chat template puts before the slots and after the prompt.
        max_context_tokens: a longer context is cut off.
    """

    def __init__(self, compressor: ICAECompressor, *, left_ids: Sequence[int] = (), right_ids: Sequence[int] = (),
                 max_context_tokens: int = 5120, end_id: int | None = None) -> None:
        super().__init__(compressor, end_id=end_id)
        self.left_ids, self.right_ids = tuple(left_ids), tuple(right_ids)
        self.max_context_tokens = max_context_tokens

    def sample(self, context_ids: Sequence[int], prompt_ids: Sequence[int],
               answer_ids: Sequence[int]) -> TrainingSample:
        context_ids = context_ids[: self.max_context_tokens]
        prompt = [*self.left_ids, *self._slots(context_ids), self.ids.after, *prompt_ids, *self.right_ids]
        return _sample(context_ids, prompt, [*answer_ids, self.end_id])

    def whole(self, example: Example) -> TrainingSample:
        """Context, question and answer; no BOS before the context, as in the official instruction tuning."""
        return self.sample(self.encode(example.context), self.encode(example.question), self.encode(example.answer))


def _sample(context: Sequence[int], prompt: Sequence[int], answer: Sequence[int], *,
            unlabelled: int = 0) -> TrainingSample:
    hidden = [IGNORED] * (len(prompt) + min(unlabelled, len(answer)))
    return TrainingSample(tuple(context), (*prompt, *answer), (*hidden, *answer[unlabelled:]))


def default_end_id(backbone: Backbone) -> int:
    """The decoder's end-of-text token; raises InputError where it names none."""
    named = backbone.config.eos_token_id
    end_id = named[0] if isinstance(named, list | tuple) and named else named
    if not isinstance(end_id, int):
        raise InputError(f"the model {backbone.model_id!r} names no end-of-text token; pass end_id")
    return end_id
