"""Peers as rows: each runs in a process and an interpreter of its own (`peer_drivers`), one answer at a time."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from ctxcomp_rag.errors import CtxcompError
from ctxcomp_rag.evaluation.bench.clock import Timing
from ctxcomp_rag.evaluation.bench.workload import Workload

CHECKOUTS: Final = {"icae": "https://github.com/getao/icae",
                    "pcc": "https://github.com/broalantaps/The-most-influential-graduation-project"}
"""Peers that are no package: name -> repository."""

PEERS: Final = ("kvpress", "llmlingua", "vllm", "llama.cpp", "openvino", *CHECKOUTS)
_FOLDER = Path(__file__).parent


class PeerSkippedError(CtxcompError, RuntimeError):
    """A peer cannot run here; the message says why."""


class PeerProcess:
    """A running peer; to be closed.

    Attributes:
        name: one of PEERS.
        versions: package -> version.
        rows: names of what it can measure.

    Raises:
        PeerSkippedError: its interpreter or a package is missing, or it failed while it started.
    """

    def __init__(self, name: str, python: Path, config: Mapping[str, Any], workload: Workload, factor: int = 4,
                 checkout: Path | None = None) -> None:
        self.name = name
        if name in CHECKOUTS and checkout is None:
            raise PeerSkippedError(f"no checkout given (--checkout {name}=FOLDER, a clone of {CHECKOUTS[name]})")
        if not python.exists():
            raise PeerSkippedError(f"there is no interpreter at {python}")
        vocabulary = int(config["vocab_size"])
        task = {"config": dict(config), "chunks": workload.chunk_ids(vocabulary), "factor": factor,
                "question": workload.question_ids(vocabulary), "new_tokens": workload.new_tokens,
                "checkout": str(checkout)}
        self._errors = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115 - open until `close`
        try:
            self._process = subprocess.Popen([str(python), "-m", "peer_drivers", name], text=True,
                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                                             env={**os.environ, "PYTHONPATH": str(_FOLDER)})  # nothing else of ours
        except OSError as error:
            raise PeerSkippedError(f"{python} does not start: {error.strerror}") from error
        try:
            ready = self.ask(task)
        except PeerSkippedError:
            self.close()
            raise
        self.versions: dict[str, str] = ready["versions"]
        self.rows: tuple[str, ...] = tuple(ready["rows"])

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """One line in, one line out. Raises PeerSkippedError where the peer gives up."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise PeerSkippedError(f"its process ended{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "skip" in answer:
            raise PeerSkippedError(str(answer["skip"]))
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        written = self._errors.read().split("\n")
        return next((f": {line.strip()[:300]}" for line in reversed(written) if line.strip()), " without a word")

    def close(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class PeerRow:
    """One of the rows of a peer."""

    name: str
    process: PeerProcess
    in_process: ClassVar[bool] = False
    ideal: ClassVar[None] = None
    stored: ClassVar[None] = None

    def timed(self, new_tokens: int) -> Timing:
        """One answer. Raises PeerSkippedError where the peer gives up."""
        return Timing(assemble=0.0, new_tokens=new_tokens, **self.process.ask({"row": self.name}))


def start_peers(interpreters: Mapping[str, Path], config: Mapping[str, Any], workload: Workload,
                checkouts: Mapping[str, Path] | None = None) -> tuple[list[PeerProcess], dict[str, str]]:
    """The peers that run, and why the others do not. `checkouts`: folders of those in CHECKOUTS, by name."""
    running: list[PeerProcess] = []
    skipped: dict[str, str] = {}
    for name in PEERS:
        if name not in interpreters:
            skipped[name] = f"no interpreter given (--peer {name}=PYTHON)"
            continue
        try:
            running.append(PeerProcess(name, interpreters[name], config, workload,
                                       checkout=(checkouts or {}).get(name)))
        except PeerSkippedError as error:
            skipped[name] = str(error)
    return running, skipped
