"""What an evaluation task is: documents, and questions with the answers that count as right."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Self

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.errors import InputError

Ask = Literal["question", "repeat", "continue"]


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
        answers: those that count as right; at least one, and none of them blank.
        gold: ids of the documents that a reader needs; what the oracle setting gives.
        pool: ids of the documents that retrieval searches; all documents of the task where it is empty.
        place: document id and character range of the answer, where the task knows it.
        about: where the question stands in the task's own plan, such as a needle's depth; kept beside the answers.
    """

    question: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    pool: tuple[str, ...] = ()
    place: tuple[str, int, int] | None = None
    about: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise InputError("a question is empty")
        if not any(a.strip() for a in self.answers):
            raise InputError(f"the question {self.question!r} has no answer to compare with; give it one, or leave "
                             "it out")
        if not all(a.strip() for a in self.answers):  # saying nothing would be right
            raise InputError(f"one of the answers to the question {self.question!r} is blank; leave that out")

    @classmethod
    def of_record(cls, where: str, question: str, answers: Sequence[str], gold: Sequence[str], *,
                  pool: Sequence[str] = (), place: tuple[str, int, int] | None = None) -> Self:
        """A question from a file; raises InputError that begins with where it stands."""
        try:
            return cls(question, tuple(answers), tuple(gold), tuple(pool), place)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


@dataclass(frozen=True)
class TaskData:
    """The documents and questions of one run.

    Attributes:
        measures: how answers are scored (see `scoring.MEASURES`); the last one says what is kept of full text.
        answer_tokens: longest answer.
        final: what of a generated answer is scored.
        ask: "repeat" asks for the text of every chunk instead of the questions; "continue" for what follows the gold
            documents, which stands in the questions' answers.
    """

    documents: tuple[Document, ...]
    asked: tuple[Asked, ...]
    measures: tuple[str, ...] = ("em", "f1")
    answer_tokens: int = 24
    final: Callable[[str], str] = str.strip
    ask: Ask = "question"


class Task(ABC):
    """A new task is one file: subclass, and add a line to the registry in `tasks/__init__.py`."""

    name: ClassVar[str]
    file: ClassVar[str]  # what --data names; "" where the task needs no file
    ask: ClassVar[Ask] = "question"

    @abstractmethod
    def load(self, data: Path | None, limit: int, seed: int) -> TaskData:
        """At most `limit` questions, drawn by `seed`, with the documents they need.

        Raises:
            InputError: the file is missing, or a record in it cannot be used; names the record.
        """

    def files(self, data: Path | None) -> list[Path]:
        """The files on this machine that `load` reads."""
        return [self.path(data)] if self.file and data is not None else []

    def path(self, data: Path | None) -> Path:
        """The task's file: `data` itself, or the one of the usual name in the folder `data`."""
        if data is None:
            raise InputError(f"task {self.name!r} reads a file; pass --data with {self.file}, or the folder it is in")
        found = data / self.file if data.is_dir() else data
        if not found.is_file():
            raise InputError(f"expected {self.file} for task {self.name!r}, but there is no file {str(found)!r}")
        return found
