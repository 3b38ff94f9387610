"""HotpotQA, distractor setting (Yang et al., 2018): two paragraphs of ten are needed together."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.tasks.base import Asked, Task, TaskData
from ctxcomp_rag.records import field, read_lines


class HotpotQA(Task):
    """Retrieval searches the ten paragraphs of the question; the oracle gives the two supporting ones."""

    name: ClassVar[str] = "hotpotqa"
    file: ClassVar[str] = "hotpotqa-dev.jsonl.xz"

    def load(self, data: Path | None, limit: int, seed: int) -> TaskData:
        records = list(read_lines(self.path(data)))
        documents: list[Document] = []
        asked = []
        for place, record in random.Random(seed).sample(records, min(limit, len(records))):
            name = str(record.get("id", place))
            context = field(record, "context", dict, place)
            titles, sentences = field(context, "title", list, place), field(context, "sentences", list, place)
            if len(titles) != len(sentences):
                raise InputError(f"{place}: {len(titles)} titles for {len(sentences)} paragraphs")
            supporting = set(field(field(record, "supporting_facts", dict, place), "title", list, place))
            own = [Document(f"{name}/{i}", f"{title}: {''.join(paragraph).strip()}", {"title": str(title)})
                   for i, (title, paragraph) in enumerate(zip(titles, sentences, strict=True))]
            gold = tuple(d.id for d, title in zip(own, titles, strict=True) if title in supporting)
            documents += own
            asked.append(Asked.of_record(place, field(record, "question", str, place),
                                         [field(record, "answer", str, place)], gold, pool=[d.id for d in own]))
        return TaskData(tuple(documents), tuple(asked))
