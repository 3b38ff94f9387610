"""The Winograd schema challenge (Levesque et al., 2012; SuperGLUE): what a pronoun stands for."""

from __future__ import annotations

from typing import Any, ClassVar

from ctxcomp_rag.evaluation.tasks.incontext import InContext, label_of
from ctxcomp_rag.records import field


class WSC(InContext):
    name: ClassVar[str] = "wsc"
    hub_id: ClassVar[str] = "aps/super_glue"
    config: ClassVar[str | None] = "wsc.fixed"

    def pose(self, record: dict[str, Any], place: str) -> tuple[str, str, str]:
        text, noun, pronoun = (field(record, name, str, place) for name in ("text", "span1_text", "span2_text"))
        answer = label_of(record, ("no", "yes"), place)
        return f"{text}\nDoes \"{pronoun}\" stand for \"{noun}\"?", answer, answer
