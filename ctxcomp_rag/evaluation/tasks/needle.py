"""A needle in a haystack: one generated document among others of other kinds, at every depth of several lengths."""

from __future__ import annotations

import random
from itertools import cycle, islice, product
from pathlib import Path
from typing import ClassVar

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.tasks.base import Asked, Task, TaskData

LENGTHS, DEPTHS = (2, 4, 8), (0.0, 0.5, 1.0)
"""Documents in a haystack, and where among them the needle is (0.0 first, 1.0 last)."""


class Needle(Task):
    """The oracle gives the whole haystack; retrieval searches it."""

    name: ClassVar[str] = "needle"
    file: ClassVar[str] = ""

    def load(self, data: Path | None, limit: int, seed: int) -> TaskData:
        documents: list[Document] = []
        asked = []
        for number, (length, depth) in enumerate(islice(cycle(product(LENGTHS, DEPTHS)), limit)):
            own = seed * 1_000_003 + number  # another corpus for every question
            needle, *others = generate_corpus(4 * length + 4, own, "held_out")
            hay = [d for d in others if d.kind != needle.kind][: length - 1]
            place = round(depth * len(hay))
            made = [Document(f"{number}/{i}", d.text) for i, d in enumerate([*hay[:place], needle, *hay[place:]])]
            question = random.Random(own).choice(needle.questions)
            ids = tuple(d.id for d in made)
            documents += made
            asked.append(Asked(question.question, (question.answer,), ids, pool=ids,
                               about={"depth": depth, "documents": float(length)}))
        return TaskData(tuple(documents), tuple(asked))
