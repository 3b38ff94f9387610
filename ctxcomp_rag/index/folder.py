"""The folder of an index: its manifest, its writer's lock, and files that survive a power cut.

    index.json                what the spans are, who may read them (written last: its presence makes a folder an index)
    delimiters.safetensors    the compressor's delimiter embeddings, if it has any
    codec-<digest>.safetensors    what a codec has learned, if it learns; see tables.py
    spans.lance/              chunks, vectors and spans; see span_store.py
    faiss-<version>.bin, CURRENT.json    a copy of the vectors for search; see vectors.py
    writer.lock               locked while somebody writes; holds the writer's process id
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from ctxcomp_rag.errors import CtxcompError, IndexDamagedError, IndexFolderError, IndexLockedError
from ctxcomp_rag.index.codecs import codec_named
from ctxcomp_rag.spans import SpanSpec

FORMAT = "ctxcomp-rag index"
FORMAT_VERSION = 1
MANIFEST, DELIMITERS, TABLE, LOCK = "index.json", "delimiters.safetensors", "spans.lance", "writer.lock"


def fsync_path(path: str | Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Replace a file so that a crash leaves either the old or the new bytes, never a mixture."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def is_disk_full(error: BaseException, path: Path, needed: int) -> bool:
    """True for ENOSPC and EDQUOT, also where Lance has them only in its text, or hides them although less than
    `needed` bytes are free."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    signs = ("os error 28", "os error 122", "No space left on device")
    return any(sign in text for sign in signs) or (needed > 0 and shutil.disk_usage(path).free < needed)


def disk_full_error(path: Path, what: str) -> IndexFolderError:
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    return IndexFolderError(
        f"the disk is full: {what}; {free:,} bytes are left under {path}. Everything written before is intact. "
        f"Free some space and run the same command again: it continues with what is missing."
    )


@dataclass(frozen=True)
class Manifest:
    """What `index.json` says. `codec_tables`: digest of what the codec has learned, "" for nothing (yet)."""

    spec: SpanSpec
    vector_size: int
    retrieval_encoder: str
    codec: str = "exact"
    codec_tables: str = ""

    def write(self, folder: Path) -> None:
        if self.spec.delimiters:
            tensors = {name: rows.cpu().contiguous().clone() for name, rows in self.spec.delimiters.items()}
            write_file(folder / DELIMITERS, safetensors.torch.save(tensors))
        data = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "spec": self.spec.to_dict(),
            "fingerprint": self.spec.fingerprint,
            "vector_size": self.vector_size,
            "retrieval_encoder": self.retrieval_encoder,
            "codec": self.codec,
            "codec_tables": self.codec_tables,
        }
        write_file(folder / MANIFEST, json.dumps(data, indent=2).encode() + b"\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """
        Raises:
            IndexFolderError: the folder does not exist, is not an index, or is of a newer format.
            IndexDamagedError: the manifest or the delimiters cannot be read, or contradict each other.
        """
        if not folder.is_dir():
            found = "a file is there" if folder.exists() else "nothing is there"
            raise IndexFolderError(
                f"expected an index folder at {folder}, but {found}. Check the path, "
                f"or create the index with MemoryIndex.create(path, ...)."
            )
        try:
            raw = (folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            hint = (
                "The folder holds spans: restore index.json (and delimiters.safetensors) from a copy."
                if (folder / TABLE).exists()
                else "Check the path, or create the index with MemoryIndex.create(path, ...)."
            )
            raise IndexFolderError(f"expected {MANIFEST} in {folder}, but it is missing. {hint}") from None
        restore = f"Restore {MANIFEST} and {DELIMITERS} in {folder} from a copy, or precompress into a new folder."
        try:
            data = json.loads(raw)
            if data["format"] != FORMAT:
                raise IndexFolderError(f"expected format {FORMAT!r} in {folder / MANIFEST}, got {data['format']!r}.")
            if data["format_version"] > FORMAT_VERSION:
                raise IndexFolderError(
                    f"{folder} has index format {data['format_version']}, this ctxcomp-rag reads up to "
                    f"{FORMAT_VERSION}. Upgrade: pip install -U ctxcomp-rag"
                )
            stated = data["spec"]["delimiters"]
            delimiters = safetensors.torch.load((folder / DELIMITERS).read_bytes()) if stated else {}
            spec = SpanSpec.from_dict(data["spec"], delimiters)
            manifest = cls(spec, int(data["vector_size"]), str(data["retrieval_encoder"]),
                           codec_named(data.get("codec", "exact")).name, str(data.get("codec_tables", "")))
        except IndexFolderError:
            raise
        except (CtxcompError, OSError, ValueError, KeyError, TypeError, AttributeError,
                safetensors.SafetensorError) as error:
            raise IndexDamagedError(f"the manifest of {folder} cannot be read ({error}). {restore}") from error
        if spec.fingerprint != data.get("fingerprint"):
            raise IndexDamagedError(
                f"{folder / MANIFEST} states the fingerprint {data.get('fingerprint')}, but its contents give "
                f"{spec.fingerprint}: it was altered. {restore}"
            )
        return manifest


class WriterLock:
    """At most one writer per index, over all processes. The system releases it when the process dies."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> bool:
        """True if the lock was taken now, False if it was held already.

        Raises:
            IndexLockedError: another process, or another MemoryIndex of this process, holds it.
            IndexFolderError: the folder cannot be written to.
        """
        if self.held:
            return False
        try:
            import fcntl
        except ImportError:
            raise IndexFolderError(
                "expected a POSIX system (Linux, macOS, WSL) for writing to an index, got one without fcntl; "
                "reading works: MemoryIndex.open(path, read_only=True)."
            ) from None
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise IndexFolderError(
                f"expected to be able to write to {self._path.parent}, got: {error.strerror}. "
                f"Change its permissions, or open it with read_only=True."
            ) from error
        try:
            # flock, not lockf: it also keeps two objects of one process apart
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            who = "another MemoryIndex of this process" if pid == str(os.getpid()) else "another process"
            raise IndexLockedError(
                f"expected to be the only writer of {self._path.parent}, but {who} (process id {pid}) is writing to "
                f"it. Wait for it, or call close() there; reading is possible all the time."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(directory, name))
            except FileNotFoundError:  # a writer may be at work
                continue
    return total


def fsync_all(paths: Iterable[Path]) -> None:
    for path in paths:
        fsync_path(path)
