"""Tasks about plain texts: reading them out of their spans, and going on after them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.tasks.base import Ask, Asked, Task, TaskData
from ctxcomp_rag.records import field, read_lines

_SHORTEST = 40  # characters on either side of a continuation's beginning
_CONTEXT, _CONTINUATION = 600, 200  # characters: what a small window takes


class Reconstruction(Task):
    """Every chunk read out of its span; generated documents, or the `text` of JSON lines."""

    name: ClassVar[str] = "reconstruction"
    file: ClassVar[str] = "texts.jsonl"
    ask: ClassVar[Ask] = "repeat"

    def load(self, data: Path | None, limit: int, seed: int) -> TaskData:
        if data is None:
            texts = [d.text for d in generate_corpus(limit, seed, "held_out")]
        else:
            texts = drawn_texts(self.path(data), limit, seed)
        documents = tuple(Document(str(i), text) for i, text in enumerate(texts))
        asked = tuple(Asked("Repeat the text.", (d.text,), (d.id,)) for d in documents)
        return TaskData(documents, asked, measures=("bleu", "rouge_l", "numbers", "names"), ask=self.ask)


class Perplexity(Task):
    """How well the decoder foresees what follows a text, from the text, its span, or nothing."""

    name: ClassVar[str] = "perplexity"
    file: ClassVar[str] = "texts.jsonl"
    ask: ClassVar[Ask] = "continue"

    def load(self, data: Path | None, limit: int, seed: int) -> TaskData:
        texts = [t for t in drawn_texts(self.path(data), limit, seed) if len(t) >= 2 * _SHORTEST]
        if not texts:
            raise InputError(f"expected texts of at least {2 * _SHORTEST} characters for task {self.name!r}; all are "
                             "shorter")
        documents, asked = [], []
        for i, text in enumerate(texts):
            cut = min(len(text) * 3 // 4, _CONTEXT)
            cut = text.rfind(" ", _SHORTEST, cut) if " " in text[_SHORTEST:cut] else cut
            documents.append(Document(str(i), text[:cut]))
            asked.append(Asked("Go on.", (text[cut : cut + _CONTINUATION],), (str(i),)))
        return TaskData(tuple(documents), tuple(asked), measures=("perplexity",), ask=self.ask)


def drawn_texts(path: Path, limit: int, seed: int) -> list[str]:
    """The `text` of lines drawn by the seed; raises InputError for a line without."""
    lines = list(read_lines(path))
    drawn = [(place, field(record, "text", str, place))
             for place, record in random.Random(seed).sample(lines, min(limit, len(lines)))]
    empty = next((place for place, text in drawn if not text.strip()), None)
    if empty:
        raise InputError(f"{empty}: the text is empty")
    if not drawn:
        raise InputError(f"{str(path)!r} holds no text")
    return [text for _, text in drawn]
