"""Samples in the very prompts of the product, for every method: several spans, any factor, a full-text teacher.

    Repeating       the prompt of `reconstruction_prompt`, then the text and the end
    GoingOn         the spans, then what follows
    Answering       the prompt of `prompt_parts`, then the answer and the end
    Distilling      the same; the target is the decoder's own distribution after the full text (KL), not the words

A sample says what the decoder reads as ids, spans and trained rows; the loss lays them out as `splice` would, with
gradients through slots and rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.compressors.icae import ICAECompressor
from ctxcomp_rag.compressors.pcc import PCCCompressor
from ctxcomp_rag.decoding import Delimiter, Part, Text, TokenIds, enclosed, reconstruction_prompt
from ctxcomp_rag.decoding.prompt import text_ids
from ctxcomp_rag.errors import InputError, UnsupportedModelError
from ctxcomp_rag.pipeline import prompt_parts
from ctxcomp_rag.spans import MemorySpan, SoftSpan, SpanSpec
from ctxcomp_rag.training.examples import Example
from ctxcomp_rag.training.objectives import default_end_id

Piece = tuple[int, ...] | int | str
"""Token ids; the number of a context, for its span; or the name of a trained row."""


@dataclass(frozen=True)
class SplicedSample:
    """One example in its prompt.

    Attributes:
        contexts: encoder ids of each span.
        pieces: what the decoder reads before the answer.
        labels: ids of the answer.
        factor: source tokens per slot; None for the compressor's own.
        teacher: ids of the full-text prompt, whose distributions are the target; None for the labels themselves.
    """

    contexts: tuple[tuple[int, ...], ...]
    pieces: tuple[Piece, ...]
    labels: tuple[int, ...]
    factor: float | None = None
    teacher: tuple[int, ...] | None = None


class Trainable:
    """What the methods differ in: whose ids the encoder reads, and where the trained rows are kept.

    Raises:
        UnsupportedModelError: the method has nothing to train.
    """

    def __init__(self, compressor: Compressor) -> None:
        if not isinstance(compressor, ICAECompressor | PCCCompressor):
            raise UnsupportedModelError(f"the method {compressor.name!r} has nothing to train; use icae or pcc")
        self.compressor: ICAECompressor | PCCCompressor = compressor
        self.backbone: Backbone = compressor.backbone
        self.end_id = default_end_id(self.backbone)
        self.spec: SpanSpec = compressor.spec  # once: it hashes the weights, and the layout does not depend on them

    def context_ids(self, text: str) -> tuple[int, ...]:
        """What the encoder reads of a text, as `compress` does."""
        own = self.compressor
        tokenizer = own.encoder.tokenizer if isinstance(own, PCCCompressor) else self.backbone.tokenizer
        return (*own.config.context_ids, *tokenizer.encode(text))

    def rows(self) -> dict[str, Tensor]:
        """The trained rows (hidden_size,) by the names that a specification gives them."""
        own = self.compressor
        if isinstance(own, PCCCompressor):
            return dict(zip(("before", "reconstruct", "after"), own.special_rows, strict=True))
        named = own.memory_tokens[own.config.num_memory_tokens :]
        return dict(zip(("reconstruct", "continue", "after"), named, strict=True))

    def spans(self, contexts: Sequence[Sequence[int]], factor: float | None) -> list[tuple[Tensor, list[int], int]]:
        """(rows (num_slots, hidden_size), their positions, positions of the whole span) of each context."""
        own = self.compressor
        if isinstance(own, PCCCompressor):
            padded = own.padded(contexts)
            made = [own.bracketed(slots, own.config.segments(len(ids), own.factor(factor)))
                    for ids, slots in zip(padded, own.encode(padded, [factor] * len(padded)), strict=True)]
            return [(rows, places.tolist(), occupied) for rows, places, occupied in made]
        slots = own.encode(contexts, compression_factor=factor)
        return [(rows, *own.span_positions(len(ids), factor)) for rows, ids in zip(slots, contexts, strict=True)]

    def pieces(self, parts: Sequence[Part], spans: Sequence[MemorySpan]) -> tuple[Piece, ...]:
        """Parts of a prompt as pieces; a span of `spans` becomes its number."""
        numbers = {id(span): i for i, span in enumerate(spans)}
        names = {rows.data_ptr(): name for name, rows in self.spec.delimiters.items()}
        made: list[Piece] = []
        for part in parts:
            if isinstance(part, MemorySpan):
                made.append(numbers[id(part)])
            elif isinstance(part, Delimiter):
                made.append(names[part.embeds.data_ptr()])
            elif isinstance(part, str | Text | TokenIds):
                made.append(tuple(text_ids(part, self.backbone.tokenizer)))
        return tuple(made)

    def stand_in(self) -> SoftSpan:
        """A span that only marks its place."""
        return SoftSpan("place", 1, torch.zeros(1, dtype=torch.long), 1, torch.zeros(1, self.backbone.hidden_size))


class SplicedObjective:
    """Turns an example into a sample."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of an example that may not be empty."""

    def __init__(self, trainable: Trainable) -> None:
        self.trainable = trainable

    def from_example(self, example: Example, rng: random.Random) -> SplicedSample:
        return self.sample(example, [example.context], None)

    def sample(self, example: Example, contexts: Sequence[str], factor: float | None) -> SplicedSample:
        """The sample whose prompt has the spans of `contexts`, in this order; the example's own is one of them."""
        raise NotImplementedError

    def _sample(self, contexts: Sequence[str], parts: Sequence[Part], spans: Sequence[MemorySpan], answer: str, *,
                factor: float | None, teacher: Sequence[Part] | None = None, ends: bool = True) -> SplicedSample:
        t = self.trainable
        labels = (*t.backbone.tokenizer.encode(answer), *((t.end_id,) if ends else ()))
        text = None if teacher is None else tuple(
            i for part in teacher if isinstance(part, str | Text | TokenIds)
            for i in text_ids(part, t.backbone.tokenizer))
        return SplicedSample(tuple(map(t.context_ids, contexts)), t.pieces(parts, spans), labels, factor, text)


