"""MemoryIndex: a folder in which the vector, the memory span and the text of a chunk live and die together."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import CtxcompError, IndexDamagedError, IndexFolderError, InputError
from ctxcomp_rag.index.codecs import DEFAULT_CODEC, Codec, codec_named
from ctxcomp_rag.index.folder import (
    DELIMITERS,
    TABLE,
    Manifest,
    WriterLock,
    disk_full_error,
    folder_bytes,
    is_disk_full,
)
from ctxcomp_rag.index.index_reader import IndexReader, T, vectors_for
from ctxcomp_rag.index.inputs import places_of_chunks
from ctxcomp_rag.index.object_store import object_uri, require_folder
from ctxcomp_rag.index.pins import pinned_versions
from ctxcomp_rag.index.publish import PushReport, publish
from ctxcomp_rag.index.rows import Row, codec_for
from ctxcomp_rag.index.span_store import SpanTable, set_aside_torn_manifests
from ctxcomp_rag.index.table_files import manifest_files, remove_torn_manifests
from ctxcomp_rag.index.table_reader import TableReader
from ctxcomp_rag.index.tables import read_tables, write_tables
from ctxcomp_rag.index.vectors import CURRENT, VectorIndex
from ctxcomp_rag.spans import MemorySpan, SpanSpec

# A snapshot is written when it would save replaying this many rows, or a quarter of all: the cost stays linear.
_SNAPSHOT_ROWS = 4096
_COMMITS_BETWEEN_COMPACTIONS = 256


@dataclass(frozen=True)
class AddReport:
    """Chunks committed by one `add`, and chunks that were there already."""

    added: int
    skipped: int


class MemoryIndex(IndexReader):
    """Compressed chunks, searched by vector. Make one with `create` or `open`.

    Any number of readers and at most one writer, over all processes. A reader sees the version it opened until
    `refresh`, through every compaction but one that erases. All methods may be called from several threads.

    Attributes:
        path: the folder; of an index in an object store, what this machine keeps of it.
        location: where it was opened, as a folder or a URI.
        spec: what the spans are and which decoder reads them.
        vector_size: numbers per vector.
        retrieval_encoder: name of what made the vectors.
        codec: how spans are stored; see `ctxcomp_rag.index.codecs`.
    """

    def __init__(self, path: Path, location: str, manifest: Manifest, table: TableReader, vectors: VectorIndex, *,
                 saved: int = -1, read_only: bool) -> None:
        super().__init__(path, location, manifest, table, vectors)
        self.read_only = read_only
        self._saved_version, self._unsaved_rows, self._commits = saved, 0, 0
        self._writer = WriterLock(path)

    # ---- opening and closing

    @classmethod
    def create(cls, path: str | Path, spec: SpanSpec, *, vector_size: int, retrieval_encoder: str,
               codec: str | None = None) -> Self:
        """Make an empty index in a new or empty folder of this machine.

        Args:
            codec: "exact", or one of the codecs that store spans in fewer bytes at a stated error [default:
                `ctxcomp_rag.index.codecs.DEFAULT_CODEC`].

        Raises:
            InputError: there is no such codec, vector_size is below 1, or the path is a URI.
            IndexFolderError: something is there already, or the folder cannot be written.
        """
        require_folder(path)
        path = Path(path).absolute()
        codec = codec_named(codec or DEFAULT_CODEC).name
        if vector_size < 1:
            raise InputError(f"expected vector_size of at least 1, got {vector_size}")
        if path.exists() and not path.is_dir():
            raise IndexFolderError(f"expected a new folder at {path}, but a file is there. Choose another path.")
        if path.is_dir() and any(path.iterdir()):
            what = "an index is there already" if (path / "index.json").exists() else "it holds other files"
            raise IndexFolderError(
                f"expected a new or empty folder at {path}, but {what}. Open it with MemoryIndex.open(path), "
                f"delete it, or choose another path."
            )
        manifest = Manifest(spec, vector_size, retrieval_encoder, codec)
        try:
            path.mkdir(parents=True, exist_ok=True)
            SpanTable.create(path / TABLE, vector_size)
            manifest.write(path)
        except Exception as error:
            shutil.rmtree(path / TABLE, ignore_errors=True)
            if path.is_dir():
                (path / DELIMITERS).unlink(missing_ok=True)
            if is_disk_full(error, path, 0):
                raise disk_full_error(path, f"the new index {path} was not made") from error
            raise IndexFolderError(f"expected to be able to write to {path}, got: {error}. "
                                   f"Choose a folder that you may write to.") from error
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, *, read_only: bool = False) -> Self:
        """Open an index. Takes no lock; the first write does.

        Args:
            path: a folder, or s3://BUCKET/PREFIX of an index that was pushed there: such a one can only be read.

        Raises:
            IndexFolderError: there is no index.
            IndexUnreachableError: the object store does not answer, or does not let us in.
            IndexDamagedError: the manifest, or every version of the table, is unreadable.
        """
        uri = object_uri(path)
        if uri:
            from ctxcomp_rag.index.remote_table import RemoteTable

            remote = RemoteTable.open(uri)
            vectors, _ = vectors_for(remote.folder, remote.manifest.vector_size, remote, trust_snapshot=True)
            return cls(remote.cache, uri, remote.manifest, remote, vectors, read_only=True)
        path = Path(path).absolute()
        manifest = Manifest.read(path)
        table = SpanTable.open(path / TABLE)
        # A version number that was lost with its manifest is given out again: a snapshot of it may be another one
        trusted = table.version == manifest_files(path / TABLE)[0][0] and not table.altered
        try:
            vectors, saved = vectors_for(path, manifest.vector_size, table, trust_snapshot=trusted)
        except Exception:
            table = table.without_unreadable()
            vectors, saved = vectors_for(path, manifest.vector_size, table, trust_snapshot=trusted)
        return cls(path, str(path), manifest, table, vectors, saved=saved, read_only=read_only)

    def close(self) -> None:
        """Save the search snapshot if this object wrote, and release the writer's lock."""
        with self._writing:
            if self._writer.held:
                self._save_snapshot()
                self._writer.release()
            super().close()

    @property
    def is_writer(self) -> bool:
        return self._writer.held

    # ---- writing

    def add(self, chunks: Sequence[Chunk], spans: Sequence[MemorySpan], vectors: NDArray[Any], *, spec: SpanSpec
            ) -> AddReport:
        """Store chunks with their spans and vectors: all, or none if it fails. Chunks already there are skipped.

        Args:
            spans: `spans[i].chunk_id == chunks[i].id`.
            vectors: (len(chunks), vector_size), finite, not zero; any length, scores are cosine similarities.
            spec: the specification of the compressor that made the spans.

        Raises:
            IncompatibleSpanError: the spans were made for another decoder or by another compressor.
            SpanShapeError: a span does not have the sizes of this index.
            InputError: the three lists do not fit together, or something in them cannot be stored.
            IndexLockedError: somebody else is writing.
            IndexFolderError: the index was opened read-only, or the disk is full.
        """
        self.spec.require_compressor(spec)
        rows = places_of_chunks(chunks, spans, vectors, self.spec, self.vector_size)
        with self._writing:
            self._begin_writing()
            fresh = [i for chunk_id, i in rows.items() if chunk_id not in self._table.rows]
            if fresh:
                what = f"none of the {len(fresh)} chunks of this batch was committed to {self.path}"
                codec = self._codec_for([spans[i] for i in fresh], what)
                made = [Row.make(chunks[i], spans[i], np.asarray(vectors[i], np.float32), codec) for i in fresh]
                self._append(made, what)
        return AddReport(len(fresh), len(chunks) - len(fresh))

    def _append(self, rows: Sequence[Row], what: str) -> None:
        self._write(rows, (), what, lambda: self._own.append(rows, self.vector_size))

    def add_copies(self, chunks: Sequence[Chunk], originals: Sequence[str]) -> AddReport:
        """Store chunks with the spans and vectors of others that have the same text, byte for byte, in one commit.

        Args:
            originals: `originals[i]` is the id of a stored chunk with the text of `chunks[i]`.

        Raises:
            InputError: there is no such original, or its text is another one.
            IndexDamagedError, IndexLockedError, IndexFolderError: as for `get` and `add`.
        """
        with self._writing:
            self._begin_writing()
            fresh = {c.id: (c, o) for c, o in zip(chunks, originals, strict=True) if c.id not in self._table.rows}
            if fresh:
                self._require_known([o for _, o in fresh.values()], self._table)
                stored = self._table.stored_rows([self._table.rows[o] for _, o in fresh.values()])
                rows = [stored[self._table.rows[o]].copied_to(chunk) for chunk, o in fresh.values()]
                self._append(rows, f"none of the {len(rows)} copies of this batch was committed to {self.path}")
        return AddReport(len(fresh), len(chunks) - len(fresh))

    def lock_for_writing(self) -> None:
        """Become the writer now rather than at the first write.

        Raises:
            IndexLockedError: somebody else is writing; the message says who.
            IndexFolderError: the index was opened read-only or closed.
        """
        with self._writing:
            self._begin_writing()

    def replace(self, chunks: Sequence[Chunk], spans: Sequence[MemorySpan], vectors: NDArray[Any], *, spec: SpanSpec,
                unreadable_files: Sequence[str] = ()) -> None:
        """Store chunks anew that are there already: in one commit their old rows go and the new ones come.

        Args:
            chunks, spans, vectors, spec: as for `add`.
            unreadable_files: data files all of whose chunks are among `chunks`; they go too.

        Raises:
            As `add`.
        """
        self.spec.require_compressor(spec)
        places = places_of_chunks(chunks, spans, vectors, self.spec, self.vector_size)
        with self._writing:
            self._begin_writing()
            old = [self._table.rows[chunk_id] for chunk_id in places if chunk_id in self._table.rows]
            if places:
                what = f"none of the {len(places)} chunks was replaced in {self.path}"
                codec = self._codec_for([spans[i] for i in places.values()], what)
                made = [Row.make(chunks[i], spans[i], np.asarray(vectors[i], np.float32), codec)
                        for i in places.values()]
                self._write(made, old, what,
                            lambda: self._own.replace(old, unreadable_files, made, self.vector_size))

    def _codec_for(self, spans: Sequence[MemorySpan], what: str) -> Codec:
        """The codec of this index; one that learns does so from the first spans that an index gets."""
        codec = codec_named(self.codec)
        if not codec.learns:
            return codec
        known = Manifest.read(self.path).codec_tables  # another writer may have been first
        try:
            if known:
                return codec.with_tables(read_tables(self.path, known))
        except IndexDamagedError:
            if len(self):  # the spans of an empty index can no longer miss them
                raise
        learned = codec_for(codec, spans)

        def write() -> None:
            digest = write_tables(self.path, learned.tables)
            replace(Manifest.read(self.path), codec_tables=digest).write(self.path)

        self._on_disk(write, what, sum(table.nbytes for table in learned.tables.values()))
        return learned

    def _write(self, made: Sequence[Row], old: Sequence[int], what: str, commit: Callable[[], SpanTable]) -> None:
        size = sum(len(row.span) + row.vector.nbytes + len(row.chunk.text) for row in made)
        table = self._on_disk(commit, what, size)
        with self._state:
            self._vectors.remove(np.array(old, np.int64))
            ids = np.array([table.rows[row.chunk.id] for row in made], np.int64)
            self._vectors.add(ids, np.stack([row.vector for row in made]))
            self._table = table
        self._after_commit(len(made))

    def intact_texts(self, chunk_ids: Iterable[str]) -> list[tuple[Chunk, int]]:
        """(chunk, slots of its span) of those of the given chunks whose text is as it was written, even where vector
        or span is not: what `replace` can be given spans for."""
        def read(table: TableReader) -> list[tuple[Chunk, int]]:
            return list(table.intact_texts([table.rows[c] for c in chunk_ids if c in table.rows]).values())

        return self._reading(read)

    def intact_texts_of_unreadable_files(self) -> dict[str, list[tuple[Chunk, int]]]:
        """Data file that cannot be read -> (chunk, slots) of all its chunks, where all their texts can be."""
        return self._reading(lambda table: table.texts_of_unreadable())

    @property
    def is_learning(self) -> bool:
        """Whether the codec is still to learn, from the spans of the first `add`: the more they are, the better."""
        return codec_named(self.codec).learns and not len(self)

    def missing(self, chunk_ids: Iterable[str]) -> set[str]:
        """Those of the given chunk ids that are not in the index: what a resumed job still has to do."""
        rows = self._table.rows
        return {chunk_id for chunk_id in chunk_ids if chunk_id not in rows}

    def delete(self, *, chunk_ids: Iterable[str] | None = None, document_ids: Iterable[str] | None = None) -> int:
        """Remove chunks, or all chunks of documents, in one commit; returns how many there were. Unknown ids are
        ignored. The bytes leave the disk with `compact`.

        Raises:
            IndexLockedError, IndexFolderError: as for `add`.
        """
        if chunk_ids is None and document_ids is None:
            raise InputError("expected chunk_ids or document_ids to delete, got neither")
        if isinstance(chunk_ids, str) or isinstance(document_ids, str):
            raise InputError("expected a list of ids to delete, got a single string; put it into a list")
        with self._writing:
            self._begin_writing()
            names = set(chunk_ids or ())
            for document_id in document_ids or ():
                names.update(self._table.documents.get(document_id, ()))
            row_ids = sorted(self._table.rows[name] for name in names if name in self._table.rows)
            if row_ids:
                table = self._on_disk(lambda: self._own.delete(row_ids), f"nothing was deleted from {self.path}",
                                      65536)
                with self._state:
                    self._vectors.remove(np.array(row_ids, np.int64))
                    self._table = table
                self._after_commit(len(row_ids))
        return len(row_ids)

    def compact(self, *, erase: bool = False, drop_unreadable: bool = False) -> None:
        """Merge small files, remove deleted chunks and old versions from the disk, save the search snapshot.

        Files of an older version that somebody has open stay; a later compaction removes them.

        Args:
            erase: remove them at once: when this returns, no file of the folder holds text, vectors or spans of
                deleted chunks. Readers of an older version move on to the new one when they next read.
            drop_unreadable: give up the chunks in data files that cannot be read.

        Raises:
            IndexDamagedError: a data file cannot be read.
            IndexFolderError: the disk is full, or `erase` could not remove a file.
        """
        with self._writing:
            self._begin_writing()
            table = self._table
            if table.unreadable and not drop_unreadable:
                raise IndexDamagedError(
                    f"expected readable data files in {self.path}, but these are not: "
                    f"{', '.join(table.unreadable)}. Restore them from a copy, or give up their chunks with "
                    f"compact(drop_unreadable=True) and precompress their documents again."
                )
            self._compact(erase)
            if erase:
                what = f"the search snapshot of {self.path} may still hold vectors of deleted chunks"
                self._on_disk(self._write_snapshot, what, 0)
                remove_torn_manifests(self.path)
            else:
                self._save_snapshot()

    def push(self, uri: str, *, progress: Callable[[int, int], None] | None = None) -> PushReport:
        """Publish this index at s3://BUCKET/PREFIX; what is there already is not sent again.

        Readers see the version that was there before until the new one is whole. Objects that it does not need are
        removed afterwards: whoever has the older version open moves on at the next read. One machine at a time.

        Args:
            progress: called with the bytes sent and to send.

        Raises:
            InputError: this is no such URI, or obstore is not installed.
            IndexUnreachableError: the object store does not answer, or does not let us in.
            IndexFolderError: there is another index, or a newer version of this one.
            IndexDamagedError: files of this index cannot be trusted.
            IndexLockedError: somebody is writing to this index.
        """
        with self._writing:
            self._begin_writing()
            self._save_snapshot()
            return publish(self.path, self._own, uri, progress)

    def _compact(self, erase: bool = False) -> None:
        def compact() -> SpanTable:
            table = (self._own.drop_unreadable() if self._own.unreadable else self._own).compact()
            table.remove_old_versions(() if erase else pinned_versions(self.path))
            return table

        what = f"{self.path} was not compacted, its chunks are all there"
        self._publish(self._on_disk(compact, what, folder_bytes(self.path / TABLE)))
        self._commits = 0

    @property
    def _own(self) -> SpanTable:
        """The table, for writing: after `_begin_writing`, which refuses where it is not in a folder."""
        assert isinstance(self._table, SpanTable)
        return self._table

    def _begin_writing(self) -> None:
        if object_uri(self.location):
            raise IndexFolderError(f"{self.location} can only be read. Change the index in the folder that it was "
                                   f"pushed from, then push it again: ctxcomp push DIR {self.location}")
        if self._closed:
            raise IndexFolderError(f"{self.path} was closed; open it again with MemoryIndex.open(path).")
        if self.read_only:
            raise IndexFolderError(f"{self.path} was opened for reading; open it with read_only=False to write.")
        if self._writer.acquire():
            try:
                if set_aside_torn_manifests(self.path / TABLE):
                    (self.path / CURRENT).unlink(missing_ok=True)  # it may be of a version that never was
            except BaseException:
                self._writer.release()
                raise
            self._pin.release()  # nobody else removes files now
        self.refresh()  # after others' commits, and after an own one that was interrupted before it was noted

    def _on_disk(self, write: Callable[[], T], what: str, needed: int) -> T:
        try:
            return write()
        except CtxcompError:
            raise
        except Exception as error:
            # the commit itself may have succeeded and its fsync failed: ask the disk, not ourselves
            self.refresh()
            if is_disk_full(error, self.path, needed):
                raise disk_full_error(self.path, what) from error
            raise IndexFolderError(f"{what}: {error}. Check the disk and the folder's permissions, then run the same "
                                   f"command again.") from error

    def _after_commit(self, changed: int) -> None:
        self._unsaved_rows += changed
        self._commits += 1
        if self._commits >= _COMMITS_BETWEEN_COMPACTIONS and not self._table.unreadable:
            self._compact()
        if self._unsaved_rows >= max(_SNAPSHOT_ROWS, len(self) // 4):
            self._save_snapshot()

    def _save_snapshot(self) -> None:
        try:
            self._write_snapshot()
        except OSError as error:  # it only saves time at the next open
            warnings.warn(f"the search snapshot of {self.path} was not saved ({error}); opening will take longer.",
                          stacklevel=3)

    def _write_snapshot(self) -> None:
        if self._saved_version != self._table.version:
            self._vectors.save(self.path, self._table.version)
            self._saved_version, self._unsaved_rows = self._table.version, 0
