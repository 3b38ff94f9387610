"""What a span codec costs on an index: bytes, relative error, and how far the decoder's answers move."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, Part, TokenIds, enclosed
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.metrics import exact_match, mean
from ctxcomp_rag.evaluation.systems import Comparison, Question, System
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.index.codecs import CODECS, Codec, codec_named
from ctxcomp_rag.index.rows import codec_for, latent_tensors, span_from_bytes, span_to_bytes
from ctxcomp_rag.pipeline import prompt_parts
from ctxcomp_rag.spans import MemorySpan, SpanSpec

_QUESTION = "What does the text say?"
_ANSWER = GenerationSettings(max_new_tokens=24)
_LEARN_FROM = 256  # chunks: the first batch of a new index


@dataclass(frozen=True)
class CodecCost:
    """One codec on a sample of an index.

    Attributes:
        bytes_per_source_token, bytes_per_chunk: of a stored span, header included.
        relative_error: |x - x'|^2 / |x|^2 over all tensors of the sample.
        kl: nats per token between the decoder's next-token distributions, over the answers read from the stored spans.
        changed: share of greedy answers that differ.
    """

    codec: str
    bytes_per_source_token: float
    relative_error: float
    kl: float
    changed: float
    bytes_per_chunk: float


@dataclass(frozen=True)
class CodecReport:
    """Costs, best preserved first, and why a codec that learns could not be measured."""

    costs: list[CodecCost]
    skipped: dict[str, str]

    def smallest_within(self, max_kl: float) -> CodecCost:
        """The codec of the fewest bytes whose loss is at most `max_kl`; "exact" always is."""
        within = [c for c in self.costs if c.kl <= max_kl or c.codec == "exact"]
        return min(within, key=lambda c: c.bytes_per_source_token)


def measure_codecs(index: MemoryIndex, backbone: Backbone, compressor: Compressor | None = None, *, sample: int = 32,
                   seed: int = 0, question: str = _QUESTION) -> CodecReport:
    """Every codec, and PCA at a half, a quarter and an eighth of the channels, on a random sample of an index's chunks.

    The reference is the spans as they are stored, where that is exactly; else the compressor makes them again from the
    stored texts, at its own factor. Codecs that learn do so from chunks that are not in the sample.

    Args:
        compressor: the one that made the index; needed where the spans are not stored exactly, or are latent.

    Raises:
        InputError: the index is empty, or its spans are not stored exactly and there is no compressor.
        IncompatibleSpanError: the index is for another decoder, or of another compressor.
    """
    spec = compressor.reading(index.spec) if compressor else index.spec
    spec.require_decoder(backbone.fingerprint)
    ids = [chunk.id for chunk in index.chunks()]
    if not ids:
        raise InputError(f"the index in {index.location!r} holds no chunks; add documents first")
    chosen = random.Random(seed).sample(sorted(ids), min(sample, len(ids)))
    retrieved = index.get(chosen)
    chunks, spans = [r.chunk for r in retrieved], [r.span for r in retrieved]
    if index.codec != "exact":
        if compressor is None:
            raise InputError(f"this index stores spans with codec {index.codec!r}, so what was lost cannot be seen in "
                             "it; name the compressor that made it, or measure an index made with --codec exact")
        index.spec.require_compressor(compressor.writer(index.spec).spec)
        spans = compressor.writer(index.spec).compress(chunks)
    others = [r.span for r in index.get(list(dict.fromkeys(i for i in ids if i not in set(chosen)))[:_LEARN_FROM])]
    codecs, skipped = _learned(spans, others)
    decoder = FrozenDecoder(backbone)

    def prompts_of(stored: Sequence[MemorySpan]) -> list[list[Part]]:
        read = [compressor.read(s, c) for s, c in zip(stored, chunks, strict=True)] if compressor else stored
        return [_prompt(backbone, question, span, spec) for span in read]

    prompts = prompts_of(spans)
    answers = [decoder.generate(p, _ANSWER).token_ids for p in prompts]
    logits = [_answer_logits(decoder, p, a) for p, a in zip(prompts, answers, strict=True)]
    costs = []
    for codec in codecs:
        stored = [span_to_bytes(span, codec) for span in spans]
        read = [_through(codec, span) for span in spans]
        prompts = prompts_of(read)
        moved = [_answer_logits(decoder, p, a) for p, a in zip(prompts, answers, strict=True)]
        changed = sum(decoder.generate(p, _ANSWER).token_ids != a for p, a in zip(prompts, answers, strict=True))
        costs.append(CodecCost(
            codec.name, sum(map(len, stored)) / sum(s.num_source_tokens for s in spans), _relative_error(spans, read),
            _mean_kl(logits, moved), changed / len(spans), sum(map(len, stored)) / len(spans),
        ))
    return CodecReport(sorted(costs, key=lambda c: c.kl), skipped)


def exact_match_by_codec(comparison: Comparison, questions: Sequence[Question], others: Sequence[Chunk],
                         factor: float) -> dict[str, float]:
    """Exact match in percent with spans as each codec gives them back.

    Args:
        others: chunks for the codecs that learn to learn from; none of those asked about.
    """
    chunks = list({c.id: c for q in questions for c in q.chunks}.values())
    spans = comparison.spans(chunks, factor)
    codecs, _ = _learned(spans, comparison.spans(others, factor))
    result = {}
    for codec in codecs:
        comparison.replace_spans(factor, [_through(codec, span) for span in spans])
        made = comparison.ask(System(codec.name, "spans", factor), questions)
        hits = [exact_match(g.text, q.answers) for g, q in zip(made, questions, strict=True)]
        result[codec.name] = round(100 * mean(hits), 1)
    comparison.replace_spans(factor, spans)
    return result


def _through(codec: Codec, span: MemorySpan) -> MemorySpan:
    """The span as it is read again."""
    return span_from_bytes(span_to_bytes(span, codec), lambda _: codec.tables)


def _learned(spans: Sequence[MemorySpan], others: Sequence[MemorySpan]) -> tuple[list[Codec], dict[str, str]]:
    """(codecs ready for the spans, reason by name for those that could not learn)."""
    names = list(CODECS)
    if spans[0].kind != "kv":
        (tensor,) = latent_tensors(spans[0]).values()
        names += [f"pca{tensor.shape[-1] // part}" for part in (2, 4, 8)]
    ready, skipped = [], {}
    for name in names:
        try:
            ready.append(codec_for(codec_named(name), others))
        except InputError as error:
            skipped[name] = str(error)
    return ready, skipped


def _relative_error(spans: Sequence[MemorySpan], read: Sequence[MemorySpan]) -> float:
    pairs = [(x.double(), y.double()) for a, b in zip(spans, read, strict=True)
             for x, y in zip(latent_tensors(a).values(), latent_tensors(b).values(), strict=True)]
    return sum(float((x - y).square().sum()) for x, y in pairs) / sum(float(x.square().sum()) for x, _ in pairs)


def _prompt(backbone: Backbone, question: str, span: MemorySpan, spec: SpanSpec) -> list[Part]:
    return prompt_parts(backbone, question, [enclosed(span, spec)], spec)


def _answer_logits(decoder: FrozenDecoder, prompt: list[Part], answer: tuple[int, ...]) -> Tensor:
    """Logits (answer tokens + 1, vocab_size) that predict the answer and what follows it."""
    rows = decoder.logits([*prompt, TokenIds(answer)] if answer else prompt)
    return rows[-len(answer) - 1 :].float()


def _mean_kl(reference: Sequence[Tensor], moved: Sequence[Tensor]) -> float:
    p, q = torch.cat(list(reference)).log_softmax(-1), torch.cat(list(moved)).log_softmax(-1)
    return max(0.0, float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")))


__all__ = ["CodecCost", "CodecReport", "exact_match_by_codec", "measure_codecs"]
