"""The tables of the codecs that learn, beside the rows of an index: `codec-<digest>.safetensors`.

A file is named by the digest of what it holds and never changes; every span names the digest it was stored with. So a
span is read with the tables that wrote it or not at all, and a damaged file is known by its name.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import safetensors
import safetensors.torch

from ctxcomp_rag.errors import IndexDamagedError
from ctxcomp_rag.index.codecs import Tables
from ctxcomp_rag.index.folder import write_file


def tables_digest(tables: Tables) -> str:
    """16 hex digits over names, shapes and values; "" for no tables."""
    if not tables:
        return ""
    digest = hashlib.sha256()
    for name, table in sorted(tables.items()):
        digest.update(f"{name} {table.dtype} {tuple(table.shape)}".encode() + table.numpy().tobytes())
    return digest.hexdigest()[:16]


def write_tables(folder: Path, tables: Tables) -> str:
    """Store tables in the folder of an index; returns their digest."""
    digest = tables_digest(tables)
    write_file(_file(folder, digest), safetensors.torch.save({name: t.contiguous() for name, t in tables.items()}))
    return digest


def read_tables(folder: Path, digest: str) -> Tables:
    """
    Raises:
        IndexDamagedError: the file is missing, or does not hold what it is named after.
    """
    file = _file(folder, digest)
    try:
        return _read(file, digest, file.stat().st_mtime_ns)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise IndexDamagedError(f"{file} cannot be read ({error}), and without it none of the spans stored with it. "
                                f"Restore it from a copy, or precompress the documents into a new index.") from error


@lru_cache(maxsize=16)
def _read(file: Path, digest: str, changed: int) -> Tables:
    tables = safetensors.torch.load(file.read_bytes())
    if tables_digest(tables) != digest:
        raise ValueError("its contents are not those it is named after")
    return tables


def _file(folder: Path, digest: str) -> Path:
    return folder / f"codec-{digest}.safetensors"
