"""What every peer's driver does: hold the workload, answer step by step, be timed."""

from __future__ import annotations

import importlib
import tempfile
import time
from abc import ABC, abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar


def package(name: str) -> Any:
    """A module of the peer's environment, whose types are not known here."""
    return importlib.import_module(name)


class Peer(ABC):
    """One project. `task` is the line of JSON that the driver was given.

    Attributes:
        packages: whose versions are reported.
        rows: names of what can be measured.
    """

    packages: tuple[str, ...] = ("torch", "transformers")
    rows: ClassVar[tuple[str, ...]]

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        self.text = [token for ids in task["chunks"] for token in ids]
        self.question: list[int] = task["question"]

    def versions(self) -> dict[str, str]:
        """Of its packages."""
        return {name: version(name) for name in self.packages}

    def prepare(self, row: str) -> None:  # noqa: B027 - most peers have nothing to prepare
        """Bring about what the row starts from; not timed."""

    @abstractmethod
    def first(self, row: str) -> int:
        """Read everything, up to the first token; returns cache entries."""

    @abstractmethod
    def following(self) -> None:
        """One more token."""

    def answer(self, row: str) -> dict[str, Any]:
        """Times of one answer, as `Timing` of the parent names them."""
        self.prepare(row)
        cpu, wall = time.process_time(), time.perf_counter()
        positions = self.first(row)
        first, first_wall = time.process_time(), time.perf_counter()
        for _ in range(self.task["new_tokens"] - 1):
            self.following()
        last, last_wall = time.process_time(), time.perf_counter()
        return {"ttft": first - cpu, "total": last - cpu, "ttft_wall": first_wall - wall,
                "total_wall": last_wall - wall, "positions": positions}


class PrefixCaching(Peer):
    """An engine that keeps the beginning of earlier prompts: nothing kept, the same chunks in their order, reordered.

    Every prompt ends in another question, so that only the chunks can be found in the cache. Subclasses name their
    rows in this order.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        self.asked = 0
        self.clean = False  # whether the engine keeps the chunks in their order, and in no other

    @abstractmethod
    def forget(self) -> None:
        """Empty the prefix cache."""

    @abstractmethod
    def read(self, ids: list[int]) -> None:
        """Read a prompt, up to the first token."""

    def prepare(self, row: str) -> None:
        raw, *_, reordered = self.rows
        if row == raw:
            self.forget()
        elif not self.clean:
            self.forget()
            self.read(self.prompt(reordered=False))
        self.clean = row != reordered

    def prompt(self, *, reordered: bool) -> list[int]:
        """All chunks and a question that was not asked before."""
        self.asked += 1
        turn = self.asked % len(self.question)
        chunks = self.task["chunks"][::-1] if reordered else self.task["chunks"]
        return [*(token for ids in chunks for token in ids), *self.question[turn:], *self.question[:turn]]

    def first(self, row: str) -> int:
        ids = self.prompt(reordered=row == self.rows[-1])
        self.read(ids)
        return len(ids)


def random_decoder(config: dict[str, Any]) -> Any:
    """A model of transformers with random weights, float32, on one thread and without gradients."""
    torch, transformers = package("torch"), package("transformers")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    made = transformers.AutoConfig.for_model(**config)
    return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()


class DecoderFolder:
    """A folder with a random decoder that another engine loads; gone with this object."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name)
        random_decoder(config).save_pretrained(self.path)
