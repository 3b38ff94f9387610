"""CompressedRAG: chunk, compress and index documents once; answer from the spliced spans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from ctxcomp_rag.backbone import EMBEDDED_MODEL, Backbone, load_frozen
from ctxcomp_rag.chunking import Chunk, Document
from ctxcomp_rag.compressors import (
    Compressor,
    decoder_of,
    load_reader,
    load_trained_compressor,
)
from ctxcomp_rag.decoding import (
    Blended,
    FrozenDecoder,
    GenerationSettings,
    Message,
    Part,
    PrerolledSpans,
    PromptUsage,
    Text,
    TokenIds,
    enclosed,
    question_prompt,
    reconstruction_prompt,
    render_chat,
)
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index import MemoryIndex, RetrievedSpan
from ctxcomp_rag.index.object_store import require_folder
from ctxcomp_rag.jobs import IndexReport, Progress, SpanWorker, ThreadWorker, precompress
from ctxcomp_rag.reading import Reading
from ctxcomp_rag.retention import with_retention
from ctxcomp_rag.retrieval import DEFAULT_ENCODER, RetrievalEncoder, embed_texts, encoder_name, load_retrieval_encoder
from ctxcomp_rag.slot_budget import Share
from ctxcomp_rag.spans import KVSpan, MemorySpan, SpanSpec

Mode = Literal["spans", "text", "truncated", "none"]
MODES: tuple[Mode, ...] = ("spans", "text", "truncated", "none")
DEFAULT_TOP_K = 3
_WHOLE = Reading()


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer, the chunks it was read from, what the prompt and the answer cost, and the chunks that were retrieved
    but did not fit the slot budget."""

    text: str
    sources: tuple[RetrievedSpan, ...]
    usage: PromptUsage
    completion_tokens: int
    finish_reason: str
    dropped: tuple[RetrievedSpan, ...] = ()


