"""Continuous batching: requests of many callers decode together; each joins and leaves between two steps."""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import NoReturn, Self
from weakref import WeakSet

from ctxcomp_rag.decoding.decoder import FrozenDecoder
from ctxcomp_rag.decoding.generation import Generation, GenerationSettings, RequestLimits
from ctxcomp_rag.decoding.loop import DecodingLoop, Request
from ctxcomp_rag.decoding.prompt import Part
from ctxcomp_rag.errors import InputError, SchedulerFullError, UnsupportedModelError
from ctxcomp_rag.rope import require_full_attention

_IDLE_SECONDS = 2.0  # an idle scheduler keeps no thread alive
_Piece = str | BaseException | None  # None: the answer is over


class Ticket:
    """One submitted request: wait for its answer, read it in pieces, or cancel it.

    May be read by several threads and tasks; but cancelling is for the request, so it ends for all of them.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = threading.Event()
        self._future: Future[Generation] = Future()
        self._future.set_running_or_notify_cancel()  # from here on only `_end` ends it: nobody is left waiting
        self._shown = 0
        self._pieces: list[str] = []
        self._listeners: list[Callable[[_Piece], None]] = []
        self._lock = threading.Lock()

    def result(self, timeout: float | None = None) -> Generation:
        """The answer; raises what went wrong, CancelledError after `cancel`, TimeoutError (the request goes on)."""
        return self._future.result(timeout)

    async def aresult(self) -> Generation:
        """Like `result` on an event loop; cancelling the task cancels the request."""
        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def pieces(self) -> Iterator[str]:
        """The answer in pieces; joined they equal `result().text`. Closing or dropping the iterator cancels."""
        return _Pieces(self)

    def apieces(self) -> AsyncIterator[str]:
        """Like `pieces` on an event loop; `aclose` or cancelling the task cancels the request."""
        return _AsyncPieces(self)

    def cancel(self) -> None:
        """Leave the batch at the next step; nothing happens to a request that has ended."""
        self.cancelled.set()

    def _listen(self, listener: Callable[[_Piece], None]) -> None:
        with self._lock:  # what came before the listener is delivered first
            for piece in self._pieces:
                listener(piece)
            if self._future.done():
                listener(self._future.exception())
            else:
                self._listeners.append(listener)

    def _unlisten(self, listener: Callable[[_Piece], None]) -> None:
        with self._lock:
            self._listeners = [known for known in self._listeners if known != listener]

    def _tell(self, piece: _Piece) -> None:
        for listener in self._listeners:
            listener(piece)

    def _show(self) -> None:
        settled = self.request.progress.settled
        if len(settled) <= self._shown:
            return
        piece, self._shown = settled[self._shown :], len(settled)
        with self._lock:
            self._pieces.append(piece)
            self._tell(piece)

    def _end(self, error: BaseException | None = None) -> None:
        with self._lock:
            if self._future.done():
                return
            try:
                ending = error or self.request.error
                if ending is None and self.request.progress.finish_reason is None:
                    ending = CancelledError()
                if ending is None:
                    self._future.set_result(self.request.generation)
                else:
                    self._future.set_exception(ending)
                self._tell(ending)
            finally:
                self._listeners = []


class _Pieces(Iterator[str]):
    """A class and not a generator: closing a generator that was never started would not cancel."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._arrived: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        self._put = self._arrived.put  # one object: what was listened with is unlistened
        self._over = False
        ticket._listen(self._put)

    def __next__(self) -> str:
        if self._over:
            raise StopIteration
        try:
            piece = self._arrived.get()
        except BaseException:  # an interrupt
            self.close()
            raise
        if isinstance(piece, str):
            return piece
        self.close()
        raise piece or StopIteration

    def close(self) -> None:
        self._over = True
        self._ticket._unlisten(self._put)
        self._ticket.cancel()

    def __del__(self) -> None:
        self._ticket.cancel()  # no lock: the collector may run anywhere


class _AsyncPieces(AsyncIterator[str]):
    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._arrived: asyncio.Queue[_Piece] = asyncio.Queue()
        self._deliver: Callable[[_Piece], None] | None = None
        self._over = False

    def _listen(self) -> None:
        ticket, arrived, loop = self._ticket, self._arrived, asyncio.get_running_loop()

        def deliver(piece: _Piece) -> None:  # does not hold `self`: an iterator that was dropped cancels
            try:
                loop.call_soon_threadsafe(arrived.put_nowait, piece)
            except RuntimeError:  # the event loop was closed: nobody reads on
                ticket.cancel()

        self._deliver = deliver
        ticket._listen(deliver)

    async def __anext__(self) -> str:
        if self._over:
            raise StopAsyncIteration
        if self._deliver is None:
            self._listen()
        try:
            piece = await self._arrived.get()
        except BaseException:  # the task was cancelled
            await self.aclose()
            raise
        if isinstance(piece, str):
            return piece
        await self.aclose()
        raise piece or StopAsyncIteration

    async def aclose(self) -> None:
        self._over = True
        if self._deliver is not None:
            self._ticket._unlisten(self._deliver)
        self._ticket.cancel()

    def __del__(self) -> None:
        self._ticket.cancel()


