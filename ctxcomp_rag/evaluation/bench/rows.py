"""The rows: every way to read the workload, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Final

import torch

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding import FrozenDecoder, Part, PrerolledSpans, TokenIds, enclosed
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.bench.clock import Timing, clocked
from ctxcomp_rag.evaluation.bench.offline import Offline, Stored
from ctxcomp_rag.evaluation.bench.runs import BareRun, PrefixRun, Run, SplicedRun, bare_cache, read_cache
from ctxcomp_rag.evaluation.bench.workload import Workload
from ctxcomp_rag.spans import MemorySpan, SoftSpan, SpanSpec

RAW: Final = "raw"
LIMIT: Final = "question-only"
ROWS: Final = (
    RAW, "raw-fast-attention", "raw-int8", "full-kv", "prefix-same-order", "prefix-reordered",
    "soft-4x", "soft-16x", "soft-64x", "prerolled-4x", "prerolled-16x", "infinipot-kv-4x", "infinipot-kv-16x",
    "soft-16x-int8", LIMIT)
_NEVER: Final = frozenset({-1})  # no token ends an answer: every row generates as many
_NAME = re.compile(r"(raw|full-kv|prefix-same-order|prefix-reordered|question-only|(soft|prerolled|infinipot-kv)-"
                   r"([1-9]\d*)x)(-fast-attention)?(-int8)?")


@dataclass(frozen=True, eq=False)
class Row:
    """One way to read the workload.

    Attributes:
        start: a new run of it.
        ideal: a bare run over as many positions of the same kind, all of it ready in memory; None where the row is a
            bare run itself.
        stored: what it reads from an index.
    """

    name: str
    start: Callable[[], Run]
    ideal: Callable[[], Run] | None = None
    stored: Stored | None = None
    in_process: ClassVar[bool] = True

    def timed(self, new_tokens: int) -> Timing:
        """One answer."""
        return clocked(self.start(), new_tokens)


@dataclass(eq=False)
class Rows:
    """Makes rows; what several of them share is made once.

    A row's name ends in `-fast-attention` or `-int8` (different numerics) where the decoder is accelerated.
    """

    backbone: Backbone
    workload: Workload
    folder: Path
    _decoders: dict[tuple[bool, bool], Backbone] = field(default_factory=dict)
    _stores: dict[str, Stored] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """Raises InputError for a name that is no row."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise InputError(f"there is no row {name!r}; expected one of {', '.join(ROWS)}, other factors, or one of "
                             "them with -fast-attention or -int8 at its end")
        what, kind, _, fast, int8 = found.groups()
        backbone = self._decoder(fast is not None, int8 is not None)
        if kind is None and what != "full-kv":
            return Row(name, self._bare(what, backbone))
        stored = self._stored(what)
        fetch, embedded = self._fetching(kind, stored)
        decoder = FrozenDecoder(backbone, end_ids=_NEVER)
        ideal = self._ideal(backbone, stored.spans(), embedded)
        return Row(name, partial(SplicedRun, decoder, fetch, self.workload.new_tokens), ideal, stored)

    def _decoder(self, fast: bool, int8: bool) -> Backbone:
        made = self._decoders.get((fast, int8))
        if made is None:
            made = self.backbone.accelerated(attention=fast, int8=int8) if fast or int8 else self.backbone
            self._decoders[fast, int8] = made
        return made

    @cached_property
    def _chunks(self) -> list[list[int]]:
        return self.workload.chunk_ids(int(self.backbone.config.vocab_size))

    @cached_property
    def _question(self) -> list[int]:
        return self.workload.question_ids(int(self.backbone.config.vocab_size))

    def _bare(self, what: str, backbone: Backbone) -> Callable[[], Run]:
        text = [token for ids in self._chunks for token in ids]
        if what in (RAW, LIMIT):
            ids = torch.tensor([self._question if what == LIMIT else [*text, *self._question]])
            return lambda: BareRun(backbone, ids)
        kept = (text, read_cache(backbone, text))
        chunks = self._chunks if what == "prefix-same-order" else self._chunks[::-1]
        prompt = [*(token for ids in chunks for token in ids), *self._question]
        return lambda: PrefixRun(backbone, prompt, kept)

    def _stored(self, what: str) -> Stored:
        """The spans that a row reads; pre-rolled ones lie in the index as soft spans."""
        what = what.replace("prerolled", "soft")
        if what not in self._stores:
            offline = self._offline
            factor = int(re.sub(r"\D", "", what) or 1)
            self._stores[what] = (offline.full() if what == "full-kv" else
                                  offline.soft(factor) if what.startswith("soft") else offline.infinipot(factor))
        return self._stores[what]

    @cached_property
    def _offline(self) -> Offline:
        return Offline(self.backbone, self.workload, self.folder)

    def _fetching(self, kind: str | None, stored: Stored) -> tuple[Callable[[], Sequence[Part]], bool]:
        """What fetches the parts of a prompt, and whether its slots go through the decoder."""
        question = TokenIds(tuple(self._question))
        spec: SpanSpec = stored.index.spec
        if kind != "soft":
            _ = self.backbone.rope  # the model is asked once whether its keys can be moved
        if kind == "prerolled":
            hot = PrerolledSpans(self.backbone, spec, 2**32)
            for span in stored.spans():
                hot.get(span)
            return lambda: [*map(hot.get, stored.spans()), question], False
        return lambda: [*(part for span in stored.spans() for part in enclosed(span, spec)), question], kind == "soft"

    def _ideal(self, backbone: Backbone, spans: Sequence[MemorySpan], embedded: bool) -> Callable[[], Run]:
        if not embedded:
            entries, ids = sum(span.num_slots for span in spans), torch.tensor([self._question])
            return lambda: BareRun(backbone, ids, bare_cache(backbone, entries))
        rows = [span.embeds for span in spans if isinstance(span, SoftSpan)]
        embeds = torch.cat([*rows, backbone.embed(torch.tensor(self._question))])[None]
        return lambda: BareRun(backbone, embeds)
