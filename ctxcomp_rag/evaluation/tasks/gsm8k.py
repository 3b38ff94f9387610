"""GSM8K (Cobbe et al., 2021): school arithmetic, with worked solutions as the context."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.tasks.incontext import InContext
from ctxcomp_rag.records import field

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class GSM8K(InContext):
    """Scored by the last number of the answer."""

    name: ClassVar[str] = "gsm8k"
    hub_id: ClassVar[str] = "openai/gsm8k"
    config: ClassVar[str | None] = "main"
    asked_split: ClassVar[str] = "test"
    answer_tokens: ClassVar[int] = 256

    def pose(self, record: dict[str, Any], place: str) -> tuple[str, str, str]:
        solution = field(record, "answer", str, place)
        if "####" not in solution:
            raise InputError(f"{place}: expected the result after '####' in 'answer', as in GSM8K")
        return f"Question: {field(record, 'question', str, place)}", solution, last_number(solution)

    @property
    def final(self) -> Callable[[str], str]:
        return last_number


def last_number(text: str) -> str:
    """The last number of a text without thousands separators; the text where it has none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else text.strip()