class RequestScheduler:
    """One decoder for many callers.

    First come, first served: a request waits until a row is free, joins the batch after its own prefill and leaves it
    when its answer ends or is cancelled. An error in one prompt reaches that caller only; an error of the decoder
    itself while a batch decodes (no memory left, say) reaches all in that batch, and the next batch starts afresh.

    A waiting request holds its spliced prompt: with long KV spans choose `max_waiting` by memory.

    Args:
        max_batch: rows that decode together.
        max_waiting: requests that may wait; one more raises SchedulerFullError.
        limits: what one request may cost.
    """

    def __init__(self, decoder: FrozenDecoder, *, max_batch: int = 8, max_waiting: int = 1024,
                 limits: RequestLimits | None = None) -> None:
        if max_batch < 1 or max_waiting < 1:
            raise InputError("expected max_batch and max_waiting of at least 1, got "
                             f"{max_batch} and {max_waiting}")
        self.decoder, self.max_batch, self.max_waiting = decoder, max_batch, max_waiting
        self.limits = limits or RequestLimits()
        self._decoding = 0
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = self._abandoned = False
        self._process = os.getpid()
        _SCHEDULERS.add(self)
        try:
            require_full_attention(decoder.backbone.config)
            self._joins = True
        except UnsupportedModelError:  # a sliding window cannot be padded afterwards: rows start together
            self._joins = False

    def submit(self, parts: Sequence[Part], settings: GenerationSettings | None = None) -> Ticket:
        """Queue a prompt. A prompt that cannot be spliced raises here, at once.

        Raises:
            SchedulerFullError: `max_waiting` requests are waiting already, or the scheduler was closed.
            PromptTooLongError: the request is over the `limits`, or over the decoder's window.
        """
        self.require_own_process()  # before the lock, which the fork may have left locked
        settings = settings or GenerationSettings()
        self.limits.check_answer(settings.max_new_tokens)
        with self._changed:
            self._require_room()  # before the work of splicing
        request = self.decoder.request(parts, settings)
        self.limits.check_prompt(request.prompt.usage.positions)
        ticket = Ticket(request)
        with self._changed:
            self._require_room()
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._work, name="ctxcomp-decoder", daemon=True)
                thread.start()
                self._thread = thread
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def require_own_process(self) -> None:
        """Raises InputError in a process that was forked from the one that made this object."""
        if self._process != os.getpid():
            raise InputError("this decoder was opened before the process was forked, and its threads did not come "
                             "along; open it in each process, after the fork")

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def decoding(self) -> int:
        """Requests in the batch, or being prefilled for it."""
        return self._decoding

    def close(self) -> None:
        """Finish what was submitted, take nothing more."""
        if self._process != os.getpid():
            return
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        # a finaliser may close in the decoder's own thread, which then ends by itself
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _abandon(self) -> None:
        """Stop between two steps, whatever is unfinished: Python ends, and nobody is left who could read it."""
        self._abandoned = True
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a RequestScheduler belongs to its process and cannot be pickled or copied; make one in each "
                        "process")

    def _require_room(self) -> None:
        if self._closed:
            raise SchedulerFullError("the scheduler was closed; make a new one")
        if len(self._waiting) >= self.max_waiting:
            raise SchedulerFullError(f"{self.max_waiting} requests are waiting already; retry later, or raise "
                                     "max_waiting")

    def _work(self) -> None:
        loop = self.decoder.loop()
        active: dict[Request, Ticket] = {}
        while True:
            with self._changed:
                if not active and not self._waiting and not self._closed:
                    self._changed.wait(_IDLE_SECONDS)
                if self._abandoned or (not active and not self._waiting):
                    self._thread = None
                    return
            try:
                self._round(loop, active)
            except Exception as error:  # the cache may be half written: nobody goes on from it
                _end_all(active, error)
                loop = self.decoder.loop()
            self._decoding = len(active)

    def _round(self, loop: DecodingLoop, active: dict[Request, Ticket]) -> None:
        """Leave, join, one token. A method of its own, so that an idle worker holds on to nobody's request."""
        self._leave(loop, [request for request, ticket in active.items() if ticket.cancelled.is_set()], active)
        loop.feed()
        self._join(loop, active)
        self._decoding = len(active)
        if not active:
            return
        ended = loop.advance()
        for ticket in active.values():
            ticket._show()
        for request in ended:
            active.pop(request)._end()

    def _leave(self, loop: DecodingLoop, gone: list[Request], active: dict[Request, Ticket]) -> None:
        loop.drop(gone)
        for request in gone:
            active.pop(request)._end()

    def _join(self, loop: DecodingLoop, active: dict[Request, Ticket]) -> None:
        """Fill the free rows: prefill together; where that fails one by one, so that the error reaches its caller."""
        together = True
        while fresh := self._next(self.max_batch - len(active), together, bool(active)):
            self._decoding = len(active) + len(fresh)
            try:
                loop.admit([t.request for t in fresh])
                active.update({t.request: t for t in fresh})
            except Exception as error:
                together = False
                if len(fresh) == 1:
                    fresh[0]._end(error)
                    continue
                with self._changed:
                    self._waiting.extendleft(reversed(fresh))

    def _next(self, room: int, together: bool, busy: bool) -> list[Ticket]:
        """Take who waited longest and still wants an answer."""
        if busy and not self._joins:
            return []
        fresh: list[Ticket] = []
        given_up: list[Ticket] = []
        with self._changed:
            while self._waiting and len(fresh) < (room if together else min(room, 1)):
                ticket = self._waiting.popleft()
                (given_up if ticket.cancelled.is_set() else fresh).append(ticket)
        for ticket in given_up:
            ticket._end()
        return fresh


_SCHEDULERS: WeakSet[RequestScheduler] = WeakSet()


@atexit.register
def _abandon_all() -> None:
    """A thread that is inside the decoder when Python ends would take the process down with an abort."""
    for scheduler in list(_SCHEDULERS):
        scheduler._abandon()


def _end_all(active: dict[Request, Ticket], error: Exception) -> None:
    for ticket in active.values():
        ticket._end(error)
    active.clear()


__all__ = ["RequestScheduler", "Ticket"]
