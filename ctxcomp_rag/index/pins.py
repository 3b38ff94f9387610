"""Which versions of an index are open somewhere: a locked file for each, so that compaction leaves their files alone.

    readers/<version>.lock      shared lock of everybody who reads this version; the system releases it with the process
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

READERS = "readers"


class VersionPin:
    """Held while a version is open. Where the folder cannot be written to, or has no locks, it holds nothing."""

    def __init__(self, folder: Path, version: int) -> None:
        descriptor = _lock_shared(folder / READERS / f"{version}.lock")
        self._release = weakref.finalize(self, os.close, descriptor) if descriptor is not None else None

    def release(self) -> None:
        if self._release is not None:
            self._release()


def pinned_versions(folder: Path) -> set[int]:
    """Versions that somebody has open; files of those that nobody has any more are removed."""
    pinned = set()
    for file in (folder / READERS).glob("*.lock"):
        if not _unlink_unless_locked(file):
            pinned.add(int(file.stem))
    return pinned


def _lock_shared(file: Path) -> int | None:
    try:
        import fcntl

        file.parent.mkdir(exist_ok=True)
        while True:
            descriptor = os.open(file, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:  # not removed between the two calls
                    return descriptor
            except BlockingIOError:  # a writer is looking whether it may be removed
                pass
            except OSError:
                os.close(descriptor)
                return None
            os.close(descriptor)
    except (ImportError, OSError):
        return None


def _unlink_unless_locked(file: Path) -> bool:
    import fcntl

    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
