"""Who decodes: our own scheduler in this process, or an engine elsewhere. The server sees one protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from anyio import to_thread

from ctxcomp_rag.decoding import Generation, GenerationSettings, Part, RequestScheduler, Ticket


class Running(Protocol):
    """One request on its way to an answer."""

    def apieces(self) -> AsyncIterator[str]:
        """The answer in pieces; cancelling the task cancels the request."""

    async def aresult(self) -> Generation:
        """The whole answer."""

    def cancel(self) -> None:
        """Stop as soon as that is possible."""


class Backend(Protocol):
    """What turns prompts into answers."""

    @property
    def waiting(self) -> int:
        """Requests that wait to be decoded."""

    @property
    def decoding(self) -> int:
        """Requests that are being decoded."""

    async def start(self, parts: Sequence[Part], settings: GenerationSettings) -> Running:
        """Check and queue a prompt; what is wrong with it is raised here."""

    async def ready(self) -> bool:
        """Whether a request would be decoded now."""

    async def close(self) -> None:
        """Take nothing more and free what is held."""


class LocalBackend:
    """Our decoder, behind its scheduler."""

    def __init__(self, scheduler: RequestScheduler) -> None:
        self.scheduler = scheduler

    @property
    def waiting(self) -> int:
        return self.scheduler.waiting

    @property
    def decoding(self) -> int:
        return self.scheduler.decoding

    async def start(self, parts: Sequence[Part], settings: GenerationSettings) -> Ticket:
        made: list[Ticket] = []
        try:  # splicing takes milliseconds to seconds, which the event loop does not have
            await to_thread.run_sync(lambda: made.append(self.scheduler.submit(parts, settings)))
        except BaseException:  # cancelled meanwhile: nobody will read the ticket
            for ticket in made:
                ticket.cancel()
            raise
        return made[0]

    async def ready(self) -> bool:
        return not self.scheduler.closed

    async def close(self) -> None:
        await to_thread.run_sync(self.scheduler.close)
