"""Training samples whose spans stand in brackets, and their loss, in batches (the layouts of the official PCC code).

    [bos] (<mem> slots </mem>) per segment, then the tail
    autoencoding     <ae> text end
    continuation     what follows, end
    question         question answer end, labels on answer and end
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ctxcomp_rag.compressors.pcc import PCCCompressor
from ctxcomp_rag.decoding import Delimiter, Text, TokenIds
from ctxcomp_rag.decoding.prompt import text_ids
from ctxcomp_rag.pipeline import prompt_parts
from ctxcomp_rag.training.examples import Example
from ctxcomp_rag.training.objectives import IGNORED, default_end_id


@dataclass(frozen=True)
class BracketedSample:
    """One example as plain ids.

    Attributes:
        context_ids: what the encoder reads (encoder ids).
        tail_ids: what the decoder reads after the brackets (decoder ids).
        labels: same length as the tail.
        reconstruct: put <ae> before the tail.
        head_ids: what the decoder reads before the brackets, after the BOS that a loss may be given.
        factor: source tokens per slot; None for the compressor's own.
    """

    context_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]
    labels: tuple[int, ...]
    reconstruct: bool = False
    head_ids: tuple[int, ...] = ()
    factor: float | None = None


class _Objective:
    """What the three objectives share; the layout is the compressor's own, as its prompts will have it.

    Args:
        factor: source tokens per slot; the compressor's own by default.
    """

    def __init__(self, compressor: PCCCompressor, factor: float | None = None) -> None:
        self.compressor, self.factor, self.end_id = compressor, factor, default_end_id(compressor.backbone)
        layout = compressor.config.layout
        self.head_ids = layout.reconstruct_ids if layout else ()

    def context(self, example: Example) -> list[int]:
        """Encoder ids of the context, as `compress` reads it."""
        return [*self.compressor.config.context_ids, *self.compressor.encoder.tokenizer.encode(example.context)]

    def decoder_ids(self, text: str) -> list[int]:
        return self.compressor.backbone.tokenizer.encode(text)


class BracketedAutoencoding(_Objective):
    """The decoder repeats the context, in its own ids."""

    def from_example(self, example: Example, rng: random.Random) -> BracketedSample:
        made = autoencoding_sample(self.context(example), self.decoder_ids(example.context), self.end_id)
        return replace(made, head_ids=self.head_ids, factor=self.factor)


class BracketedContinuation(_Objective):
    """The decoder goes on after the context."""

    def from_example(self, example: Example, rng: random.Random) -> BracketedSample:
        made = continuation_sample(self.context(example), self.decoder_ids(example.continuation), self.end_id)
        return replace(made, head_ids=self.head_ids, factor=self.factor)


class BracketedQuestion(_Objective):
    """The decoder answers a question about the context, in the prompt that `CompressedRAG` will ask it in."""

    def __init__(self, compressor: PCCCompressor, factor: float | None = None) -> None:
        super().__init__(compressor, factor)
        self.spec = compressor.spec  # once: it hashes the weights, and the layout does not depend on them

    def from_example(self, example: Example, rng: random.Random) -> BracketedSample:
        backbone, here = self.compressor.backbone, Delimiter(self.spec.delimiters["before"])
        parts = prompt_parts(backbone, example.question, [[here]], self.spec)
        at = next(i for i, part in enumerate(parts) if part is here)
        head, tail = ([i for part in some if isinstance(part, str | Text | TokenIds)
                       for i in text_ids(part, backbone.tokenizer)] for some in (parts[:at], parts[at + 1 :]))
        made = question_sample(self.context(example), tail, self.decoder_ids(example.answer), self.end_id)
        return replace(made, head_ids=tuple(head), factor=self.factor)


def autoencoding_sample(context_ids: Sequence[int], text_ids: Sequence[int], end_id: int) -> BracketedSample:
    """The decoder repeats the text, in its own ids."""
    return _labelled(context_ids, text_ids, end_id, reconstruct=True)


def continuation_sample(context_ids: Sequence[int], next_ids: Sequence[int], end_id: int) -> BracketedSample:
    """The decoder goes on after the text."""
    return _labelled(context_ids, next_ids, end_id, reconstruct=False)


def question_sample(context_ids: Sequence[int], question_ids: Sequence[int], answer_ids: Sequence[int],
                    end_id: int) -> BracketedSample:
    """The decoder answers a question about the text."""
    answer = (*answer_ids, end_id)
    return BracketedSample(tuple(context_ids), (*question_ids, *answer), (*[IGNORED] * len(question_ids), *answer))


def summed_bracketed_loss(compressor: PCCCompressor, samples: Sequence[BracketedSample]) -> Tensor:
    """Cross-entropy of samples, summed over their labelled tokens: the loss of a `Trainer`."""
    loss, _, targets = bracketed_loss(compressor, samples, bos_id=None, padding_id=0)
    return loss * (targets[:, 1:] != IGNORED).sum()


def bracketed_loss(compressor: PCCCompressor, samples: Sequence[BracketedSample], *, bos_id: int | None,
                   padding_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean cross-entropy over labelled places, logits (samples, length, vocab), labels (samples, length))."""
    backbone = compressor.backbone
    device = backbone.device
    opening, asking, closing = compressor.special_rows[:, None]
    bos = [] if bos_id is None else [bos_id]
    rows, labels, places = [], [], []
    contexts = compressor.padded([s.context_ids for s in samples])
    encoded = compressor.encode(contexts, [s.factor for s in samples])
    for sample, context, slots in zip(samples, contexts, encoded, strict=True):
        segments = compressor.config.segments(len(context), compressor.factor(sample.factor))
        span, at, occupied = compressor.bracketed(slots, segments)
        before = backbone.embed(torch.tensor([*bos, *sample.head_ids], dtype=torch.long))
        after = [closing, *([asking] if sample.reconstruct else [])]
        tail = backbone.embed(torch.tensor(sample.tail_ids))
        row = torch.cat([part.to(tail.dtype) for part in (before, opening, span, *after, tail)])
        begin = len(before) + 1
        rows.append(row)
        labels.append([*[IGNORED] * (len(row) - len(tail)), *sample.labels])
        places.append(torch.cat([torch.arange(begin), begin + at,
                                 begin + occupied + torch.arange(len(row) - begin - len(span))]))
    width = max(map(len, rows))
    padding = backbone.embed(torch.tensor([padding_id]))
    embeds = torch.stack([torch.cat([row, padding.expand(width - len(row), -1)]) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    targets = torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in labels], device=device)
    positions = torch.stack([functional.pad(p, (0, width - len(p))) for p in places]).to(device)
    logits: Tensor = backbone.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions,
                                    use_cache=False).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(),
                                    ignore_index=IGNORED)
    return loss, logits, targets


def collate(samples: Sequence[BracketedSample], *, encoder_padding_id: int,
            padding_id: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """(encoder ids, tail ids, labels), each padded to the right to one length."""
    return (_padded([s.context_ids for s in samples], encoder_padding_id),
            _padded([s.tail_ids for s in samples], padding_id), _padded([s.labels for s in samples], IGNORED))


def _labelled(context: Sequence[int], tail: Sequence[int], end_id: int, *, reconstruct: bool) -> BracketedSample:
    ended = (*tail, end_id)
    return BracketedSample(tuple(context), ended, ended, reconstruct)


def _padded(rows: Sequence[Sequence[int]], filler: int) -> list[list[int]]:
    width = max(map(len, rows), default=0)
    return [[*row, *[filler] * (width - len(row))] for row in rows]
