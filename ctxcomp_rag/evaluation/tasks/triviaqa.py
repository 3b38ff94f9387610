"""TriviaQA (Joshi et al., 2017), reading comprehension with Wikipedia pages as evidence."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.evaluation.tasks.base import Asked, TaskData
from ctxcomp_rag.evaluation.tasks.hub import HubTask, read_records
from ctxcomp_rag.records import field


class TriviaQA(HubTask):
    """Retrieval searches the pages of the question; the oracle gives the chunk that states the answer first."""

    name: ClassVar[str] = "triviaqa"
    hub_id: ClassVar[str] = "mandarjoshi/trivia_qa"

    def load(self, data: Path | None, limit: int, seed: int) -> TaskData:
        documents: list[Document] = []
        asked = []
        for place, record in read_records(data, self.hub_id, config="rc.wikipedia", split="validation", count=limit,
                                          seed=seed):
            answer = field(record, "answer", dict, place)
            named = [field(answer, "value", str, place), *answer.get("aliases", ())]
            accepted = tuple(dict.fromkeys(name for name in named if name.strip()))
            pages = field(field(record, "entity_pages", dict, place), "wiki_context", list, place)
            own = [Document(f"{place}/{i}", text) for i, text in enumerate(pages) if text.strip()]
            if own:  # without evidence there is nothing to read
                documents += own
                ids = [d.id for d in own]
                asked.append(Asked.of_record(place, field(record, "question", str, place), accepted, ids, pool=ids,
                                             place=_first(accepted, own)))
        return TaskData(tuple(documents), tuple(asked))


def _first(answers: tuple[str, ...], documents: list[Document]) -> tuple[str, int, int] | None:
    for document in documents:
        for answer in answers:
            begin = document.text.lower().find(answer.lower())
            if begin >= 0:
                return document.id, begin, begin + len(answer)
    return None
