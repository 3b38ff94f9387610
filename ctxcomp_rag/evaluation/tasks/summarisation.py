"""Summaries scored by ROUGE: CNN/DailyMail (See et al., 2017), or JSON lines of text and summary."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.evaluation.tasks.base import Asked, TaskData
from ctxcomp_rag.evaluation.tasks.hub import HubTask, read_records
from ctxcomp_rag.records import field


class Summarisation(HubTask):
    """Retrieval searches the chunks of the article itself."""

    name: ClassVar[str] = "summarisation"
    hub_id: ClassVar[str] = "abisee/cnn_dailymail"

    def load(self, data: Path | None, limit: int, seed: int) -> TaskData:
        documents, asked = [], []
        for place, record in read_records(data, self.hub_id, config="3.0.0", split="validation", count=limit,
                                          seed=seed):
            text = "article" if "article" in record else "text"
            summary = "highlights" if "highlights" in record else "summary"
            documents.append(Document(place, field(record, text, str, place)))
            asked.append(Asked.of_record(place, "What does the text say in one or two sentences?",
                                         [field(record, summary, str, place)], [place], pool=[place]))
        return TaskData(tuple(documents), tuple(asked), measures=("rouge1", "rouge2", "rouge_l"), answer_tokens=96)
