"""The generated fictional knowledge base: names and values that no model has met."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.tasks.base import Asked, Task, TaskData


class Home(Task):
    name: ClassVar[str] = "home"
    file: ClassVar[str] = ""

    def load(self, data: Path | None, limit: int, seed: int) -> TaskData:
        corpus = generate_corpus(limit, seed, "held_out")
        rng = random.Random(seed)
        asked = []
        for entry in corpus:
            q = rng.choice(entry.questions)
            begin = entry.text.find(q.answer)
            place = (entry.id, begin, begin + len(q.answer)) if begin >= 0 else None
            asked.append(Asked(q.question, (q.answer,), (entry.id,), place=place))
        return TaskData(tuple(Document(d.id, d.text, {"kind": d.kind}) for d in corpus), tuple(asked))
