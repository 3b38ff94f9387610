"""SIGINT and SIGTERM as a wish that the job ends in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stop:
    """Whether the job is to end, and which signal said so (0: a program did)."""

    def __init__(self) -> None:
        self.requested, self.signal = False, 0

    def request(self, number: int = 0) -> None:
        self.requested, self.signal = True, number


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Within, the first SIGINT or SIGTERM asks the job to stop, and the second does what it did before.

    Outside the main thread, where Python allows no handlers, nobody asks.
    """
    stop = Stop()
    before: dict[int, Any] = {}

    def handle(received: int, _: FrameType | None) -> None:
        stop.request(received)
        for which, handler in before.items():
            signal.signal(which, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
