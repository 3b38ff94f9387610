"""SST-2 (Socher et al., 2013; GLUE): the sentiment of a sentence, from labelled sentences as the context."""

from __future__ import annotations

from typing import Any, ClassVar

from ctxcomp_rag.evaluation.tasks.incontext import InContext, label_of
from ctxcomp_rag.records import field


class SST2(InContext):
    name: ClassVar[str] = "sst2"
    hub_id: ClassVar[str] = "stanfordnlp/sst2"

    def pose(self, record: dict[str, Any], place: str) -> tuple[str, str, str]:
        answer = label_of(record, ("negative", "positive"), place)
        return f"Review: {field(record, 'sentence', str, place).strip()}\nSentiment:", answer, answer
