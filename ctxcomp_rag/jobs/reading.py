"""Documents read and split ahead of the workers, in a thread and within bounds."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ctxcomp_rag.chunking import Chunk, Document
from ctxcomp_rag.errors import CtxcompError

_AHEAD = 64  # documents


@dataclass(frozen=True)
class Split:
    """A document's chunks, or why there are none."""

    document_id: str
    chunks: list[Chunk]
    error: CtxcompError | None = None


class ReadAhead:
    """Runs `split` over documents in a thread; `take` hands out the results in order.

    Attributes:
        ended: everything was taken.
    """

    def __init__(self, documents: Iterable[Document], split: Callable[[Document], list[Chunk]]) -> None:
        self.ended = False
        self._documents, self._split = documents, split
        self._queue: queue.Queue[Split | BaseException | None] = queue.Queue(_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="ctxcomp-reader", daemon=True)
        self._thread.start()

    def take(self, timeout: float) -> Split | None:
        """The next one; None where there is none within `timeout` seconds, or none any more.

        Raises:
            Exception: what the documents' iterator raised, once all before it were taken.
        """
        try:
            item = self._queue.get(timeout=timeout) if not self.ended else None
        except queue.Empty:
            return None
        if isinstance(item, Split):
            return item
        self.ended = True
        if item is not None:
            raise item
        return None

    def close(self) -> None:
        """Read no more. A read that is under way is waited for; it holds what a file or a socket gives it."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # a full queue would hold the thread
            except queue.Empty:
                self._thread.join(0.05)

    def _read(self) -> None:
        end: BaseException | None = None
        try:
            for document in self._documents:
                if self._closed.is_set():
                    return
                try:
                    item = Split(document.id, self._split(document))
                except CtxcompError as error:
                    item = Split(document.id, [], error)
                self._queue.put(item)
        except BaseException as error:
            end = error
        self._queue.put(end)
