"""Natural Questions (Kwiatkowski et al., 2019), those with a short answer, asked of their Wikipedia page."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.evaluation.tasks.base import Asked, TaskData
from ctxcomp_rag.evaluation.tasks.hub import HubTask, read_records
from ctxcomp_rag.records import field

_ANSWERED = 3  # about one question in so many has a short answer


class NaturalQuestions(HubTask):
    """Retrieval searches the page of the question."""

    name: ClassVar[str] = "nq"
    hub_id: ClassVar[str] = "google-research-datasets/natural_questions"

    def load(self, data: Path | None, limit: int, seed: int) -> TaskData:
        records = read_records(data, self.hub_id, config="default", split="validation", count=_ANSWERED * limit,
                               seed=seed)
        made = (self._asked(place, record) for place, record in records)
        pairs = list(islice((pair for pair in made if pair is not None), limit))
        return TaskData(tuple(d for d, _ in pairs), tuple(a for _, a in pairs))

    def _asked(self, place: str, record: dict[str, Any]) -> tuple[Document, Asked] | None:
        """The page as text without its markup, and the question; None without a short answer."""
        tokens = field(field(record, "document", dict, place), "tokens", dict, place)
        words, markup = field(tokens, "token", list, place), field(tokens, "is_html", list, place)
        shorts = field(field(record, "annotations", dict, place), "short_answers", list, place)
        spans = [(begin, end) for s in shorts for begin, end in zip(s["start_token"], s["end_token"], strict=True)]
        if not spans:
            return None
        text, begins = "", {}
        for i, (word, is_markup) in enumerate(zip(words, markup, strict=True)):
            begins[i] = len(text)
            text += "" if is_markup else f"{word} "
        begins[len(words)] = len(text)
        ranges = [(begins[begin], begins[end]) for begin, end in spans]
        answers = tuple(dict.fromkeys(text[b:e].strip() for b, e in ranges if text[b:e].strip()))
        if not answers:
            return None
        document = Document(place, text)
        first = (place, ranges[0][0], ranges[0][0] + len(answers[0]))
        question = field(field(record, "question", dict, place), "text", str, place)
        return document, Asked.of_record(place, question, answers, [place], pool=[place], place=first)
