"""The files of a Lance table: which are new, are they whole and on the disk, and how they are taken back.

    data/            rows and spans         _deletions/    which rows are gone
    _versions/       manifests              _transactions/
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ctxcomp_rag.index.checksums import record_checksums
from ctxcomp_rag.index.folder import folder_bytes, fsync_all, fsync_path

DATA, DELETIONS, VERSIONS = "data", "_deletions", "_versions"
_FOLDERS: Final = (DATA, DELETIONS, VERSIONS, "_transactions")


class TableChange:
    """What comes to lie below a table from here on: Lance neither fsyncs it, nor takes it back where it fails."""

    def __init__(self, table: Path) -> None:
        self._table = table
        self._before = {name: set(listing(table / name)) for name in _FOLDERS}

    def fsync(self) -> None:
        """New files are on the disk when this returns. Data has to be before the manifest that names it."""
        for name, known in self._before.items():
            folder = self._table / name
            if not folder.is_dir():
                continue
            for new in set(listing(folder)) - known:
                fsync_all([*listing(new), new])  # spans above 64 KB lie in a folder beside their data file
            fsync_path(folder)
        fsync_path(self._table)

    def committed(self) -> None:
        """On the disk, and with checksums."""
        self.fsync()
        record_checksums(self._table, set().union(*self._before.values()))

    def require_whole(self, fragments: Sequence[Any], span_bytes: int) -> None:
        """Raises OSError where data files are shorter than what was written: on a full disk Lance does not always
        say so."""
        folder = self._table / DATA
        for fragment in fragments:
            for file in fragment.files:
                stated, found = file.file_size_bytes, (folder / file.path).stat().st_size
                if stated is not None and stated != found:
                    raise OSError(errno.EIO, f"{file.path} has {found} bytes instead of {stated}")
        new = set(listing(folder)) - self._before[DATA]
        total = sum(folder_bytes(path) if path.is_dir() else path.stat().st_size for path in new)
        if total < span_bytes:
            raise OSError(errno.EIO, f"{total} bytes were written instead of at least {span_bytes}")

    def withdraw(self) -> None:
        """Remove new rows and deletions, unless a manifest came with them: then they may be the table."""
        if set(listing(self._table / VERSIONS)) == self._before[VERSIONS]:
            remove_but(self._table / DATA, self._before[DATA])
            remove_but(self._table / DELETIONS, self._before[DELETIONS])


def listing(folder: Path) -> list[Path]:
    """What lies in a folder; nothing for what is none."""
    return [Path(entry.path) for entry in os.scandir(folder)] if folder.is_dir() else []


def remove_but(folder: Path, kept: set[Path]) -> None:
    """Remove files and folders of files, as far as that can be done; the next compaction tries again."""
    for path in set(listing(folder)) - kept:
        for file in [*listing(path), path]:
            with suppress(OSError):
                file.rmdir() if file.is_dir() else file.unlink()


def manifest_files(table: Path) -> list[tuple[int, Path]]:
    """(version, manifest), newest first. Lance names them by 2^64 - 1 - version, so that the newest sorts first."""
    found = []
    for file in listing(table / VERSIONS):
        if file.suffix == ".manifest" and file.stem.isdigit():
            number = int(file.stem)
            found.append((2**64 - 1 - number if len(file.stem) == 20 else number, file))
    return sorted(found, reverse=True)


def remove_torn_manifests(folder: Path) -> None:
    """Remove what `set_aside_torn_manifests` moved to the index folder."""
    for file in folder.glob("torn-*.manifest"):
        file.unlink(missing_ok=True)
