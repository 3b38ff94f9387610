"""Peers as rows: each runs in a process and an interpreter of its own (`peer_driver.py`), one answer at a time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from ctxcomp_rag.errors import CtxcompError
from ctxcomp_rag.evaluation.bench.clock import Timing
from ctxcomp_rag.evaluation.bench.workload import Workload

PEERS: Final = ("kvpress", "llmlingua", "vllm", "llama.cpp", "openvino")
_NO_DRIVER: Final = {
    "llama.cpp": "no driver: it reads GGUF files, and nothing here writes a decoder of random weights as one",
    "openvino": "no driver: its models are exported by another package before they run",
}
_DRIVER = Path(__file__).with_name("peer_driver.py")


class PeerSkippedError(CtxcompError, RuntimeError):
    """A peer cannot run here; the message says why."""


class PeerRow:
    """A running peer; to be closed.

    Attributes:
        name: one of PEERS.
        versions: package -> version.

    Raises:
        PeerSkippedError: its interpreter or a package is missing, or it failed while it started.
    """

    in_process = False
    ideal = None
    stored = None

    def __init__(self, name: str, python: Path, config: Mapping[str, Any], workload: Workload, factor: int = 4) -> None:
        self.name, self.workload = name, workload
        if name in _NO_DRIVER:
            raise PeerSkippedError(_NO_DRIVER[name])
        if not python.exists():
            raise PeerSkippedError(f"there is no interpreter at {python}")
        vocabulary = int(config["vocab_size"])
        task = {"config": dict(config), "chunks": workload.chunk_ids(vocabulary), "factor": factor,
                "question": workload.question_ids(vocabulary), "new_tokens": workload.new_tokens}
        self._process = subprocess.Popen([str(python), str(_DRIVER), name], stdin=subprocess.PIPE, text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            self.versions: dict[str, str] = self._ask(task)["versions"]
        except PeerSkippedError:
            self.close()
            raise

    def timed(self, new_tokens: int) -> Timing:
        """One answer. Raises PeerSkippedError where the peer gives up."""
        return Timing(assemble=0.0, new_tokens=new_tokens, **self._ask({}))

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError as error:
            raise PeerSkippedError(f"its process ended: {error}") from error
        if not line:
            raise PeerSkippedError("its process ended without a word")
        answer: dict[str, Any] = json.loads(line)
        if "skip" in answer:
            raise PeerSkippedError(str(answer["skip"]))
        return answer

    def close(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_peers(interpreters: Mapping[str, Path], config: Mapping[str, Any], workload: Workload,
                names: Sequence[str] = PEERS) -> tuple[list[PeerRow], dict[str, str]]:
    """The peers that run, and why the others do not."""
    running: list[PeerRow] = []
    skipped: dict[str, str] = {}
    for name in names:
        if name not in interpreters and name not in _NO_DRIVER:
            skipped[name] = f"no interpreter given (--peer {name}=PYTHON)"
            continue
        try:
            running.append(PeerRow(name, interpreters.get(name, Path()), config, workload))
        except PeerSkippedError as error:
            skipped[name] = str(error)
    return running, skipped
