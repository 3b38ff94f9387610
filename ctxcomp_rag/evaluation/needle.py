"""A needle in a haystack: one fictional document among others, asked for, at any depth of contexts of any length."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, Part, TokenIds
from ctxcomp_rag.decoding.splice import lay_out
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.metrics import exact_match
from ctxcomp_rag.kv.scores import InfiniPot, ScoringRule, SnapKV, StreamingLLM
from ctxcomp_rag.pipeline import prompt_parts

_SETTINGS = GenerationSettings(max_new_tokens=24)
_SHORTEST_DOCUMENT = 60  # tokens; only says how many documents are made to choose from


@dataclass(frozen=True)
class Haystack:
    """Documents' texts in prompt order, and a question that one of them answers."""

    texts: tuple[str, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Reader:
    """A way to read what is longer than the cache.

    Attributes:
        kind: "full" reads everything, "cut" the beginning and the end of the context, "budget" everything within a
            cache that forgets by `rule`.
        asks: whether the question is known while reading.
    """

    name: str
    kind: str
    rule: ScoringRule | None = None
    asks: bool = False


READERS = (
    Reader("full_cache", "full"),
    Reader("infinipot_question", "budget", InfiniPot(), asks=True),
    Reader("infinipot_generic", "budget", InfiniPot()),
    Reader("snapkv", "budget", SnapKV()),
    Reader("tova", "budget", SnapKV(window=1, kernel=1)),
    Reader("streaming_llm", "budget", StreamingLLM()),
    Reader("truncation", "cut"),
)
"""`tova` is like TOVA: the attention of the last token decides, but for each head on its own."""


def haystack(backbone: Backbone, num_tokens: int, depth: float, seed: int) -> Haystack:
    """At most `num_tokens` of whole documents, the asked one at `depth` (0.0 first, 1.0 last) among them.

    The others are of other kinds, so that what is measured is the reading, and not how well a decoder tells documents
    of a kind apart.
    """
    needle, *corpus = generate_corpus(4 + 5 * num_tokens // (4 * _SHORTEST_DOCUMENT), seed, "held_out")
    others = [d for d in corpus if d.kind != needle.kind]
    encode = backbone.tokenizer.encode
    separator = len(encode("\n\n"))
    left = num_tokens - len(encode(needle.text))
    chosen: list[str] = []
    for other in others:
        left -= len(encode(other.text)) + separator
        if left < 0:
            break
        chosen.append(other.text)
    place = round(depth * len(chosen))
    asked = random.Random(seed).choice(needle.questions)
    return Haystack((*chosen[:place], needle.text, *chosen[place:]), asked.question, asked.answer)


class NeedleTest:
    """One way of reading with one decoder and one cache size."""

    def __init__(self, backbone: Backbone, reader: Reader, budget: int) -> None:
        self.backbone, self.reader, self.budget = backbone, reader, budget
        self.decoder = (FrozenDecoder(backbone, cache_budget=budget, cache_rule=reader.rule)
                        if reader.kind == "budget" else FrozenDecoder(backbone))

    def found(self, hay: Haystack) -> float | None:
        """1.0 for the right answer, 0.0 for another; None where a full cache does not fit into the window."""
        parts = self.prompt(hay)
        room = self.backbone.max_positions - _SETTINGS.max_new_tokens
        if self.reader.kind == "full" and lay_out(parts, self.backbone).num_positions > room:
            return None
        made = self.decoder.generate(parts, _SETTINGS, question=hay.question if self.reader.asks else None)
        return exact_match(made.text, (hay.answer,))

    def prompt(self, hay: Haystack) -> list[Part]:
        """What the decoder is given; a "cut" one, answer included, is no longer than the cache."""
        if self.reader.kind != "cut":
            return prompt_parts(self.backbone, hay.question, [[text] for text in hay.texts])
        ids = self.backbone.tokenizer.encode("\n\n".join(hay.texts))
        around = lay_out(prompt_parts(self.backbone, hay.question, [[TokenIds(())]]), self.backbone).num_positions
        room = min(self.budget - around - _SETTINGS.max_new_tokens, len(ids))
        if room < 2:
            raise InputError(f"a cache of {self.budget} entries has no room for context beside the question and an "
                             f"answer of {_SETTINGS.max_new_tokens} tokens; expected at least "
                             f"{around + _SETTINGS.max_new_tokens + 2}")
        head = room - room // 2
        return prompt_parts(self.backbone, hay.question, [[TokenIds((*ids[:head], *ids[len(ids) - room + head :]))]])


__all__ = ["READERS", "Haystack", "NeedleTest", "Reader", "haystack"]
