"""Which examples share text with held-out ones, whatever pieces their texts were cut into."""

from __future__ import annotations

from collections.abc import Sequence

from ctxcomp_rag.training.examples import Example

_TELLING = 40  # characters; a shorter text, such as the few words that end a document, stands in many others


class HeldOutTexts:
    """The contexts of held-out examples.

    Another piece of the same text is known by its place in it. A text that stands in several documents is found where
    it is the same, or where one context holds the other.
    """

    def __init__(self, kept: Sequence[Example]) -> None:
        self._contexts = {e.context for e in kept}
        self._telling = [c for c in self._contexts if len(c) >= _TELLING]
        self._starts = {c[i : i + _TELLING] for c in self._telling for i in range(len(c) - _TELLING + 1)}
        self._ranges: dict[str, set[tuple[int, int]]] = {}
        for e in kept:
            if e.cut_from is not None:
                text, start = e.cut_from
                self._ranges.setdefault(text, set()).add((start, start + len(e.context)))

    def shared_by(self, example: Example) -> bool:
        """Whether the context or the continuation has characters of a held-out context."""
        whole = example.context + example.continuation
        if example.cut_from is not None:
            text, start = example.cut_from
            if any(start < end and begin < start + len(whole) for begin, end in self._ranges.get(text, ())):
                return True
        return (any(self._within(t) for t in (example.context, example.continuation))
                or any(c in whole for c in self._telling))

    def _within(self, text: str) -> bool:
        # the first characters of a text within a context are among those that the context can go on with
        return text in self._contexts or (text[:_TELLING] in self._starts and any(text in c for c in self._telling))