class CompressedRAG:
    """Retrieval-augmented generation over compressed chunks.

    Args:
        backbone: the frozen decoder.
        index: an open index whose spans were made for this decoder, or latent spans that `compressor` reads.
        encoder: anything with `.encode(list[str])`, the same one that made the index's vectors.
        compressor: needed to index, and to read latent spans; reading others does without.
        prerolled_bytes: main memory for the most used spans as keys and values that skip the decoder's layers at query
            time (see `ctxcomp_rag.decoding.preroll`); 0 splices every span as it is stored.
        cache_budget: bound on the decoder's cache entries, see `FrozenDecoder`.

    Raises:
        IncompatibleSpanError: the index holds spans for another decoder, or latent spans that cannot be converted.
    """

    def __init__(self, backbone: Backbone, index: MemoryIndex, encoder: RetrievalEncoder,
                 compressor: Compressor | None = None, *, prerolled_bytes: int = 0,
                 cache_budget: int | None = None) -> None:
        self.spec = compressor.reading(index.spec) if compressor else index.spec
        self.spec.require_decoder(backbone.fingerprint)
        name = encoder_name(encoder)
        if index.retrieval_encoder != name:
            raise InputError(f"the index in {index.location!r} was made with the retrieval encoder "
                             f"{index.retrieval_encoder!r}, got {name!r}; pass the one the index was made with")
        self.backbone, self.memory, self.encoder = backbone, index, encoder
        self.compressor = compressor.writer(index.spec) if compressor else None
        self.decoder = FrozenDecoder(backbone, cache_budget=cache_budget)
        ends = self.spec.end_ids
        self._span_decoder = FrozenDecoder(backbone, cache_budget=cache_budget, end_ids=ends) if ends else self.decoder
        self.prerolled = PrerolledSpans(backbone, self.spec, prerolled_bytes) if prerolled_bytes else None

    @classmethod
    def create(cls, path: str | Path, *, model: str | Path = EMBEDDED_MODEL, compressor: str | Path = "icae",
               budget: str | None = None, encoder: RetrievalEncoder | str | None = None,
               codec: str | None = None, latent: bool = False, retention: bool = False,
               target_retention: float | None = None) -> Self:
        """Start a new index, or go on with one that the same decoder and compressor made.

        Args:
            model: see `load_frozen`.
            compressor: "icae" or "pcc", the trained compressors of the embedded model; "icae-nested", its trained one
                whose spans can be read at 4x, 8x and 16x; "infinipot", which needs no training, for any full-attention
                RoPE decoder; or the folder of a saved compressor.
            budget: size of a chunk's span, for methods that need no training: "256slots", "64KiB" or "4x".
            latent: a new index holds the memory of the compressor's encoder, which every decoder with a converter for
                it reads; an index that exists says itself what it holds.
            codec: how a new index stores spans (see `ctxcomp_rag.index.codecs`, `DEFAULT_CODEC` by default).
            retention: measure what each span that is added retains (see `ctxcomp_rag.retention`).
            target_retention: give each chunk the fewest slots that retain this share of its facts.
        """
        require_folder(path)
        index = MemoryIndex.open(path) if Path(path).is_dir() and any(Path(path).iterdir()) else None
        # an index fixes the dtype: spans of float32 and of bfloat16 weights are not the same
        reader = index.spec.reader if index is not None else None
        backbone = load_frozen(model, dtype=reader.dtype if reader else None)
        maker = load_trained_compressor(compressor, backbone, budget)
        maker = maker.latent if latent else maker.writer(index.spec) if index is not None else maker
        maker = with_retention(maker, measured=retention, target=target_retention)
        retriever = load_retrieval_encoder(encoder or DEFAULT_ENCODER)
        if index is not None:  # an empty one is false
            index.spec.require_compressor(maker.spec)
            if codec not in (None, index.codec):
                raise InputError(f"the index in {str(path)!r} stores spans with codec {index.codec!r}, got {codec!r}; "
                                 "leave the codec out, or make another index")
        else:
            size = embed_texts(retriever, ["size"]).shape[1]
            index = MemoryIndex.create(path, maker.spec, vector_size=size, retrieval_encoder=encoder_name(retriever),
                                       codec=codec)
        return cls(backbone, index, retriever, maker)

    @classmethod
    def open(cls, path: str | Path, *, model: str | Path | None = None,
             encoder: RetrievalEncoder | str | None = None, compressor: str | Path | None = None,
             prerolled_bytes: int = 0, cache_budget: int | None = None) -> Self:
        """Open an index for reading.

        Args:
            model: where the decoder is [default: the one that the index names, or for latent spans the compressor].
            compressor: folder of the saved compressor that converts latent spans; others are read without. Only what
                reading takes is loaded: its encoder is not.
        """
        index = MemoryIndex.open(path, read_only=True)
        decoder = index.spec.require_reader() if compressor is None else index.spec.reader or decoder_of(compressor)
        backbone = load_frozen(model if model is not None else decoder.model_id, revision=decoder.revision or None,
                               dtype=decoder.dtype)
        return cls(backbone, index, load_retrieval_encoder(encoder or index.retrieval_encoder),
                   load_reader(compressor, backbone) if compressor is not None else None,
                   prerolled_bytes=prerolled_bytes, cache_budget=cache_budget)

    # -- offline -----------------------------------------------------------------------------------------------------

    def index(self, documents: Iterable[Document], *, factor: float | None = None, overlap_tokens: int = 0,
              max_chunk_tokens: int | None = None, on_error: Literal["stop", "skip"] = "stop",
              progress: Callable[[int, int], None] | None = None) -> IndexReport:
        """Chunk, compress and store documents (see `ctxcomp_rag.jobs.precompress`). Running it again adds only what
        is missing.

        A document whose id is known already is replaced: chunks that its new text no longer has are deleted.

        Args:
            factor: compression factor, e.g. 4.0; the compressor's own by default.
            on_error: "skip" reports a document that cannot be used in `failures` and goes on.
            progress: called with (documents, source tokens) after every commit: what came in since the last call.
        """
        if self.compressor is None or self.memory.read_only:
            raise InputError("this index was opened for reading; use CompressedRAG.create(path) to add documents")
        committed = Progress()

        def advance(now: Progress) -> None:
            nonlocal committed
            if progress:
                progress(now.documents - committed.documents, now.source_tokens - committed.source_tokens)
            committed = now

        worker = SpanWorker(self.compressor, self.encoder, factor=factor)
        return precompress(documents, self.memory, self.compressor, ThreadWorker(worker), factor=factor,
                           overlap_tokens=overlap_tokens, max_chunk_tokens=max_chunk_tokens, on_error=on_error,
                           progress=advance)

    # -- online ------------------------------------------------------------------------------------------------------

    def retrieve(self, question: str, *, top_k: int = DEFAULT_TOP_K,
                 where: Mapping[str, Any] | None = None) -> list[RetrievedSpan]:
        """The chunks nearest to a question, best first."""
        if not question.strip():
            raise InputError("the question is empty")
        if not len(self.memory):
            raise InputError(f"the index in {self.memory.location!r} holds no documents; run ctxcomp precompress "
                             "PATH... --out DIR first")
        return self.memory.search(embed_texts(self.encoder, [question]), top_k, where=where)[0]

    def prompt(self, question: str, sources: Sequence[RetrievedSpan], mode: Mode = "spans", *,
               blend: float = 0.0, reading: Reading = _WHOLE, history: Sequence[Message] = ()) -> list[Part]:
        """The parts of the prompt that answers `question` from `sources`, after `history` (see `prompt_parts`)."""
        contents: list[list[Part]] = []
        for source in sources:
            if mode == "spans" and not reading.as_text(source):
                contents.append(self._content(source, blend))
            elif mode in ("spans", "text"):
                contents.append([source.chunk.text])
            elif mode == "truncated":
                contents.append([truncated_part(self.backbone, source.chunk, self.read(source).num_slots)])
        return prompt_parts(self.backbone, question, contents, self.spec if mode == "spans" else None, history)

    def _reader(self, mode: Mode) -> FrozenDecoder:
        """Answers from spans end where the compressor's layout says, others where the model does."""
        return self._span_decoder if mode == "spans" else self.decoder

    def read(self, source: RetrievedSpan) -> MemorySpan:
        """The span of a retrieved chunk as the decoder takes it: converted where the index holds latent spans."""
        return self.compressor.read(source.span, source.chunk) if self.compressor else source.span

    def _content(self, source: RetrievedSpan, blend: float) -> list[Part]:
        span = self.read(source)
        if blend and (self.prerolled is None or isinstance(span, KVSpan)):
            return blended(source, blend)
        if self.prerolled is None:
            return enclosed(span, self.spec)
        return [self.prerolled.blended(span, blend) if blend else self.prerolled.get(span)]

    def answer(self, question: str, *, mode: Mode = "spans", top_k: int = DEFAULT_TOP_K,
               where: Mapping[str, Any] | None = None, settings: GenerationSettings | None = None,
               blend: float = 0.0, factor: float | None = None, slot_budget: int | None = None,
               share: Share = "uniform", min_retention: float | None = None, quote: bool = False) -> Answer:
        """Retrieve, splice and generate.

        Args:
            mode: what stands for the retrieved chunks: their spans, their text, the text truncated to the number of
                positions that the spans take, or nothing.
            blend: fraction of the slots of KV spans and of pre-rolled ones to compute anew, so that the chunks see
                each other (see `Blended`); 0 leaves the spans independent.
            factor, slot_budget, share, min_retention: how the spans are read, see `ctxcomp_rag.reading.Reading`.
            quote: the answer is a run of words of the retrieved texts, or one of the settings' refusals. The decoder
                reads what `mode` says; the texts cost it nothing (see `GenerationSettings.quote_from`).
        """
        reading = Reading(factor, slot_budget, share, min_retention)
        sources, dropped = self._sources(question, mode, top_k, where, reading)
        settings = quoting(sources, settings) if quote else settings
        parts = self.prompt(question, sources, mode, blend=blend, reading=reading)
        made = self._reader(mode).generate(parts, settings, question=question)
        return Answer(made.text.strip(), tuple(sources), made.usage, made.completion_tokens, made.finish_reason,
                      tuple(dropped))

    def stream(self, question: str, *, mode: Mode = "spans", top_k: int = DEFAULT_TOP_K,
               where: Mapping[str, Any] | None = None, settings: GenerationSettings | None = None,
               blend: float = 0.0, factor: float | None = None, slot_budget: int | None = None,
               share: Share = "uniform", min_retention: float | None = None, quote: bool = False) -> Iterator[str]:
        """Like `answer`, in pieces of text as they are generated; close the iterator to cancel."""
        reading = Reading(factor, slot_budget, share, min_retention)
        sources, _ = self._sources(question, mode, top_k, where, reading)
        settings = quoting(sources, settings) if quote else settings
        parts = self.prompt(question, sources, mode, blend=blend, reading=reading)
        return without_leading_space(self._reader(mode).stream(parts, settings, question=question))

    def reconstruct(self, span: RetrievedSpan, *, max_new_tokens: int | None = None) -> str:
        """The text that the decoder reads out of a span, for a look at what compression kept."""
        read = self.read(span)
        limit = max_new_tokens or read.num_source_tokens + 16
        parts = reconstruction_prompt(read, self.spec)
        return self._span_decoder.generate(parts, GenerationSettings(max_new_tokens=limit)).text

    def _sources(self, question: str, mode: Mode, top_k: int, where: Mapping[str, Any] | None,
                 reading: Reading) -> tuple[list[RetrievedSpan], list[RetrievedSpan]]:
        """(retrieved chunks with the spans to read, those that the slot budget drops)."""
        if mode not in MODES:
            raise InputError(f"there is no mode {mode!r}; expected one of {', '.join(MODES)}")
        if not reading.whole and mode in ("text", "none"):
            raise InputError(f"factor, slot_budget and min_retention say how spans are read, and mode {mode!r} reads "
                             "none; leave them out, or use the mode 'spans'")
        sources = [] if mode == "none" else self.retrieve(question, top_k=top_k, where=where)
        return (sources, []) if reading.whole else reading.fit(sources, self.memory.spec)

    def close(self) -> None:
        """Save the index's search snapshot and release its lock."""
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prompt_parts(backbone: Backbone, question: str, contents: Sequence[Sequence[Part]],
                 spec: SpanSpec | None = None, history: Sequence[Message] = ()) -> list[Part]:
    """The one prompt layout: contents and question, in one user message of the model's chat template.

    Args:
        spec: of the spans among the contents; where it brings a layout of its own, that one.
        history: messages before the question's.

    Raises:
        InputError: there is a history and the layout of `spec` has no place for one.
    """
    if spec is not None and (own := question_prompt(question, contents, spec)) is not None:
        if history:
            raise InputError(f"the prompt that the compressor {spec.compressor} was trained with holds one question "
                             "and no conversation; send the question as the only message")
        return own
    body: list[Part] = []
    for content in contents:
        body += [*content, Text("\n\n")]
    # One part for "\n\nQuestion: ..." keeps the tokens that training saw; it may not be cut before the question.
    body = [*body[:-1], f"\n\nQuestion: {question}"]
    return render_chat(backbone.tokenizer, [*history, Message("user", tuple(body))])


