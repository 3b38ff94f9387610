"""How retrieved spans are read: at which factor, within how many slots, and which of them as text instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index import RetrievedSpan
from ctxcomp_rag.slot_budget import Offer, Share, allot
from ctxcomp_rag.spans import SpanSpec


@dataclass(frozen=True)
class Reading:
    """What is chosen at query time; the spans are stored once.

    Attributes:
        factor: source tokens per slot of nested spans; a span stored with fewer slots is read as it is.
        slot_budget: most slots of all retrieved spans together; raw text and delimiters do not count.
        share: how the slots are shared over the spans, see `ctxcomp_rag.slot_budget`.
        min_retention: a span that kept a smaller share of its chunk's facts, at the slots it is read with, is
            spliced as text.
    """

    factor: float | None = None
    slot_budget: int | None = None
    share: Share = "uniform"
    min_retention: float | None = None

    @property
    def whole(self) -> bool:
        """Whether every span is read as it is stored."""
        return self.factor is None and self.slot_budget is None and self.min_retention is None

    def fit(self, sources: Sequence[RetrievedSpan], spec: SpanSpec) -> tuple[list[RetrievedSpan], list[RetrievedSpan]]:
        """(sources with the spans to read, sources that the budget drops), each in order of retrieval.

        Raises:
            InputError: the spans cannot be read at the factor or within the budget.
        """
        if self.factor is not None and self.factor not in spec.nested:
            known = ", ".join(f"{f:g}" for f in spec.nested)
            why = f"they can be read at {known}" if known else f"the compressor {spec.compressor} is not nested"
            raise InputError(f"these spans cannot be read at the factor {self.factor:g}: {why}. Leave the factor out, "
                             "or precompress with it")
        offers = [self._offer(source, spec) for source in sources]
        if self.slot_budget is None:
            given = [offer.counts[-1] for offer in offers]
        else:
            given = allot(offers, self.slot_budget, self.share)
        kept = [replace(s, span=s.span.first(n)) for s, n in zip(sources, given, strict=True) if n]
        return kept, [s for s, n in zip(sources, given, strict=True) if not n]

    def _offer(self, source: RetrievedSpan, spec: SpanSpec) -> Offer:
        span = source.span
        counts = {n for f, n in spec.slot_counts(span).items() if self.factor is None or f >= self.factor}
        ascending = tuple(sorted(counts)) or (span.num_slots,)
        known = tuple(span.retention[n] for n in ascending if n in span.retention)
        return Offer(source.score, ascending, known if len(known) == len(ascending) else ())

    def as_text(self, source: RetrievedSpan) -> bool:
        """Whether the chunk's text is to be spliced; raises InputError where its span's retention is not known."""
        if self.min_retention is None:
            return False
        known = source.span.retention.get(source.span.num_slots)
        if known is None:
            raise InputError(f"the retention of the span of chunk {source.chunk.id!r} was not measured; precompress "
                             "its document into a new index with --retention, or leave min_retention out")
        return known < self.min_retention


__all__ = ["Reading"]
