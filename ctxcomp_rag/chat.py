"""SpanChat: chat messages whose content carries references to spans, answered by one shared decoder.

What a framework's model class calls. Everything in a message is untrusted: text stays text, and a reference is
resolved in the scope of the call or, as configured, kept as the text it stands for.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn, Self

from ctxcomp_rag.backbone import Backbone, load_frozen
from ctxcomp_rag.compressors import Compressor, decoder_of, load_reader
from ctxcomp_rag.decoding import (
    FrozenDecoder,
    GenerationSettings,
    Message,
    Part,
    PrerolledSpans,
    PromptUsage,
    RequestScheduler,
    Ticket,
    enclosed,
    render_chat,
)
from ctxcomp_rag.errors import IndexFolderError, InputError, SpanReferenceError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.references import SpanReferences, find_references, has_cut_reference
from ctxcomp_rag.spans import KVSpan, MemorySpan

logger = logging.getLogger(__name__)
OnInvalid = Literal["text", "raise"]
OnError = Literal["text", "raise"]
_CUT = ("a reference to a span was cut; do not split text that holds references (chunk_size below the length of one "
        "reference)")


@dataclass(frozen=True)
class SpanReference:
    """A reference in the content of a message.

    Attributes:
        reference: what `SpanReferences.mint` returned.
        text: what to show where the reference is refused or its chunk is gone; the reference itself, as text, where
            there is nothing better.
        cut: it is text that only spells the beginning or the end of a reference, and is refused as such.
    """

    reference: str
    text: str | None = None
    cut: bool = False


Content = str | SpanReference


@dataclass(frozen=True)
class ChatTurn:
    """One message: a role and its content, text and references in any order."""

    role: str
    content: tuple[Content, ...]

    def __post_init__(self) -> None:
        whole = isinstance(self.content, str | SpanReference)  # a string would be read letter by letter
        object.__setattr__(self, "content", (self.content,) if whole else tuple(self.content))


@dataclass(frozen=True, eq=False)
class ChatPrompt:
    """A prompt made ready: the decoder's parts, the chunks that were spliced, and the references that were refused.

    Attributes:
        rejected: how many references are shown as text, by reason.
        prerolled_now: slots that are keys and values since this prompt only, and not from storage.
        sources: the texts behind the references, spliced or shown.
    """

    parts: tuple[Part, ...]
    chunk_ids: tuple[str, ...]
    rejected: Counter[str] = field(default_factory=Counter)
    prerolled_now: int = 0
    sources: tuple[str, ...] = ()

    def cache_read(self, usage: PromptUsage) -> int:
        """Positions of the prompt whose keys and values were stored before: those that cost no layer."""
        return usage.cached - self.prerolled_now


class SpanChat:
    """Chat over spans: one index, one decoder, one set of references, any number of callers.

    What others commit to the index while it is open is seen by the next prompt: a chunk that they deleted is not
    spliced any more. Belongs to its process: open one in each, after a fork.

    Args:
        backbone: the frozen decoder.
        index: where the spans are.
        compressor: converts latent spans (see `load_reader`); others are read without.
        references: made for this index; by default a registry of this process.
        on_invalid: what happens to a reference that is refused: kept as text, or raised.
        max_batch: requests that decode together.
        prerolled_bytes: main memory for the most used soft spans as keys and values, see `CompressedRAG`.
    """

    def __init__(self, backbone: Backbone, index: MemoryIndex, *, compressor: Compressor | None = None,
                 references: SpanReferences | None = None, on_invalid: OnInvalid = "text", max_batch: int = 8,
                 prerolled_bytes: int = 0) -> None:
        self.spec = compressor.reading(index.spec) if compressor else index.spec
        self.spec.require_decoder(backbone.fingerprint)
        if on_invalid not in ("text", "raise"):
            raise InputError(f"expected on_invalid='text' or 'raise', got {on_invalid!r}")
        self.backbone, self.index, self.compressor, self.on_invalid = backbone, index, compressor, on_invalid
        self.references = SpanReferences(uuid.uuid4().hex) if references is None else references
        self.scheduler = RequestScheduler(FrozenDecoder(backbone), max_batch=max_batch)
        self.prerolled = PrerolledSpans(backbone, self.spec, prerolled_bytes) if prerolled_bytes else None

    @classmethod
    def open(cls, path: str | Path, *, model: str | Path | None = None, compressor: str | Path | None = None,
             references: SpanReferences | None = None, on_invalid: OnInvalid = "text", max_batch: int = 8,
             prerolled_bytes: int = 0) -> Self:
        """Open an index for reading.

        Args:
            model: where the decoder is [default: the one that the index names, or for latent spans the compressor].
            compressor: folder of the saved compressor that converts latent spans; others are read without.
        """
        index = MemoryIndex.open(path, read_only=True)
        decoder = index.spec.require_reader() if compressor is None else index.spec.reader or decoder_of(compressor)
        backbone = load_frozen(model if model is not None else decoder.model_id, revision=decoder.revision or None,
                               dtype=decoder.dtype)
        reader = load_reader(compressor, backbone) if compressor is not None else None
        return cls(backbone, index, compressor=reader, references=references, on_invalid=on_invalid,
                   max_batch=max_batch, prerolled_bytes=prerolled_bytes)

    @staticmethod
    def require(chat: object) -> SpanChat:
        """`chat`; raises InputError where it is something else, the folder of an index say."""
        if not isinstance(chat, SpanChat):
            raise InputError(f"expected a SpanChat, got {type(chat).__name__} {chat!r:.80}; open one with "
                             "SpanChat.open(folder)")
        return chat

    def prompt(self, turns: Sequence[ChatTurn], scope: str, *, on_error: OnError = "text") -> ChatPrompt:
        """Resolve the references and lay the messages out with the model's chat template.

        Args:
            on_error: what happens to a good reference whose span cannot be read (a damaged file, say): it is shown as
                the text it stands for, logged, and counted as "damaged"; or the error is raised.

        Raises:
            SpanReferenceError: a reference was refused and `on_invalid` is "raise".
            IndexFolderError: a span cannot be read and `on_error` is "raise".
            InputError: there is no message with content.
        """
        self.scheduler.require_own_process()
        if on_error not in ("text", "raise"):
            raise InputError(f"expected on_error='text' or 'raise', got {on_error!r}")
        resolver = _Resolver(self, scope, on_error)
        messages = [Message(t.role, tuple(p for c in t.content for p in resolver.read(c))) for t in turns]
        messages = [m for m in messages if m.content]
        if not messages:
            raise InputError("expected at least one message with content, got none")
        parts = render_chat(self.backbone.tokenizer, messages)
        return ChatPrompt(tuple(parts), tuple(resolver.chunk_ids), resolver.rejected, resolver.prerolled_now,
                          tuple(resolver.sources))

    def with_references(self, text: str) -> tuple[Content, ...]:
        """Text in which a framework's chain has put references, as content.

        What spells the beginning of a reference and is none, because a splitter has cut it or somebody has typed it,
        is for `prompt` to refuse: it stays text, or raises, as `on_invalid` says.
        """
        pieces = find_references(text)
        return tuple(SpanReference(p) if i % 2 else SpanReference(p, p, cut=True) if has_cut_reference(p) else p
                     for i, p in enumerate(pieces) if p)

    def submit(self, prompt: ChatPrompt, settings: GenerationSettings | None = None, *, quote: bool = False) -> Ticket:
        """Queue a prompt for the shared decoder; see `RequestScheduler.submit`.

        Args:
            quote: the answer is a run of words of the prompt's sources, or a refusal (see `GenerationSettings`). What
                refers to no span, a chain's call that condenses a question say, is answered freely.

        Raises:
            SpanReferenceError: the answer is to quote and all of the prompt's references were refused.
        """
        if quote and prompt.rejected and not prompt.sources:
            raise SpanReferenceError("unquotable", "every reference to a span in this prompt was refused, and there is "
                                     "nothing to quote from; mint the references again, or leave quote out")
        if quote and prompt.sources:
            settings = replace(settings or GenerationSettings(), quote_from=prompt.sources)
        return self.scheduler.submit(prompt.parts, settings)

    def count(self, prompt: ChatPrompt) -> int:
        """Positions that a prompt takes in the decoder's cache, slots included."""
        return self.scheduler.decoder.splice(prompt.parts).usage.positions

    def close(self) -> None:
        """Finish what was submitted and close the index."""
        self.scheduler.close()
        self.index.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SpanChat belongs to its process and cannot be pickled or copied; open one in each process")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Resolver:
    """Content to parts, for one prompt: a chunk is spliced once."""

    def __init__(self, chat: SpanChat, scope: str, on_error: OnError) -> None:
        self.chat, self.scope, self.on_error = chat, scope, on_error
        self.chunk_ids: list[str] = []
        self.rejected: Counter[str] = Counter()
        self.sources: list[str] = []
        self.prerolled_now = 0
        self._refreshed = chat.index.is_writer  # then nobody else commits

    def read(self, content: Content) -> list[Part]:
        if isinstance(content, str):
            return [content] if content else []
        try:
            if content.cut:
                raise self.chat.references.refused("cut", _CUT)
            chunk_id = self.chat.references.resolve(content.reference, self.scope)
            if chunk_id in self.chunk_ids:
                raise self.chat.references.refused("duplicate", "a span was referred to twice in one prompt")
            span = self._span(chunk_id)
        except SpanReferenceError as error:
            if self.chat.on_invalid == "raise":
                raise
            return self._as_text(content, error.reason)
        except IndexFolderError as error:
            refusal = self.chat.references.refused("damaged", "the span behind a reference cannot be read")
            if self.on_error == "raise":
                raise
            logger.warning("a span stays text: %s", error)
            return self._as_text(content, refusal.reason)
        self.chunk_ids.append(chunk_id)
        return self._parts(span)

    def _as_text(self, content: SpanReference, reason: str) -> list[Part]:
        self.rejected[reason] += 1
        self.sources += [content.text] if content.text and content.text.strip() and not content.cut else []
        return self.read(str(content.reference) if content.text is None else content.text)

    def _parts(self, span: MemorySpan) -> list[Part]:
        prerolled = self.chat.prerolled
        if prerolled is None or isinstance(span, KVSpan):
            return enclosed(span, self.chat.spec)
        stored = span in prerolled
        made = prerolled.get(span)
        self.prerolled_now += 0 if stored else made.num_slots
        return [made]

    def _span(self, chunk_id: str) -> MemorySpan:
        if not self._refreshed:
            self.chat.index.refresh()
            self._refreshed = True
        try:
            found = self.chat.index.get([chunk_id])[0]
        except InputError:  # asked for and not looked up before: it may be deleted at any moment
            raise self.chat.references.refused("deleted", "the chunk behind a reference was deleted from the index"
                                               ) from None
        self.sources.append(found.chunk.text)
        return self.chat.compressor.read(found.span, found.chunk) if self.chat.compressor else found.span