def quoting(sources: Sequence[RetrievedSpan], settings: GenerationSettings | None) -> GenerationSettings:
    """The settings, for an answer that quotes from these chunks; raises InputError where there are none."""
    if not sources:
        raise InputError("there is nothing to quote from: no chunk was retrieved; leave quote out, or retrieve some "
                         "(any mode but 'none')")
    return replace(settings or GenerationSettings(), quote_from=tuple(s.chunk.text for s in sources))


def blended(source: RetrievedSpan, fraction: float) -> list[Part]:
    """A retrieved KV span to be blended; raises InputError for a soft span."""
    if not isinstance(source.span, KVSpan):
        raise InputError(f"only KV spans and pre-rolled ones can be blended, and the span of chunk {source.chunk.id!r} "
                         f"is a {source.span.kind} span; leave `blend` at 0, or pass prerolled_bytes")
    return [Blended(source.span, source.chunk.text, fraction)]


def truncated_part(backbone: Backbone, chunk: Chunk, num_tokens: int) -> TokenIds:
    """The first `num_tokens` tokens of a chunk: what plain text can say in the positions that a span takes."""
    return TokenIds(tuple(backbone.tokenizer.encode(chunk.text)[:num_tokens]))


def without_leading_space(pieces: Iterator[str]) -> Iterator[str]:
    """A stream without the white space before its first word (answers begin with a space token)."""
    started = False
    for piece in pieces:
        shown = piece if started else piece.lstrip()
        started = started or bool(shown)
        if shown:
            yield shown


__all__ = [
    "DEFAULT_TOP_K",
    "MODES",
    "Answer",
    "CompressedRAG",
    "IndexReport",
    "Mode",
    "load_trained_compressor",
    "prompt_parts",
    "truncated_part",
]
