"""What a span codec costs on an index: bytes, relative error, and how far the decoder's answers move."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, Part, TokenIds, enclosed
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.index.codecs import CODECS
from ctxcomp_rag.index.rows import span_from_bytes, span_to_bytes
from ctxcomp_rag.pipeline import prompt_parts
from ctxcomp_rag.spans import KVSpan, MemorySpan, SoftSpan, SpanSpec

_QUESTION = "What does the text say?"
_ANSWER = GenerationSettings(max_new_tokens=24)


@dataclass(frozen=True)
class CodecCost:
    """One codec on a sample of an index.

    Attributes:
        bytes_per_source_token: of a stored span, header included.
        relative_error: |x - x'|^2 / |x|^2 over all tensors of the sample.
        kl: nats per token between the decoder's next-token distributions, over the answers read from the stored spans.
        changed: share of greedy answers that differ.
    """

    codec: str
    bytes_per_source_token: float
    relative_error: float
    kl: float
    changed: float


def measure_codecs(index: MemoryIndex, backbone: Backbone, *, sample: int = 32, seed: int = 0,
                   question: str = _QUESTION) -> list[CodecCost]:
    """Every codec on a random sample of the index's chunks, best preserved first.

    The spans as they are stored are the reference: measure an index whose codec is "exact".

    Raises:
        InputError: the index is empty or does not store spans exactly.
        IncompatibleSpanError: the index is for another decoder.
    """
    index.spec.require_decoder(backbone.fingerprint)
    if index.codec != "exact":
        raise InputError(f"this index stores spans with codec {index.codec!r}, so what was lost cannot be seen in it; "
                         "measure an index made with --codec exact")
    ids = sorted(chunk.id for chunk in index.chunks())
    if not ids:
        raise InputError(f"the index in {str(index.path)!r} holds no chunks; add documents first")
    spans = [r.span for r in index.get(random.Random(seed).sample(ids, min(sample, len(ids))))]
    decoder = FrozenDecoder(backbone)
    prompts = [_prompt(backbone, question, span, index.spec) for span in spans]
    answers = [decoder.generate(p, _ANSWER).token_ids for p in prompts]
    logits = [_answer_logits(decoder, p, a) for p, a in zip(prompts, answers, strict=True)]
    costs = []
    for name in CODECS:
        stored = [span_to_bytes(span, name) for span in spans]
        read = [span_from_bytes(data) for data in stored]
        prompts = [_prompt(backbone, question, span, index.spec) for span in read]
        moved = [_answer_logits(decoder, p, a) for p, a in zip(prompts, answers, strict=True)]
        pairs = [(x, y) for a, b in zip(spans, read, strict=True) for x, y in zip(_latent(a), _latent(b), strict=True)]
        changed = sum(decoder.generate(p, _ANSWER).token_ids != a for p, a in zip(prompts, answers, strict=True))
        costs.append(CodecCost(
            name,
            sum(map(len, stored)) / sum(s.num_source_tokens for s in spans),
            sum(float((x.double() - y.double()).square().sum()) for x, y in pairs)
            / sum(float(x.double().square().sum()) for x, _ in pairs),
            _mean_kl(logits, moved),
            changed / len(spans),
        ))
    return sorted(costs, key=lambda c: c.kl)


def smallest_within(costs: Sequence[CodecCost], max_kl: float) -> CodecCost:
    """The codec of the fewest bytes whose loss is at most `max_kl`; "exact" always is."""
    return min((c for c in costs if c.kl <= max_kl or c.codec == "exact"), key=lambda c: c.bytes_per_source_token)


def _prompt(backbone: Backbone, question: str, span: MemorySpan, spec: SpanSpec) -> list[Part]:
    return prompt_parts(backbone, question, [enclosed(span, spec)], spec)


def _answer_logits(decoder: FrozenDecoder, prompt: list[Part], answer: tuple[int, ...]) -> Tensor:
    """Logits (answer tokens + 1, vocab_size) that predict the answer and what follows it."""
    rows = decoder.logits([*prompt, TokenIds(answer)] if answer else prompt)
    return rows[-len(answer) - 1 :].float()


def _mean_kl(reference: Sequence[Tensor], moved: Sequence[Tensor]) -> float:
    p, q = torch.cat(list(reference)).log_softmax(-1), torch.cat(list(moved)).log_softmax(-1)
    return max(0.0, float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")))


def _latent(span: MemorySpan) -> tuple[Tensor, ...]:
    if isinstance(span, KVSpan):
        return span.keys, span.values
    assert isinstance(span, SoftSpan)
    return (span.embeds,)


__all__ = ["CodecCost", "measure_codecs", "smallest_within"]
