"""What a postprocessor knows about a reference that it minted, and where a prompt helper can ask for it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ctxcomp_rag import SpanChat


@dataclass(frozen=True)
class MintedSpan:
    """One reference, good in one scope.

    Attributes:
        text: the original text, shown to the model where the reference is refused.
        positions: what the span takes of the decoder's window, its delimiters included.
    """

    reference: str = field(repr=False)
    scope: str = field(repr=False)
    text: str
    positions: int


class Ledger:
    """References that travel as text: their sizes for the prompt helper, their texts for the day they are refused.

    It decides nothing: whether a reference is good is for `SpanReferences` alone. Entries outlive their references, so
    that an expired one is still replaced by its text.
    """

    def __init__(self, seconds: float) -> None:
        self._keep = 4 * seconds
        self._entries: dict[str, tuple[float, MintedSpan]] = {}
        self._lock = threading.Lock()
        self._sweep_at = 0.0

    def note(self, minted: MintedSpan) -> None:
        now = time.monotonic()
        with self._lock:
            if now >= self._sweep_at:
                self._sweep_at = now + self._keep / 4
                self._entries = {r: e for r, e in self._entries.items() if e[0] > now}
            self._entries[minted.reference] = (now + self._keep, minted)

    def find(self, reference: str, scope: str) -> MintedSpan | None:
        """The entry, for those who know its scope: the text of another tenant is shown to nobody."""
        with self._lock:
            entry = self._entries.get(reference)
        return entry[1] if entry is not None and entry[1].scope == scope else None

    def __contains__(self, reference: str) -> bool:
        with self._lock:
            return reference in self._entries


_LEDGERS: WeakKeyDictionary[SpanChat, Ledger] = WeakKeyDictionary()
_LOCK = threading.Lock()


def ledger_of(chat: SpanChat) -> Ledger:
    """The one ledger of a chat, which its postprocessors, models and prompt helpers share."""
    with _LOCK:
        if chat not in _LEDGERS:
            _LEDGERS[chat] = Ledger(chat.references.seconds)
        return _LEDGERS[chat]


__all__ = ["Ledger", "MintedSpan", "ledger_of"]