class Stripper:
    """Takes white space off both ends of a text that arrives in pieces."""

    def __init__(self) -> None:
        self.text = ""
        self._held = ""

    def feed(self, piece: str) -> str:
        """What of the text so far may be shown now, and was not before."""
        piece = self._held + piece if self.text else piece.lstrip()
        shown = piece.rstrip()
        self._held = piece[len(shown) :]
        self.text += shown
        return shown


def with_references(text: str) -> tuple[Content, ...]:
    """Text in which references may stand (a framework's context that our parts filled), as content.

    Raises:
        SpanReferenceError: a reference was cut in two, by a text splitter say.
    """
    pieces = find_references(text)
    if any(has_cut_reference(piece) for piece in pieces[::2]):
        raise SpanReferenceError("cut", _CUT)
    return tuple(SpanReference(p) if i % 2 else p for i, p in enumerate(pieces) if p)


def context_places(roles: Sequence[str]) -> set[int]:
    """Where a framework's chain puts its context, and so where references may be looked for in text.

    The last "user" message, the "system" messages beside it, and those that open the conversation. What was said
    before, and system messages in between (a memory may have written them from what users said), are history.
    """
    system = [role == "system" for role in roles]
    opening = next((i for i, s in enumerate(system) if not s), len(roles))
    if "user" not in roles:
        return set(range(opening))
    last = max(i for i, role in enumerate(roles) if role == "user")
    before = next((i for i in range(last - 1, -1, -1) if not system[i]), -1)
    after = next((i for i in range(last + 1, len(roles)) if not system[i]), len(roles))
    return {*range(opening), *range(before + 1, after)}


__all__ = ["ChatPrompt", "ChatTurn", "OnError", "SpanChat", "SpanReference", "Stripper", "context_places",
           "with_references"]
