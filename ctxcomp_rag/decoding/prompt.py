"""Prompts as parts: text, spans and delimiter embeddings in any order, alone or inside chat messages.

Untrusted text stays text. A chat template is rendered with one random sentinel in the place of every part, split at
the sentinels, and only the template's own pieces may name control tokens.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from jinja2 import TemplateError
from torch import Tensor

from ctxcomp_rag.errors import InputError, UnsupportedModelError
from ctxcomp_rag.spans import KVSpan, MemorySpan, SoftSpan, SpanSpec
from ctxcomp_rag.tokenization import TextTokenizer


@dataclass(frozen=True)
class Text:
    """Text of a prompt. Only `trusted` text (a template's own) may name control tokens."""

    text: str
    trusted: bool = False


@dataclass(frozen=True)
class TokenIds:
    """Token ids, entered as they are."""

    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Delimiter:
    """Embedding rows (n, hidden_size) that a compressor brings along, such as [AE] or <mem>."""

    embeds: Tensor


@dataclass(frozen=True, eq=False)
class Blended:
    """A KV span of which a part is computed anew, so that it sees what stands before it (CacheBlend, 2405.16444).

    A span on its own was made without the prompt around it (mode `independent`, as TurboRAG). Blended, those slots
    whose keys miss the most at the seam are computed again from their tokens, in sight of everything before them.
    Fraction 0 is the span as it is, fraction 1 the exact prefill of its tokens.

    This needs slots that are one token each, in all layers and heads: a span that keeps every token, or one made by a
    rule on which the heads agree (nuc, streaming_llm); fraction 1 is then the prefill of the kept tokens. Slots whose
    heads hold different tokens (cap, infinipot) stand for a token at one position in one head and at another position
    in the next; no forward pass makes that, and the splice refuses them. A pre-rolled span has slots that are one row
    each; fraction 1 is then the soft span it was rolled from.

    Attributes:
        span: the span as it is stored.
        source: what it was made from, which a span does not carry: the text, its token ids, or the rows
            (num_slots, hidden_size) that were rolled.
        fraction: of its slots to compute anew, 0 to 1, rounded up.
    """

    span: KVSpan
    source: str | TokenIds | Tensor
    fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise InputError(f"the fraction of slots to compute anew goes from 0 to 1, got {self.fraction:g}")


Part: TypeAlias = str | Text | TokenIds | Delimiter | MemorySpan | Blended
"""One piece of a prompt; a plain `str` is untrusted text."""


@dataclass(frozen=True, eq=False)
class Message:
    """One chat message: a role and its content as parts."""

    role: str
    content: tuple[Part, ...]

    def __post_init__(self) -> None:
        if isinstance(self.content, str):  # a string is a sequence of strings: it would be read letter by letter
            object.__setattr__(self, "content", (self.content,))
        if not re.fullmatch(r"[A-Za-z][A-Za-z_-]*", self.role):
            raise InputError(f"expected a role such as 'user', 'assistant' or 'system', got {self.role!r}")


def enclosed(span: MemorySpan, spec: SpanSpec) -> list[Part]:
    """The span between the delimiters of its specification (none for a compressor that has none)."""
    around = {name: [Delimiter(rows)] if (rows := spec.delimiters.get(name)) is not None else []
              for name in ("before", "after")}
    return [*around["before"], span, *around["after"]]


def reconstruction_prompt(span: MemorySpan, spec: SpanSpec) -> list[Part]:
    """The prompt that asks the decoder to repeat the text behind a span.

    A specification with "before" and "after" has brackets, and they stay around the span: `<mem> slots </mem> <ae>`,
    the AE layout of PCC. An "after" without a "before" is no bracket but the hand-over to a question ([FT] of ICAE),
    which a reconstruction does not have: `slots [AE]`, the layout of ICAE v2. What a layout of the specification's own
    puts in front comes first (BOS for the official PCC).

    Raises:
        InputError: the specification has no "reconstruct" delimiter.
    """
    rows = spec.delimiters.get("reconstruct")
    if rows is None:
        raise InputError(f"the compressor {spec.compressor} brings no 'reconstruct' delimiter, so its spans cannot be "
                         "asked for their text")
    bracketed = spec.delimiters.keys() >= {"before", "after"}
    before = _ids(spec.layout.reconstruct_ids if spec.layout else ())
    return [*before, *(enclosed(span, spec) if bracketed else [span]), Delimiter(rows)]


def question_prompt(question: str | TokenIds, contents: Sequence[Sequence[Part]],
                    spec: SpanSpec) -> list[Part] | None:
    """The prompt in the specification's own layout; None where it leaves the question to the chat template.

    Args:
        question: token ids enter as the whole text after the spans.
        contents: the parts of each span, delimiters included (see `enclosed`).
    """
    layout = spec.layout
    if layout is None or layout.left_ids is None:
        return None
    asked = question if isinstance(question, TokenIds) else layout.question.replace("{question}", question)
    after = [Delimiter(spec.delimiters[layout.right_delimiter])] if layout.right_delimiter else []
    return [*_ids(layout.left_ids), *(part for content in contents for part in content), asked, *after,
            *_ids(layout.right_ids)]


def _ids(ids: tuple[int, ...]) -> list[Part]:
    return [TokenIds(ids)] if ids else []


def render_chat(tokenizer: TextTokenizer, messages: Sequence[Message], *,
                add_generation_prompt: bool = True) -> list[Part]:
    """Lay messages out with the model's chat template (or, without one, as "Role: content" paragraphs).

    Raises:
        UnsupportedModelError: the template drops, repeats or reorders a part of the content.
    """
    parts: list[Part] = [p for m in messages for p in m.content]
    nonce = secrets.token_hex(16)
    names = [f"ctxcomp{nonce}p{i}q" for i in range(len(parts))]
    cursor = iter(names)
    chat = [{"role": m.role, "content": "".join(next(cursor) for _ in m.content)} for m in messages]
    if tokenizer.hf.chat_template:
        try:
            rendered = str(tokenizer.hf.apply_chat_template(chat, tokenize=False,
                                                            add_generation_prompt=add_generation_prompt))
        except TemplateError as error:
            raise UnsupportedModelError(f"the chat template of this model refuses these messages: {error}") from error
    else:
        rendered = str(tokenizer.hf.bos_token or "")
        rendered += "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in chat)
        rendered += "\n\nAssistant:" if add_generation_prompt else ""
    pieces = re.split(f"(ctxcomp{nonce}p[0-9]+q)", rendered)
    if pieces[1::2] != names:
        raise UnsupportedModelError(
            "the chat template of this model does not show every message exactly once and in order; "
            "build the prompt from parts instead of messages"
        )
    laid_out: list[Part] = []
    for i, piece in enumerate(pieces):
        if i % 2:
            laid_out.append(parts[i // 2])
        elif piece:
            laid_out.append(Text(piece, trusted=True))
    return laid_out


def text_ids(part: str | Text | TokenIds, tokenizer: TextTokenizer) -> list[int]:
    """Token ids of a text part."""
    if isinstance(part, TokenIds):
        return list(part.ids)
    if isinstance(part, str):
        return tokenizer.encode(part)
    return tokenizer.encode_template(part.text) if part.trusted else tokenizer.encode(part.text)


__all__ = ["Blended", "Delimiter", "KVSpan", "Message", "Part", "SoftSpan", "Text", "TokenIds", "enclosed",
           "question_prompt", "reconstruction_prompt", "render_chat", "text_ids"]
