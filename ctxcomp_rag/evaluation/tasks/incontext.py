"""Tasks that are learned from solved examples in the prompt: what is compressed is the examples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.tasks.base import Asked, TaskData
from ctxcomp_rag.evaluation.tasks.hub import HubTask, read_records

SHOTS = 8
"""Solved examples: the oracle gives all of them, retrieval those nearest to the question."""


class InContext(HubTask):
    """The examples come from the training split; of a file, from lines that are not asked."""

    config: ClassVar[str | None] = None
    asked_split: ClassVar[str] = "validation"
    answer_tokens: ClassVar[int] = 8

    @abstractmethod
    def pose(self, record: dict[str, Any], place: str) -> tuple[str, str, str]:
        """(question, the solution that an example shows, the answer that counts)."""

    @property
    def final(self) -> Callable[[str], str]:
        """What of a generated answer is scored."""
        return str.strip

    def load(self, data: Path | None, limit: int, seed: int) -> TaskData:
        if data is not None and data.is_file():
            drawn = list(read_records(data, self.hub_id, config=None, split="", count=limit + SHOTS, seed=seed))
            if len(drawn) <= SHOTS:
                raise InputError(f"task {self.name!r} shows {SHOTS} solved examples; expected more than {SHOTS} "
                                 f"records in {str(data)!r}, got {len(drawn)}")
            shown, asked = drawn[:SHOTS], drawn[SHOTS:]
        else:
            shown, asked = (list(read_records(data, self.hub_id, config=self.config, split=split, count=count,
                                              seed=seed)) for split, count in (("train", SHOTS),
                                                                               (self.asked_split, limit)))
        documents = []
        for place, record in shown:
            question, solution, _ = self.pose(record, place)
            documents.append(Document(place, f"{question}\n{solution}"))
        gold = tuple(d.id for d in documents)
        posed = [(place, *self.pose(record, place)) for place, record in asked]
        return TaskData(tuple(documents), tuple(Asked.of_record(place, q, [a], gold) for place, q, _, a in posed),
                        measures=("em",), answer_tokens=self.answer_tokens, final=self.final)


def label_of(record: dict[str, Any], names: tuple[str, ...], place: str) -> str:
    """The name of an integer label; raises InputError for a label that is hidden or none."""
    label = record.get("label")
    if not isinstance(label, int) or not 0 <= label < len(names):
        raise InputError(f"{place}: expected a label from 0 to {len(names) - 1}, got {label!r}; hidden labels of a "
                         "test split cannot be scored")
    return names[label]
