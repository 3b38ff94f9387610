"""Publishing an index in an object store, so that a reader sees the last version or the new one, never a mixture.

Order: data, lists of deletions and what lies beside the table; the table's manifest; `index.json`, which names them all
and is replaced only if it is still the one that was there at the start; then what no version needs any more goes. A
push that dies leaves objects that nobody names: the next one uses or removes them.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ctxcomp_rag.errors import IndexDamagedError, IndexFolderError, InputError
from ctxcomp_rag.index.folder import DELIMITERS, MANIFEST, TABLE
from ctxcomp_rag.index.object_store import ObjectFolder, StoredObject, object_uri
from ctxcomp_rag.index.publication import DATA, SAME, Publication, PublishedFile, read_publication
from ctxcomp_rag.index.span_store import SpanTable
from ctxcomp_rag.index.vectors import CURRENT

_OURS: Final = re.compile(rf"{TABLE}/.*|faiss-\d+\.bin|codec-\w+\.safetensors")
_AT_ONCE: Final = 4  # uploads, each of which may send a large file in 12 parts
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PushReport:
    """What `MemoryIndex.push` did.

    Attributes:
        version: the version that readers see now.
        uploaded: objects, and `uploaded_bytes`, that were not there; without `index.json`.
        unchanged: objects that were there already.
        removed: objects of older versions and of pushes that died.
    """

    version: int
    uploaded: int
    uploaded_bytes: int
    unchanged: int
    removed: int


def publish(folder: Path, table: SpanTable, where: str, progress: Progress | None = None) -> PushReport:
    """Make `table`, the version that nobody changes meanwhile, what is read at `where`; see `MemoryIndex.push`."""
    uri = object_uri(where)
    if uri is None:
        raise InputError(f"expected s3://BUCKET/PREFIX to publish to, got {where!r}")
    if table.unreadable or table.altered:
        raise IndexDamagedError(f"expected an undamaged index in {folder}, but files of it cannot be trusted. See "
                                f"ctxcomp verify {folder}, repair it, then push again.")
    store = ObjectFolder(uri)
    index, files = _local(folder, table)
    found = read_publication(store)
    before, tag = (found.publication, found.e_tag) if found else (None, None)
    *others, manifest = files
    if before:
        _require_same(before, index, table.version, uri)
    there = store.list()
    crcs = {name: None if name.startswith(DATA) else zlib.crc32(path.read_bytes()) for name, path in files.items()}
    published = before.files if before else {}
    if before and before.version == table.version and crcs[manifest] != published[manifest].crc32:
        raise _another(uri, table.version)
    new = [name for name in others if not _is_there(name, files[name], crcs[name], there, published)]
    sizes = {name: path.stat().st_size for name, path in files.items()}
    tags = {name: there[name].e_tag for name in files if name in there} | _upload(store, files, new, sizes, progress)
    if not _is_there(manifest, files[manifest], crcs[manifest], there, published):
        own = manifest in published  # it was altered there
        tags[manifest] = _put_manifest(store, manifest, files[manifest].read_bytes(), own, table.version)
        new.append(manifest)
    named = {name: PublishedFile(sizes[name], tags[name], crcs[name]) for name in files}
    publication = Publication(index, table.version, named, _snapshot(folder, table.version))
    if publication != before:
        try:
            store.put(MANIFEST, publication.to_bytes(), replacing=tag, new=tag is None)
        except FileExistsError:
            raise IndexFolderError(f"somebody else pushed to {uri} meanwhile, and what they pushed is there now. Look "
                                   f"at it with ctxcomp inspect {uri}, then push again if this index is the newer one."
                                   ) from None
    old = [name for name in there if _OURS.fullmatch(name) and name not in files]
    store.delete(old)
    return PushReport(table.version, len(new), sum(sizes[name] for name in new), len(files) - len(new), len(old))


def _local(folder: Path, table: SpanTable) -> tuple[dict[str, Any], dict[str, Path]]:
    """What `index.json` says, and object name -> file of this version, the table's manifest last."""
    index: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    index.pop("published", None)  # of a folder that was copied from an object store
    beside = [p for p in (folder / DELIMITERS, *folder.glob("codec-*.safetensors")) if p.exists()]
    snapshot = _snapshot(folder, table.version)
    beside += [folder / snapshot["file"]] if snapshot else []
    names = [*(path.name for path in beside), *(f"{TABLE}/{name}" for name in table.files())]
    return index, {name: folder / name for name in names}


def _snapshot(folder: Path, version: int) -> dict[str, Any]:
    try:
        current: dict[str, Any] = json.loads((folder / CURRENT).read_bytes())
        return current if current["version"] == version and (folder / current["file"]).is_file() else {}
    except (OSError, ValueError, KeyError, TypeError):  # it only saves time at open
        return {}


def _require_same(before: Publication, index: dict[str, Any], version: int, uri: str) -> None:
    differing = [key for key in SAME if before.index.get(key) != index.get(key)]
    if differing:
        raise IndexFolderError(f"expected {uri} to be empty or to hold this index, but it holds another one ("
                               f"{', '.join(differing)} differ). Push to another prefix.")
    if before.version > version:
        raise IndexFolderError(f"expected {uri} to hold no newer version than this index, {version}, but it holds "
                               f"{before.version}: this is an older copy, or another index. Push to another prefix.")


def _another(uri: str, version: int) -> IndexFolderError:
    return IndexFolderError(f"another copy of this index has pushed, or begun to push, its version {version} to {uri}. "
                            f"Push from that copy, or push this one to another prefix.")


def _is_there(name: str, path: Path, crc: int | None, there: dict[str, StoredObject],
              published: dict[str, PublishedFile]) -> bool:
    """Whether the store holds this very file. Data files never change and their names are never given out twice."""
    if name not in there or there[name].size != path.stat().st_size:
        return False
    if name in published:
        return published[name].e_tag == there[name].e_tag and published[name].crc32 == crc
    return crc is None


def _upload(store: ObjectFolder, files: dict[str, Path], names: list[str], sizes: dict[str, int],
            progress: Progress | None) -> dict[str, str]:
    """Name -> e_tag of what was written."""
    total, done = sum(sizes[name] for name in names), 0
    tags: dict[str, str] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for name, tag in zip(names, pool.map(lambda n: store.put(n, files[n]), names), strict=True):
                tags[name] = tag
                done += sizes[name]
                if progress:
                    progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return tags


def _put_manifest(store: ObjectFolder, name: str, data: bytes, own: bool, version: int) -> str:
    try:
        return store.put(name, data, new=not own)
    except FileExistsError:
        stored, tag = store.get(name)
        if stored != data:
            raise _another(store.uri, version) from None
        return tag
