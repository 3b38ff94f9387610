"""Checksums of the files that say which rows of the table there are.

Rows carry their own. A deletion file has none: one flipped bit brings a deleted row back and hides another one.

    spans.lance/checksums.json      crc32 of every deletion file and manifest, and of this list
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Container
from pathlib import Path

from ctxcomp_rag.index.folder import write_file

CHECKSUMS = "checksums.json"
_PATTERNS = ("_deletions/*", "_versions/*.manifest")


def record_checksums(table: Path, before: Container[Path]) -> None:
    """After a commit: add its files, which are those not in `before`, and forget those that are gone.

    A writer that dies between commit and record leaves files without a checksum: they are believed.
    """
    known = _read(table)
    sums = {}
    for pattern in _PATTERNS:
        for file in table.glob(pattern):
            name = file.relative_to(table).as_posix()
            sums[name] = known[name] if file in before and name in known else zlib.crc32(file.read_bytes())
    write_file(table / CHECKSUMS, json.dumps({"files": sums, "crc": _crc(sums)}).encode())


def altered_files(table: Path) -> set[str]:
    """Files, as "_deletions/...", whose bytes are not those that were written."""
    altered = set()
    for name, crc in _read(table).items():
        try:
            data = (table / name).read_bytes()
        except FileNotFoundError:  # compacted away
            continue
        if zlib.crc32(data) != crc:
            altered.add(name)
    return altered


def _read(table: Path) -> dict[str, int]:
    try:
        data = json.loads((table / CHECKSUMS).read_bytes())
        sums: dict[str, int] = data["files"]
        return sums if data["crc"] == _crc(sums) else {}
    except (OSError, ValueError, KeyError, TypeError):  # a list that is damaged itself accuses nobody
        return {}


def _crc(sums: dict[str, int]) -> int:
    return zlib.crc32(json.dumps(sums, sort_keys=True).encode())
