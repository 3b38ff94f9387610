"""What this machine keeps of published indexes: all that is searched, nothing that is only read out.

    <cache>/<uri>-<digest>/
      <version>/            index.json, delimiters, tables of codecs, search snapshot, row ids of this version
      rows/                 see locator.py
      readers/              see pins.py

<cache> is $CTXCOMP_CACHE, else $XDG_CACHE_HOME/ctxcomp, else ~/.cache/ctxcomp. It may be deleted at any time. It holds
texts and vectors: only its owner may read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.errors import IndexDamagedError, IndexFolderError
from ctxcomp_rag.index.folder import MANIFEST, TABLE
from ctxcomp_rag.index.lance_reader import data_files, panics_are_errors
from ctxcomp_rag.index.locator import row_file, write_rows
from ctxcomp_rag.index.object_store import ObjectFolder
from ctxcomp_rag.index.pins import pinned_versions
from ctxcomp_rag.index.publication import DATA, Found, Publication
from ctxcomp_rag.index.vectors import CURRENT

_LIVE: Final = "rows.npy"
_AT_ONCE: Final = 16
_ABANDONED: Final = 24 * 3600  # seconds after which what a killed process was fetching is removed


def cache_of(uri: str) -> Path:
    """The folder for this index; made if need be."""
    base = os.environ.get("CTXCOMP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ctxcomp")
    name = re.sub(r"\W+", "-", uri.removeprefix("s3://"))[:64]
    folder = Path(base).expanduser() / f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise cannot_keep(uri, folder, error) from error
    return folder


def cannot_keep(uri: str, folder: Path, error: OSError) -> IndexFolderError:
    """What to raise where the cache cannot be written to."""
    return IndexFolderError(f"expected to be able to keep texts and vectors of {uri} in {folder}, got: {error}. Free "
                            f"some space, or set CTXCOMP_CACHE to a folder that you may write to.")


def bring(store: ObjectFolder, found: Found, cache: Path) -> Path:
    """Fetch what is missing of a version; returns its folder.

    Raises:
        IndexDamagedError: an object is not what was published.
        FileNotFoundError: it is gone; a newer version may have taken its place.
    """
    publication, data, _ = found
    folder = cache / str(publication.version)
    if _holds(folder, data) and all(file.exists() for file in row_files(publication, cache)):
        return folder
    (cache / "rows").mkdir(exist_ok=True)
    fetched = Path(tempfile.mkdtemp(prefix="tmp-", dir=cache))
    try:
        _fetch_small(store, publication, fetched)
        if publication.current:
            (fetched / CURRENT).write_text(json.dumps(dict(publication.current)))
        np.save(fetched / _LIVE, _bring_rows(store, publication, cache))
        (fetched / MANIFEST).write_bytes(data)
        _put_in_place(fetched, folder, data)
    finally:
        shutil.rmtree(fetched, ignore_errors=True)
    _prune(publication, cache)
    return folder


def live_rows(folder: Path) -> NDArray[np.int64]:
    """(n,) ids of the rows of the version in this folder, ascending."""
    return np.asarray(np.load(folder / _LIVE, allow_pickle=False), np.int64)


def row_files(publication: Publication, cache: Path) -> list[Path]:
    """Where the rows of a version are kept."""
    names = (name for name in publication.files if name.startswith(DATA) and name.endswith(".lance"))
    return [row_file(cache / "rows", name) for name in names]


def forget(publication: Publication, cache: Path) -> None:
    """Whatever is kept of this version is fetched anew when it is opened next."""
    shutil.rmtree(cache / str(publication.version), ignore_errors=True)
    for file in row_files(publication, cache):
        file.unlink(missing_ok=True)


def open_table(store: ObjectFolder, version: int) -> Any:
    """A version of the table in the store, as a Lance dataset."""
    import lance

    with panics_are_errors():
        return lance.dataset(f"{store.uri}/{TABLE}", version=version, storage_options=store.lance_options)


def _fetch_small(store: ObjectFolder, publication: Publication, to: Path) -> None:
    """What lies beside the table, into a folder; and of the table, a look at what decides which rows there are."""
    def fetch(name: str) -> None:
        stated = publication.files[name]
        target = to / Path(name).name
        store.download(name, stated.size, target)
        # a search snapshot has a digest of its own, and is made again from the rows
        if not name.startswith("faiss-") and zlib.crc32(target.read_bytes()) != stated.crc32:
            raise IndexDamagedError(f"{name} in {store.uri} is not what was published. Push the index again from its "
                                    f"folder: ctxcomp push DIR {store.uri}")
        if name.startswith(TABLE):
            target.unlink()

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fetch, (name for name in publication.files if not name.startswith(DATA))))


def _bring_rows(store: ObjectFolder, publication: Publication, cache: Path) -> NDArray[np.int64]:
    try:
        dataset = open_table(store, publication.version)
        for fragment in dataset.get_fragments():
            (name,) = data_files(fragment)
            file = row_file(cache / "rows", name)
            if not file.exists():
                write_rows(dataset, fragment, file)
        with panics_are_errors():
            live = dataset.scanner(columns=[], with_row_id=True).to_table()["_rowid"].to_numpy()
    except Exception as error:
        for name in publication.files:  # gone, or out of reach, rather than damaged?
            if name.startswith(DATA):
                store.get_range(name, 0, 1)
        raise IndexDamagedError(f"expected a readable Lance table at {store.uri}/{TABLE}, got: {error}. Push the index "
                                f"again from its folder: ctxcomp push DIR {store.uri}") from error
    return np.sort(live.astype(np.int64))


def _holds(folder: Path, data: bytes) -> bool:
    try:
        return (folder / MANIFEST).read_bytes() == data
    except OSError:
        return False


def _put_in_place(fetched: Path, folder: Path, data: bytes) -> None:
    if folder.exists() and not _holds(folder, data):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        fetched.rename(folder)
    except OSError:
        if not _holds(folder, data):  # else another process was faster
            raise


def _prune(publication: Publication, cache: Path) -> None:
    """Remove what no reader needs any more; rows that somebody has mapped stay readable for them."""
    keep = {str(version) for version in (publication.version, *pinned_versions(cache))}
    wanted = set(row_files(publication, cache))
    for entry in cache.iterdir():
        abandoned = entry.name.startswith("tmp-") and time.time() - entry.stat().st_mtime > _ABANDONED
        if (entry.name.isdigit() and entry.name not in keep) or abandoned:
            shutil.rmtree(entry, ignore_errors=True)
    for file in (cache / "rows").glob("*.arrow"):
        if file not in wanted:
            file.unlink(missing_ok=True)
