"""SQuAD v1.1 (Rajpurkar et al., 2016), in its official JSON."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

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
            for p, paragraph in enumerate(field(article, "paragraphs", list, f"article {a}")):
                where = f"article {a}, paragraph {p}"
                document = Document(f"squad/{a}/{p}", field(paragraph, "context", str, where),
                                    {"title": str(article.get("title", ""))})
                documents[document.id] = document
                for qa in field(paragraph, "qas", list, where):
                    answers = field(qa, "answers", list, where)
                    texts = tuple(field(x, "text", str, where) for x in answers)
                    start = int(answers[0].get("answer_start", -1)) if answers else -1
                    place = (document.id, start, start + len(texts[0])) if start >= 0 else None
                    asked.append(Asked(field(qa, "question", str, where).strip(), texts, (document.id,), place=place))
        drawn = random.Random(seed).sample(asked, min(limit, len(asked)))
        needed = dict.fromkeys(i for q in drawn for i in q.gold)
        return TaskData(tuple(documents[i] for i in needed), tuple(drawn))
