"""A published version of the table: rows from the cache of this machine, spans from the object store."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import IndexDamagedError, IndexFolderError, IndexUnreachableError
from ctxcomp_rag.index.folder import MANIFEST, Manifest
from ctxcomp_rag.index.lance_reader import LanceReader
from ctxcomp_rag.index.locator import places, read_rows
from ctxcomp_rag.index.object_store import ObjectFolder
from ctxcomp_rag.index.publication import Found, require_publication
from ctxcomp_rag.index.remote_cache import bring, cache_of, cannot_keep, forget, live_rows, open_table, row_files
from ctxcomp_rag.index.span_cache import Place, SpanCache
from ctxcomp_rag.index.table_reader import TableReader, names_in
from ctxcomp_rag.spans import MemorySpan

if TYPE_CHECKING:
    import pyarrow as pa


class RemoteTable(TableReader):
    """A version that `publish` has made visible. Make one with `open`; opening an unchanged one takes one request.

    Attributes:
        cache: what this machine keeps of the index; `folder` is the version's part of it.
        manifest: what `index.json` says of any index.
    """

    def __init__(self, store: ObjectFolder, cache: Path, folder: Path, found: Found, spans: SpanCache) -> None:
        super().__init__(found.publication.version, folder)
        self.cache, self.manifest = cache, Manifest.read(folder)
        self.remedy = f"Push the index again from its folder: ctxcomp push DIR {store.uri}"
        self._store, self._found, self._spans = store, found, spans
        self._local = read_rows(row_files(found.publication, cache), self.manifest.vector_size)
        self._ids = live_rows(folder)
        known = self._local["_rowid"].to_numpy().astype(np.int64)
        order = np.argsort(known)
        at = np.searchsorted(known, self._ids, sorter=order)
        if (at >= len(known)).any() or (known[order[at]] != self._ids).any():
            raise IndexDamagedError(f"the rows kept in {cache} are not those of {store.uri}; delete that folder")
        self._places = order[at]
        """(n,) where in `_local` the rows with `_ids` are."""
        self._names = names_in(self._scan(["chunk_id", "document_id"]))

    @classmethod
    def open(cls, uri: str) -> Self:
        """The version that is published now.

        Raises:
            InputError, IndexFolderError, IndexUnreachableError: see `ObjectFolder`; or nothing is published there.
            IndexDamagedError: an object is not what was published.
        """
        store = ObjectFolder(uri)
        spans = SpanCache(lambda place: store.get_range(*place))
        return cls._open(store, require_publication(store), spans)

    @classmethod
    def _open(cls, store: ObjectFolder, found: Found, spans: SpanCache) -> Self:
        cache = cache_of(store.uri)
        try:
            return cls(store, cache, bring(store, found, cache), found, spans)
        except IndexUnreachableError:
            raise
        except Exception:  # a newer version was published meanwhile, or the cache is damaged
            forget(found.publication, cache)
        found = require_publication(store)
        try:
            return cls(store, cache, bring(store, found, cache), found, spans)
        except FileNotFoundError as error:
            raise IndexDamagedError(f"{error}, although it was published. Push the index again from its folder: "
                                    f"ctxcomp push DIR {store.uri}") from error
        except IndexFolderError:
            raise
        except OSError as error:
            raise cannot_keep(store.uri, cache, error) from error

    def latest(self) -> Self | None:
        if self._store.e_tag(MANIFEST) == self._found.e_tag:
            return None
        return type(self)._open(self._store, require_publication(self._store), self._spans)

    def uncached(self) -> TableReader:
        return self._through_lance

    def require_answers(self, row_ids: Sequence[int]) -> None:
        for name in sorted({place.object for place in places(self._scan(["span"], row_ids))}):
            with suppress(FileNotFoundError):  # a store that says so answers
                self._store.get_range(name, 0, 1)

    def count_rows(self) -> int:
        return self._through_lance.count_rows()

    def stored_bytes(self) -> int:
        return len(self._found.data) + sum(file.size for file in self._found.publication.files.values())

    # -- reading

    def read_rows(self, row_ids: Sequence[int]) -> dict[int, tuple[Chunk, MemorySpan, NDArray[np.float32]]]:
        try:
            return super().read_rows(row_ids)
        except IndexDamagedError:  # in the store, or only here?
            self._spans.forget(places(self._scan(["span"], row_ids)))
            found = self._through_lance.read_rows(row_ids)
            warnings.warn(f"rows of {self._store.uri} that were kept in {self.cache} are damaged; they were read anew.",
                          stacklevel=4)
            forget(self._found.publication, self.cache)
            return found

    def _scan(self, columns: Sequence[str], row_ids: Sequence[int] | None = None) -> pa.Table:
        wanted = self._places
        if row_ids is not None:
            ids = np.fromiter(row_ids, np.int64, len(row_ids))
            at = np.minimum(np.searchsorted(self._ids, ids), max(len(self._ids) - 1, 0))
            wanted = self._places[at[self._ids[at] == ids]] if len(self._ids) else self._places
        return self._local.select([*columns, "_rowid"]).take(wanted)

    def _stream(self, columns: Sequence[str], row_ids: Sequence[int]) -> Iterator[pa.RecordBatch]:
        yield from self._scan(columns, row_ids).to_batches()

    def _with_spans(self, columns: Sequence[str], row_ids: Sequence[int]) -> tuple[pa.Table, list[Any]]:
        rows = self._scan([*columns, "span"], row_ids)
        where = places(rows)
        if not all(self._is_published(place) for place in where):
            return self._through_lance._with_spans(columns, row_ids)
        return rows.drop_columns(["span"]), list(self._spans.read(where))

    def _is_published(self, place: Place) -> bool:
        """Whether the bytes lie where Lance is thought to have put them."""
        file = self._found.publication.files.get(place.object)
        return file is not None and place.start + place.size <= file.size

    @cached_property
    def _through_lance(self) -> LanceReader:
        """The same rows as Lance reads them from the store: slower, and without a cache."""
        reader = LanceReader(open_table(self._store, self.version), self.folder)
        reader.remedy, reader._names = self.remedy, self._names
        return reader