class Repeating(SplicedObjective):
    """The decoder repeats the context (one span, whatever else there is)."""

    name = "autoencoding"

    def sample(self, example: Example, contexts: Sequence[str], factor: float | None) -> SplicedSample:
        span = self.trainable.stand_in()
        parts = reconstruction_prompt(span, self.trainable.spec)
        return self._sample([example.context], parts, [span], example.context, factor=factor)


class GoingOn(SplicedObjective):
    """The decoder goes on after the context (one span)."""

    name, needs = "continuation", ("continuation",)

    def sample(self, example: Example, contexts: Sequence[str], factor: float | None) -> SplicedSample:
        span = self.trainable.stand_in()
        return self._sample([example.context], enclosed(span, self.trainable.spec), [span], example.continuation,
                            factor=factor, ends=False)


class Answering(SplicedObjective):
    """The decoder answers the question."""

    name, needs = "question", ("question", "answer")
    distils: ClassVar[bool] = False

    def sample(self, example: Example, contexts: Sequence[str], factor: float | None) -> SplicedSample:
        t = self.trainable
        spans = [t.stand_in() for _ in contexts]
        parts = prompt_parts(t.backbone, example.question, [enclosed(s, t.spec) for s in spans], t.spec)
        teacher = prompt_parts(t.backbone, example.question, [[c] for c in contexts]) if self.distils else None
        return self._sample(contexts, parts, spans, example.answer, factor=factor, teacher=teacher)


class Distilling(Answering):
    """The decoder's distributions after spans approach those that it has itself after the full text."""

    name, distils = "distillation", True


OBJECTIVES: dict[str, type[SplicedObjective]] = {o.name: o for o in (Repeating, GoingOn, Answering, Distilling)}


def summed_spliced_loss(trainable: Trainable, samples: Sequence[SplicedSample]) -> Tensor:
    """Cross-entropy, or KL from the teacher, summed over the samples' labels: the loss of a `Trainer`."""
    logits = answer_logits(trainable, samples)
    taught = [i for i, s in enumerate(samples) if s.teacher is not None]
    with torch.no_grad():
        ids = [(*(samples[i].teacher or ()), *samples[i].labels) for i in taught]
        targets = dict(zip(taught, _text_logits(trainable.backbone, ids, [len(samples[i].labels) for i in taught]),
                           strict=True))
    losses = []
    for i, (sample, rows) in enumerate(zip(samples, logits, strict=True)):
        if i in targets:
            losses.append(functional.kl_div(rows.float().log_softmax(-1), targets[i].float().log_softmax(-1),
                                            log_target=True, reduction="sum"))
        else:
            losses.append(functional.cross_entropy(rows.float(), torch.tensor(sample.labels, device=rows.device),
                                                   reduction="sum"))
    return torch.stack(losses).sum()


