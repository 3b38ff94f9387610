"""What `index.json` says of a published index, beyond what it says of one in a folder: which objects make it up.

    s3://BUCKET/PREFIX/
      index.json      as in a folder, and "published": version and objects. The commit point: all else is there before
      delimiters.safetensors, codec-<digest>.safetensors, faiss-<version>.bin, spans.lance/...      as in a folder

A published index is read as `index.json` names it, never by listing. Copied into a folder it is an index again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from ctxcomp_rag.errors import IndexDamagedError, IndexFolderError
from ctxcomp_rag.index.folder import MANIFEST, TABLE
from ctxcomp_rag.index.object_store import ObjectFolder

_KEY = "published"
DATA = f"{TABLE}/data/"
SAME = ("fingerprint", "vector_size", "retrieval_encoder", "codec")
"""Fields of `index.json` in which all versions of an index agree."""


@dataclass(frozen=True)
class PublishedFile:
    """One object. `crc32`: of its bytes; None for data files, whose rows carry their own."""

    size: int
    e_tag: str
    crc32: int | None = None


@dataclass(frozen=True)
class Publication:
    """
    Attributes:
        index: what `index.json` says of any index.
        version: of the Lance table.
        files: name below the prefix -> object, `index.json` itself left out.
        current: what `CURRENT.json` says of the search snapshot, {} for none.
    """

    index: dict[str, Any]
    version: int
    files: dict[str, PublishedFile]
    current: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        published = {"version": self.version, "current": dict(self.current),
                     "files": {name: asdict(file) for name, file in sorted(self.files.items())}}
        return json.dumps({**self.index, _KEY: published}, indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, uri: str) -> Self:
        """
        Raises:
            IndexDamagedError: these are not the bytes of an `index.json`.
            IndexFolderError: it was not published, but copied.
        """
        try:
            index = json.loads(data)
            if _KEY not in index:
                raise IndexFolderError(f"expected an index that was pushed to {uri}, but its {MANIFEST} names no "
                                       f"objects: a folder was copied there. Push it into an empty prefix: ctxcomp "
                                       f"push DIR s3://BUCKET/PREFIX")
            published = index.pop(_KEY)
            files = {str(name): PublishedFile(**file) for name, file in published["files"].items()}
            return cls(index, int(published["version"]), files, published["current"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IndexDamagedError(f"{MANIFEST} in {uri} cannot be read ({error!r}). Publish the index again, into an "
                                    f"empty prefix: ctxcomp push DIR s3://BUCKET/PREFIX") from error


class Found(NamedTuple):
    """What is published somewhere, and the bytes and e_tag of the `index.json` that says so."""

    publication: Publication
    data: bytes
    e_tag: str


def read_publication(store: ObjectFolder) -> Found | None:
    """What is published there; None for nothing."""
    try:
        data, tag = store.get(MANIFEST)
    except FileNotFoundError:
        return None
    return Found(Publication.from_bytes(data, store.uri), data, tag)


def require_publication(store: ObjectFolder) -> Found:
    """Raises IndexFolderError where nothing is published."""
    found = read_publication(store)
    if found is None:
        raise IndexFolderError(f"expected an index at {store.uri}, but there is no {MANIFEST}. Check the prefix, or "
                               f"publish an index there: ctxcomp push DIR {store.uri}")
    return found
