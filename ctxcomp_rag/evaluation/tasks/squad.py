"""SQuAD v1.1 (Rajpurkar et al., 2016), in its official JSON."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.tasks.base import Asked, Task, TaskData
from ctxcomp_rag.records import field, read_json


class Squad(Task):
    """Retrieval searches the paragraphs of the questions that were drawn."""

    name: ClassVar[str] = "squad"
    file: ClassVar[str] = "squad-dev-v1.1.json.xz"

    def load(self, data: Path | None, limit: int, seed: int) -> TaskData:
        path = self.path(data)
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("data"), list):
            raise InputError(f"{str(path)!r} is not SQuAD: expected an object with a list 'data'")
        documents: dict[str, Document] = {}
        asked: list[Asked] = []
        for a, article in enumerate(content["data"]):
            for p, paragraph in enumerate(field(article, "paragraphs", list, f"{path.name} article {a}")):
                where = f"{path.name} article {a}, paragraph {p}"
                document = Document(f"squad/{a}/{p}", field(paragraph, "context", str, where),
                                    {"title": str(article.get("title", ""))})
                documents[document.id] = document
                for q, qa in enumerate(field(paragraph, "qas", list, where)):
                    asked.append(self._asked(qa, document, f"{where}, question {q}"))
        drawn = random.Random(seed).sample(asked, min(limit, len(asked)))
        needed = dict.fromkeys(i for q in drawn for i in q.gold)
        return TaskData(tuple(documents[i] for i in needed), tuple(drawn))

    def _asked(self, qa: dict[str, Any], document: Document, where: str) -> Asked:
        answers = field(qa, "answers", list, where)
        texts = [field(a, "text", str, where) for a in answers]
        start = field(answers[0], "answer_start", int, where) if answers and "answer_start" in answers[0] else -1
        place = (document.id, start, start + len(texts[0])) if start >= 0 else None
        return Asked.of_record(where, field(qa, "question", str, where).strip(), texts, [document.id], place=place)
