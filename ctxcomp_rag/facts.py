"""The facts of a text that can be looked for in another: numbers, dates and names, as they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE = re.compile(rf"\b(?:\d{{4}}-\d\d-\d\d|(?:\d{{1,2}} )?{_MONTH} \d{{4}}|{_MONTH} \d{{1,2}}, \d{{4}})\b")
NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def facts(text: str) -> set[str]:
    """Numbers, dates and names of a text.

    A name is a row of capitalised words. The first word of a sentence is capitalised anyhow: it counts only where it is
    so inside a sentence as well. A number or a month within a date is no fact of its own.
    """
    dates = set(_DATE.findall(text))
    rest = _DATE.sub(";", text)
    return dates | set(NUMBER.findall(rest)) | set(_names(rest))


def retained(text: str, other: str) -> float:
    """Share of the facts of a text that another states; 1.0 for a text without facts."""
    wanted = facts(text)
    if not wanted:
        return 1.0
    return sum(_states(other, fact) for fact in wanted) / len(wanted)


def _states(text: str, fact: str) -> bool:
    # "31" is not stated by "31.5", nor by "1,310"
    return re.search(rf"(?<![\w])(?<!\d[.,:]){re.escape(fact)}(?!\w)(?![.,:]\d)", text) is not None


def _names(text: str) -> Iterator[str]:
    sentences = _SENTENCE_END.split(text)
    words = [list(_WORD.finditer(sentence)) for sentence in sentences]
    inside = {word[0] for row in words for word in row[1:] if word[0][0].isupper()}
    for sentence, row in zip(sentences, words, strict=True):
        name: list[str] = []
        end = 0
        for i, word in enumerate(row):
            named = word[0][0].isupper() and (i > 0 or word[0] in inside)
            if name and not (named and sentence[end : word.start()] == " "):
                yield " ".join(name)
                name = []
            if named:
                name.append(word[0])
            end = word.end()
        if name:
            yield " ".join(name)
