"""Continuous batching: requests of many callers decode together; each joins and leaves between two steps."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Self

from ctxcomp_rag.decoding.decoder import FrozenDecoder
from ctxcomp_rag.decoding.generation import Generation, GenerationSettings
from ctxcomp_rag.decoding.loop import DecodingLoop, Request
from ctxcomp_rag.decoding.prompt import Part
from ctxcomp_rag.errors import SchedulerFullError, UnsupportedModelError
from ctxcomp_rag.rope import require_full_attention

_IDLE_SECONDS = 2.0  # an idle scheduler keeps no thread alive
_Piece = str | BaseException | None  # None: the answer is over


class Ticket:
    """One submitted request: wait for its answer, read it in pieces, or cancel it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = threading.Event()
        self._future: Future[Generation] = Future()
        self._shown = 0
        self._pieces: list[str] = []
        self._listeners: list[Callable[[_Piece], None]] = []
        self._lock = threading.Lock()

    def result(self, timeout: float | None = None) -> Generation:
        """The answer; raises what went wrong, CancelledError after `cancel`, TimeoutError."""
        return self._future.result(timeout)

    async def aresult(self) -> Generation:
        """Like `result` on an event loop; cancelling the task cancels the request."""
        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def pieces(self) -> Iterator[str]:
        """The answer in pieces; joined they equal `result().text`. Closing the iterator cancels."""
        arrived: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        self._listen(arrived.put)
        try:
            while isinstance(piece := arrived.get(), str):
                yield piece
            if piece is not None:
                raise piece
        finally:
            self.cancel()

    async def apieces(self) -> AsyncIterator[str]:
        """Like `pieces` on an event loop."""
        arrived: asyncio.Queue[_Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(piece: _Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, piece)

        self._listen(deliver)
        try:
            while isinstance(piece := await arrived.get(), str):
                yield piece
            if piece is not None:
                raise piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Leave the batch at the next step; nothing happens to a request that has ended."""
        self.cancelled.set()

    def _listen(self, listener: Callable[[_Piece], None]) -> None:
        with self._lock:  # what came before the listener is delivered first
            for piece in self._pieces:
                listener(piece)
            if self._future.done():
                listener(self._ending())
            else:
                self._listeners.append(listener)

    def _ending(self) -> BaseException | None:
        return CancelledError() if self._future.cancelled() else self._future.exception()

    def _show(self) -> None:
        settled = self.request.progress.settled
        if len(settled) <= self._shown:
            return
        piece, self._shown = settled[self._shown :], len(settled)
        with self._lock:
            self._pieces.append(piece)
            for listener in self._listeners:
                listener(piece)

    def _end(self, error: BaseException | None = None) -> None:
        with self._lock:
            if self._future.done():
                return
            if error is not None:
                self._future.set_exception(error)
            elif self.cancelled.is_set() and self.request.progress.finish_reason is None:
                self._future.cancel()
            else:
                self._future.set_result(self.request.generation)
            for listener in self._listeners:
                listener(self._ending())
            self._listeners = []


class RequestScheduler:
    """One decoder for many callers.

    First come, first served: a request waits until a row is free, joins the batch after its own prefill and leaves it
    when its answer ends or is cancelled. An error in one prompt reaches that caller only.

    Args:
        max_batch: rows that decode together.
        max_waiting: requests that may wait; one more raises SchedulerFullError.
    """

    def __init__(self, decoder: FrozenDecoder, *, max_batch: int = 8, max_waiting: int = 1024) -> None:
        self.decoder, self.max_batch, self.max_waiting = decoder, max_batch, max_waiting
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        try:
            require_full_attention(decoder.backbone.config)
            self._joins = True
        except UnsupportedModelError:  # a sliding window cannot be padded afterwards: rows start together
            self._joins = False

    def submit(self, parts: Sequence[Part], settings: GenerationSettings | None = None) -> Ticket:
        """Queue a prompt. A prompt that cannot be spliced raises here, at once.

        Raises:
            SchedulerFullError: `max_waiting` requests are waiting already, or the scheduler was closed.
        """
        ticket = Ticket(self.decoder.request(parts, settings))
        with self._changed:
            if self._closed:
                raise SchedulerFullError("the scheduler was closed; make a new one")
            if len(self._waiting) >= self.max_waiting:
                raise SchedulerFullError(f"{self.max_waiting} requests are waiting already; retry later, or raise "
                                         "max_waiting")
            self._waiting.append(ticket)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="ctxcomp-decoder", daemon=True)
                self._thread.start()
            self._changed.notify()
        return ticket

    def close(self) -> None:
        """Finish what was submitted, take nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        loop = DecodingLoop(self.decoder.backbone)
        active: dict[Request, Ticket] = {}
        while True:
            with self._changed:
                if not active and not self._waiting and not self._closed:
                    self._changed.wait(_IDLE_SECONDS)
                if not active and not self._waiting:
                    self._thread = None
                    return
                room = self.max_batch - len(active) if self._joins or not active else 0
                fresh = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            try:
                self._leave(loop, active)
                self._join(loop, active, [t for t in fresh if not self._gave_up(t)])
                if active:
                    ended = loop.advance()
                    for ticket in active.values():
                        ticket._show()
                    for request in ended:
                        active.pop(request)._end()
            except Exception as error:
                for ticket in (*active.values(), *fresh):
                    ticket._end(error)
                active.clear()
                loop = DecodingLoop(self.decoder.backbone)

    def _gave_up(self, ticket: Ticket) -> bool:
        if ticket.cancelled.is_set():
            ticket._end()
        return ticket.cancelled.is_set()

    def _leave(self, loop: DecodingLoop, active: dict[Request, Ticket]) -> None:
        gone = [request for request, ticket in active.items() if ticket.cancelled.is_set()]
        loop.drop(gone)
        for request in gone:
            active.pop(request)._end()

    def _join(self, loop: DecodingLoop, active: dict[Request, Ticket], fresh: list[Ticket]) -> None:
        """Prefill together; where that fails, one by one, so that the error reaches its own caller."""
        try:
            loop.admit([t.request for t in fresh])
            active.update({t.request: t for t in fresh})
        except Exception as error:
            if len(fresh) == 1:
                fresh[0]._end(error)
                return
            for ticket in fresh:
                self._join(loop, active, [ticket])


__all__ = ["RequestScheduler", "Ticket"]
