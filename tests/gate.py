"""A decoder whose forward passes a test watches and holds up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ctxcomp_rag.backbone import Backbone

PATIENCE = 60.0  # of a deadlock only; nothing takes that long


class Gate:
    """Watches the decoder's forward passes (rows, new tokens) and holds them up on request."""

    def __init__(self, backbone: Backbone) -> None:
        self.passes: list[tuple[int, int]] = []
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Event()
        self._from = 0
        self.failure: Callable[[int, int], BaseException | None] = lambda rows, length: None
        self._handle = backbone.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _: Any, __: Any, kwargs: dict[str, Any]) -> None:
        rows, length = kwargs["inputs_embeds"].shape[:2]
        self.passes.append((rows, length))
        if not self.open.is_set() and len(self.passes) > self._from:
            self.waiting.set()
            assert self.open.wait(PATIENCE)
        if error := self.failure(rows, length):
            raise error

    def hold(self, after: int = 0) -> None:
        """The next forward pass waits, or the one after so many."""
        self._from = len(self.passes) + after
        self.waiting.clear()
        self.open.clear()

    def held(self) -> None:
        assert self.waiting.wait(PATIENCE)

    def remove(self) -> None:
        self.open.set()
        self._handle.remove()


def eventually(condition: Callable[[], bool], patience: float = PATIENCE) -> bool:
    """Whether it comes true before patience ends."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
