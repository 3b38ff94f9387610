"""Your own questions: JSON lines of {"question", "answer" or "answers", "context": text or list of texts}."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.tasks.base import Asked, Task, TaskData
from ctxcomp_rag.records import field, read_lines


class JsonLines(Task):
    """With one text, retrieval searches the texts of all questions; with a list, the question's own."""

    name: ClassVar[str] = "jsonl"
    file: ClassVar[str] = "questions.jsonl"

    def load(self, data: Path | None, limit: int, seed: int) -> TaskData:
        path = self.path(data)
        records = list(read_lines(path))
        if not records:
            raise InputError(f"{str(path)!r} holds no question")
        documents: dict[str, Document] = {}
        asked = []
        for place, record in random.Random(seed).sample(records, min(limit, len(records))):
            context = field(record, "context", (str, list), place)
            texts = [context] if isinstance(context, str) else context
            if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
                raise InputError(f"{place}: expected text in 'context', got an empty or other one")
            answers = field(record, "answers", list, place) if "answers" in record else [
                field(record, "answer", str, place)]
            other = [a for a in answers if not isinstance(a, str)]
            if other:
                raise InputError(f"{place}: expected texts in 'answers', got {other[0]!r}; put it in quotes, or leave "
                                 "it out")
            own = [Document(f"{place}/{i}", t) for i, t in enumerate(texts)]
            documents |= {d.id: d for d in own}
            ids = [d.id for d in own]
            asked.append(Asked.of_record(place, field(record, "question", str, place), answers, ids,
                                         pool=() if isinstance(context, str) else ids))
        return TaskData(tuple(documents.values()), tuple(asked))