def answer_logits(trainable: Trainable, samples: Sequence[SplicedSample]) -> list[Tensor]:
    """The decoder's logits (labels, vocab_size) for the labels of each sample.

    Raises:
        InputError: a prompt with its answer is longer than the decoder's window.
    """
    backbone, special = trainable.backbone, trainable.rows()
    spans = _spans(trainable, samples)
    rows, places = [], []
    for sample, own in zip(samples, spans, strict=True):
        embeds: list[Tensor] = []
        positions: list[int] = []
        at = 0
        for piece in (*sample.pieces, sample.labels):
            if isinstance(piece, str):
                row, steps, length = special[piece][None], [0], 1
            elif isinstance(piece, int):
                row, steps, length = own[piece]
            else:
                row = backbone.embed(torch.tensor(piece, dtype=torch.long))
                steps, length = list(range(len(piece))), len(piece)
            embeds.append(row.to(backbone.dtype))
            positions += [at + p for p in steps]
            at += length
        _check_window(backbone, at, "a training sample")
        rows.append(torch.cat(embeds))
        places.append(torch.tensor(positions))
    return _run(backbone, rows, places, [len(s.labels) for s in samples])


def _spans(trainable: Trainable, samples: Sequence[SplicedSample]) -> list[list[tuple[Tensor, list[int], int]]]:
    """The spans of each sample; all contexts of one factor are encoded together."""
    made: dict[tuple[int, int], tuple[Tensor, list[int], int]] = {}
    for factor in dict.fromkeys(s.factor for s in samples):
        keys = [(i, j) for i, s in enumerate(samples) if s.factor == factor for j in range(len(s.contexts))]
        contexts = [samples[i].contexts[j] for i, j in keys]
        made.update(zip(keys, trainable.spans(contexts, factor), strict=True))
    return [[made[i, j] for j in range(len(s.contexts))] for i, s in enumerate(samples)]


def _check_window(backbone: Backbone, length: int, what: str) -> None:
    if length > backbone.max_positions:
        raise InputError(f"{what} takes {length} positions and the decoder has {backbone.max_positions}; use shorter "
                         "contexts (context_tokens) or fewer spans (max_spans)")


def _text_logits(backbone: Backbone, ids: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Tensor]:
    """As `answer_logits`, after the full texts."""
    for sample in ids:
        _check_window(backbone, len(sample), "the full text that a distillation sample is taught from")
    rows = [backbone.embed(torch.tensor(i, dtype=torch.long)) for i in ids]
    return _run(backbone, rows, [torch.arange(len(i)) for i in ids], counts) if ids else []


def _run(backbone: Backbone, rows: Sequence[Tensor], places: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Logits that predict the last `counts` rows of each sequence; computed for those places only."""
    width = max(map(len, rows))
    embeds = torch.stack([functional.pad(r, (0, 0, 0, width - len(r))) for r in rows])
    positions = torch.stack([functional.pad(p, (0, width - len(p))) for p in places]).to(backbone.device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=backbone.device)
    ranges = [range(len(r) - n - 1, len(r) - 1) for r, n in zip(rows, counts, strict=True)]
    kept = sorted({i for r in ranges for i in r})
    column = {place: i for i, place in enumerate(kept)}
    logits: Tensor = backbone.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False,
                                    logits_to_keep=torch.tensor(kept, device=backbone.device)).logits
    size = int(backbone.config.vocab_size)
    return [logits[i, [column[place] for place in r], :size] for i, r in enumerate(ranges)]


__all__ = ["OBJECTIVES", "Answering", "Distilling", "GoingOn", "Repeating", "SplicedObjective",
           "SplicedSample", "Trainable", "answer_logits", "summed_spliced_loss"]
