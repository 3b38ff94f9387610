"""The Lance table that holds one row per chunk: text, vector, span, checksum.

A `SpanTable` is one version of the table and never changes; `append`, `delete` and `compact` return the next one.
The Lance version is the only commit point of an index. Rows are named by Lance's stable row ids, which grow,
survive compaction and are never given out twice.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import IndexDamagedError
from ctxcomp_rag.index.checksums import altered_files, record_checksums
from ctxcomp_rag.index.folder import folder_bytes, fsync_all, fsync_path
from ctxcomp_rag.index.rows import (
    CHUNK_COLUMNS,
    Row,
    arrow_schema,
    checked_bytes,
    checked_row,
    intact_text,
    row_to_chunk,
    rows_to_arrow,
)
from ctxcomp_rag.index.span_files import SpanFiles
from ctxcomp_rag.index.tables import read_tables
from ctxcomp_rag.spans import MemorySpan

if TYPE_CHECKING:
    import pyarrow as pa

FILE_VERSION: Final = "2.2"
ROWS_PER_READ = 64
_FILE_BYTES = 2**30  # compaction makes files of about this size
_DELETIONS = "_deletions/"
_TEXT_COLUMNS = [*CHUNK_COLUMNS, "num_slots", "num_source_tokens", "text_crc"]


@dataclass(frozen=True, eq=False)
class Names:
    """Which chunk is in which row: what is asked for every chunk of a corpus, and so must not need the disk."""

    EMPTY: ClassVar[Names]
    rows: dict[str, int]
    documents: dict[str, list[str]]

    def plus(self, added: Iterable[tuple[str, str, int]]) -> Names:
        """With these (chunk id, document id, row id)."""
        rows, new = dict(self.rows), defaultdict[str, list[str]](list)
        for chunk_id, document_id, row_id in added:
            rows[chunk_id] = row_id
            new[document_id].append(chunk_id)
        # lists are replaced, not extended: older versions of the table share them
        return Names(rows, self.documents | {d: self.documents.get(d, []) + chunks for d, chunks in new.items()})

    def minus(self, row_ids: set[int]) -> Names:
        rows = {chunk_id: row_id for chunk_id, row_id in self.rows.items() if row_id not in row_ids}
        documents = {}
        for document_id, chunk_ids in self.documents.items():
            left = chunk_ids if all(c in rows for c in chunk_ids) else [c for c in chunk_ids if c in rows]
            if left:
                documents[document_id] = left
        return Names(rows, documents)


Names.EMPTY = Names({}, {})


@dataclass(frozen=True, eq=False)
class FilterColumns:
    """What a filter looks at, with each distinct value once.

    Attributes:
        row_ids: (n,).
        by_document: document id -> places in `row_ids`.
        distinct: the different metadata.
        metadata: (n,) places in `distinct`.
    """

    row_ids: NDArray[np.int64]
    by_document: dict[str, NDArray[np.int64]]
    distinct: list[dict[str, Any]]
    metadata: NDArray[np.int64]


class SpanTable:
    """One version of the table. Every method may be called from several threads.

    Attributes:
        version: the Lance version.
        rows: chunk id -> row id, for every readable row, oldest first.
        documents: document id -> its chunk ids, oldest first.
        unreadable: data files that cannot be read, with the reason; their rows are not in `rows`.
        altered: the manifest of this version is not what was written, although Lance can read it.
    """

    def __init__(self, dataset: Any, names: Names | None = None, unreadable: Mapping[str, str] | None = None) -> None:
        self._dataset = dataset
        self._spans = SpanFiles(dataset)
        self.altered = False
        self._good: list[Any] | None = None
        self.version = int(dataset.version)
        self.unreadable: dict[str, str] = dict(unreadable or {})
        if self.unreadable:
            self._good = [f for f in dataset.get_fragments() if not set(_data_files(f)) & set(self.unreadable)]
        self._names = names or self._read_names()

    @property
    def rows(self) -> dict[str, int]:
        return self._names.rows

    @property
    def documents(self) -> dict[str, list[str]]:
        return self._names.documents

    @property
    def path(self) -> Path:
        return Path(self._dataset.uri)

    @classmethod
    def create(cls, path: Path, vector_size: int) -> SpanTable:
        import lance
        import pyarrow as pa

        schema = arrow_schema(vector_size)
        dataset = lance.write_dataset(
            pa.Table.from_batches([], schema=schema), str(path), schema=schema, mode="create",
            data_storage_version=FILE_VERSION, enable_stable_row_ids=True,
        )
        fsync_all(p for p in path.rglob("*"))
        fsync_path(path)
        return cls(dataset)

    @classmethod
    def open(cls, path: Path) -> SpanTable:
        """The latest version that can be read; warns where that is not the last one written.

        Raises:
            IndexDamagedError: no version can be read.
        """

        manifests = manifest_files(path)
        first_error: Exception | None = None
        for attempt, (version, _) in enumerate(manifests):
            try:
                table = cls._checked(_open_dataset(path, None if attempt == 0 else version))
            except Exception as error:
                first_error = first_error or error
                continue
            if attempt:
                warnings.warn(
                    f"{manifests[0][1]} cannot be read ({first_error}); opened version {version} before it. The last "
                    f"change is missing: run the same precompression command, or delete the same chunks, again.",
                    stacklevel=4,
                )
            return table
        raise IndexDamagedError(
            f"expected a readable Lance table at {path}, got: {first_error or 'no manifest in _versions'}. "
            f"Restore the folder from a copy, or precompress into a new one."
        )

    @classmethod
    def _checked(cls, dataset: Any) -> SpanTable:
        """A version as its checksums let it be: rows whose deletions are in doubt are left out."""
        path = Path(dataset.uri)
        altered = altered_files(path)
        doubtful = {name: f"{name} is not what was written" for name in altered}
        unreadable = {file: reason for fragment in dataset.get_fragments() for file in _data_files(fragment)
                      for reason in [doubtful.get(_deletion_file(fragment))] if reason is not None}
        table = cls(dataset, None, unreadable)
        table.altered = any(version == table.version and f"_versions/{file.name}" in altered
                            for version, file in manifest_files(path))
        for what in [*unreadable.values(), *(["its manifest is not what was written"] if table.altered else [])]:
            warnings.warn(f"{path}: {what}: chunks may be missing. Run verify(), then compress the missing documents "
                          "again.", stacklevel=5)
        return table

    def latest_version(self) -> int:
        return int(self._dataset.latest_version)

    def newer_unreadable(self) -> Path | None:
        """The manifest of a version after this one that cannot be read, if there is one."""

        version, file = manifest_files(self.path)[0]
        return file if version > self.version and not _is_usable(self.path, file) else None

    # -- reading

    def _scan(self, columns: list[str], **options: Any) -> pa.Table:
        with _panics_are_errors():
            return self._dataset.scanner(columns=columns, fragments=self._good, **options).to_table()

    def _read_names(self) -> Names:
        try:
            return self._names_in(self._good)
        except Exception as error:
            self._find_unreadable()
            if not self.unreadable:
                raise IndexDamagedError(f"expected a readable Lance table at {self.path}, got: {_reason(error)}. "
                                        f"Restore the folder from a copy, or precompress into a new one.") from error
            return self._names_in(self._good)

    def without_unreadable(self) -> SpanTable:
        """The same version after trying every data file; its `unreadable` names those that failed."""
        tried = SpanTable(self._dataset, Names.EMPTY)
        tried._find_unreadable()
        table = SpanTable(self._dataset, None, tried.unreadable | self.unreadable)
        table.altered = self.altered
        return table

    def _names_in(self, fragments: list[Any] | None) -> Names:
        names = ["chunk_id", "document_id"]
        with _panics_are_errors():
            table = self._dataset.scanner(columns=names, fragments=fragments, with_row_id=True).to_table()
        columns = (table[name].to_pylist() for name in ("_rowid", "chunk_id", "document_id"))
        # compaction may have changed the order of the files
        return Names.EMPTY.plus((chunk, document, row) for row, chunk, document in sorted(zip(*columns, strict=True)))

    def _find_unreadable(self) -> None:
        columns = [*CHUNK_COLUMNS, "num_slots", "num_source_tokens", "vector", "crc", "span"]
        fragments = self._dataset.get_fragments() if self._good is None else self._good
        self._good = []
        for fragment in fragments:
            try:
                with _panics_are_errors():
                    self._dataset.scanner(columns=columns, fragments=[fragment], with_row_id=True).to_table()
                self._good.append(fragment)
            except Exception as error:
                self.unreadable |= dict.fromkeys(_data_files(fragment), _reason(error))
        if self.unreadable:
            warnings.warn(
                f"these data files of {self.path} cannot be read, their chunks are left out: "
                f"{', '.join(self.unreadable)}. Run verify(), then compress the missing documents again.",
                stacklevel=6,
            )

    def read_chunks(self, row_ids: Sequence[int]) -> dict[int, Chunk]:
        """Row id -> chunk, without the spans and unchecked."""
        found: dict[int, Chunk] = {}
        for batch in _batches(row_ids, 4096):
            table = self._scan(CHUNK_COLUMNS, filter=_row_filter(batch), with_row_id=True)
            found |= {row["_rowid"]: row_to_chunk(row) for row in table.to_pylist()}
        return found

    def texts(self, row_ids: Sequence[int]) -> Iterator[tuple[int, str, str]]:
        """(row id, chunk id, text) of those of the given rows that exist, in no particular order and unchecked."""
        options = {"filter": _row_filter(row_ids)} if len(row_ids) <= 4096 else {}
        wanted = set(row_ids)
        if not wanted:
            return
        with _panics_are_errors():
            scanner = self._dataset.scanner(columns=["chunk_id", "text"], fragments=self._good, with_row_id=True,
                                            **options)
            for batch in scanner.to_batches():
                columns = (batch[name].to_pylist() for name in ("_rowid", "chunk_id", "text"))
                yield from (entry for entry in zip(*columns, strict=True) if entry[0] in wanted)

    def read_rows(self, row_ids: Sequence[int]) -> dict[int, tuple[Chunk, MemorySpan, NDArray[np.float32]]]:
        """Row id -> (chunk, span, vector (vector_size,)), checked against the checksum.

        Raises:
            IndexDamagedError: names the chunk whose bytes are not those that were written.
        """
        tables_of = partial(read_tables, self.path.parent)
        return {row["_rowid"]: (*checked_row(row, vector, tables_of), vector)
                for row, vector in self._whole_rows(row_ids)}

    def stored_rows(self, row_ids: Sequence[int]) -> dict[int, Row]:
        """Row id -> the row as it is stored; raises IndexDamagedError as `read_rows` does."""
        return {row["_rowid"]: checked_bytes(row, vector) for row, vector in self._whole_rows(row_ids)}

    def _whole_rows(self, row_ids: Sequence[int]) -> Iterator[tuple[dict[str, Any], NDArray[np.float32]]]:
        columns = [*CHUNK_COLUMNS, "num_slots", "num_source_tokens", "vector", "crc"]
        for batch in _batches(row_ids, ROWS_PER_READ):
            table, spans = self._with_spans(columns, batch)
            vectors = table["vector"].combine_chunks()
            flat = np.asarray(vectors.flatten() if len(table) else [], dtype=np.float32).reshape(len(table), -1)
            rows = table.drop_columns(["vector"]).to_pylist()
            yield from (({**row, "span": span}, vector) for row, span, vector in zip(rows, spans, flat, strict=True))

    def _with_spans(self, columns: Sequence[str], row_ids: Sequence[int]) -> tuple[pa.Table, list[Any]]:
        """The columns and the row ids of those of the given rows that exist, and the bytes of their spans."""
        with _panics_are_errors():
            # a scan with a filter takes three times as long
            table = self._dataset._take_rows(list(row_ids), [*columns, "_rowid", "_rowaddr", "span"])
            spans = self._spans.read(table["_rowaddr"].to_pylist(), table["span"].to_pylist())
        return table.drop_columns(["_rowaddr", "span"]), spans

    def read_settings(self, row_ids: Sequence[int]) -> dict[str, tuple[dict[str, Any], int]]:
        """Chunk id -> (metadata, number of slots), without texts, vectors and spans."""
        found: dict[str, tuple[dict[str, Any], int]] = {}
        for batch in _batches(row_ids, 4096):
            table = self._scan(["chunk_id", "metadata", "num_slots"], filter=_row_filter(batch))
            found |= {r["chunk_id"]: (json.loads(r["metadata"]), r["num_slots"]) for r in table.to_pylist()}
        return found

    def vector_batches(self, row_ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """(row ids (n,), vectors (n, vector_size)) of those of the given rows that exist, in no particular order."""
        if not len(row_ids):
            return
        wanted_ids = np.sort(row_ids)
        options = {"filter": _row_filter(row_ids.tolist())} if len(row_ids) <= 4096 else {}
        scanner = self._dataset.scanner(columns=["vector"], fragments=self._good, with_row_id=True, **options)
        for batch in scanner.to_batches():
            batch_ids = batch["_rowid"].to_numpy().astype(np.int64)
            places = np.minimum(np.searchsorted(wanted_ids, batch_ids), len(wanted_ids) - 1)
            wanted = wanted_ids[places] == batch_ids
            if wanted.any():
                flat = batch["vector"].flatten().to_numpy(zero_copy_only=False)
                yield batch_ids[wanted], flat.reshape(len(batch_ids), -1)[wanted]

    def vectors(self, row_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All of `vector_batches` at once."""
        batches = list(self.vector_batches(row_ids))
        if not batches:
            return np.empty(0, np.int64), np.empty((0, 1), np.float32)
        return np.concatenate([ids for ids, _ in batches]), np.concatenate([rows for _, rows in batches])

    def in_text_order(self, chunk_ids: Sequence[str]) -> list[str]:
        """The same chunk ids, sorted by where the chunks begin and end."""
        places: list[tuple[int, int, str]] = []
        for batch in _batches([self.rows[c] for c in chunk_ids], 4096):
            table = self._scan(["start", "end", "chunk_id"], filter=_row_filter(batch))
            places += zip(*(column.to_pylist() for column in table.columns), strict=True)
        return [chunk_id for _, _, chunk_id in sorted(places)]

    @cached_property
    def filter_columns(self) -> FilterColumns:
        """Read on first use and kept as long as this version of the table."""
        table = self._scan(["document_id", "metadata"], with_row_id=True)
        metadata = table["metadata"].combine_chunks().dictionary_encode()
        documents = table["document_id"].combine_chunks().dictionary_encode()
        codes = documents.indices.to_numpy(zero_copy_only=False)
        order = np.argsort(codes, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(codes, minlength=len(documents.dictionary)))[:-1])
        return FilterColumns(
            table["_rowid"].to_numpy().astype(np.int64),
            dict(zip(documents.dictionary.to_pylist(), parts, strict=False)),
            [json.loads(text) for text in metadata.dictionary.to_pylist()],
            metadata.indices.to_numpy(zero_copy_only=False),
        )

    def totals(self) -> dict[str, int]:
        """Sums over all rows, from the small columns only."""
        import pyarrow.compute as pc

        table = self._scan(["text", "num_slots", "num_source_tokens", "span"])
        spans = table["span"].combine_chunks()
        return {
            "span_bytes": pc.sum(spans.field("size")).as_py() or 0,
            "text_bytes": pc.sum(pc.binary_length(table["text"])).as_py() or 0,
            "source_tokens": pc.sum(table["num_source_tokens"]).as_py() or 0,
            "slots": pc.sum(table["num_slots"]).as_py() or 0,
        }

    def intact_texts(self, row_ids: Sequence[int]) -> dict[int, tuple[Chunk, int]]:
        """Row id -> (chunk, slots) of those rows whose text is as it was written, whatever became of their spans."""
        found = {}
        for row_id in row_ids:  # one by one: a page that cannot be read costs no other row
            try:
                (row,) = self._scan(_TEXT_COLUMNS, filter=_row_filter([row_id])).to_pylist()
            except Exception:
                continue
            intact = intact_text(row)
            if intact is not None:
                found[row_id] = intact
        return found

    def texts_of_unreadable(self) -> dict[str, list[tuple[Chunk, int]]]:
        """Unreadable data file -> (chunk, slots) of its rows, where all their texts are as they were written."""
        found = {}
        for fragment in self._unreadable_fragments():
            if self.unreadable[_data_files(fragment)[0]].startswith(_DELETIONS):
                continue  # which of its rows are deleted is not known
            try:
                with _panics_are_errors():
                    rows = self._dataset.scanner(columns=_TEXT_COLUMNS, fragments=[fragment]).to_table().to_pylist()
            except Exception:
                continue
            intact = [kept for row in rows if (kept := intact_text(row)) is not None]
            if len(intact) == len(rows) == fragment.count_rows():
                found[_data_files(fragment)[0]] = intact
        return found

    def _unreadable_fragments(self) -> list[Any]:
        return [f for f in self._dataset.get_fragments() if set(_data_files(f)) & set(self.unreadable)]

    # -- writing: the caller holds the writer's lock

    def append(self, rows: Sequence[Row], vector_size: int) -> SpanTable:
        """One commit with all rows, on the disk when this returns. On failure nothing of it is visible."""
        import lance

        return self._commit(rows, vector_size, lance.LanceOperation.Append, set(), self.unreadable)

    def replace(self, row_ids: Sequence[int], files: Sequence[str], rows: Sequence[Row], vector_size: int) -> SpanTable:
        """One commit in which rows take the place of others, given by row id or as whole unreadable data files."""
        import lance

        old = set(row_ids)
        gone = [f.fragment_id for f in self._unreadable_fragments() if set(_data_files(f)) & set(files)]
        left = {file: reason for file, reason in self.unreadable.items() if file not in files}

        def update(fragments: list[Any]) -> Any:
            updated = []
            for fragment in self._dataset.get_fragments() if old else []:
                if fragment.fragment_id in gone or not fragment.count_rows(_row_filter(old)):
                    continue
                rest = fragment.delete(_row_filter(old))
                updated += [rest] if rest is not None else []
                gone.extend([] if rest is not None else [fragment.fragment_id])
            return lance.LanceOperation.Update(removed_fragment_ids=gone, updated_fragments=updated,
                                               new_fragments=fragments)

        return self._commit(rows, vector_size, update, old, left)

    def _commit(self, rows: Sequence[Row], vector_size: int, operation: Callable[[list[Any]], Any], gone: set[int],
                unreadable: Mapping[str, str]) -> SpanTable:
        import lance
        from lance.fragment import write_fragments

        folders = ("data", "_deletions", "_versions", "_transactions")
        before = {name: set(_listing(self.path / name)) for name in folders}
        # an index of an earlier version has no column for the text's checksum
        table = rows_to_arrow(rows, vector_size).select(self._dataset.schema.names)
        try:
            fragments = write_fragments(table, self._dataset, mode="append", data_storage_version=FILE_VERSION,
                                        enable_stable_row_ids=True)
            change = operation(fragments)
            # Lance does not fsync: the data has to be on the disk before the manifest that names it
            _fsync_new(self.path, before)
            _require_whole(self.path / "data", before["data"], fragments, sum(len(row.span) for row in rows))
            dataset = lance.LanceDataset.commit(self._dataset, change, read_version=self.version)
        except BaseException:
            # not where the commit itself may have happened: then the new files are the table
            if set(_listing(self.path / "_versions")) == before["_versions"]:
                _remove_new(self.path / "data", before["data"])
                _remove_new(self.path / "_deletions", before["_deletions"])
            raise
        _fsync_new(self.path, before)
        _record(self.path, before)
        known = {f.fragment_id for f in self._dataset.get_fragments()}
        new = [f for f in dataset.get_fragments() if f.fragment_id not in known]
        names = SpanTable(dataset, Names.EMPTY)._names_in(new)
        kept = self._names.minus(gone) if gone else self._names
        return SpanTable(dataset, kept.plus((r.chunk.id, r.chunk.document_id, names.rows[r.chunk.id]) for r in rows),
                         unreadable)

    def delete(self, row_ids: Sequence[int]) -> SpanTable:
        """One commit without these rows. The bytes stay on the disk until `compact`."""
        import lance

        before = {name: set(_listing(self.path / name)) for name in ("_deletions", "_versions", "_transactions")}
        dataset = lance.dataset(str(self.path), version=self.version)
        dataset.delete(_row_filter(row_ids))
        _fsync_new(self.path, before)
        _record(self.path, before)
        return SpanTable(dataset, self._names.minus(set(row_ids)), self.unreadable)

    def drop_unreadable(self) -> SpanTable:
        """One commit without the data files that cannot be read."""
        import lance

        before = {name: set(_listing(self.path / name)) for name in ("_deletions", "_versions", "_transactions")}
        bad = [f.fragment_id for f in self._unreadable_fragments()]
        operation = lance.LanceOperation.Delete([], bad, "unreadable data files")
        dataset = lance.LanceDataset.commit(self._dataset, operation, read_version=self.version)
        _fsync_new(self.path, before)
        _record(self.path, before)
        return SpanTable(dataset)

    def compact(self) -> SpanTable:
        """Few large files without deleted rows; those of old versions stay until `remove_old_versions`."""
        import lance
        from lance.optimize import Compaction

        names = ("data", "_deletions", "_versions", "_transactions")
        before = {name: set(_listing(self.path / name)) for name in names}
        dataset = lance.dataset(str(self.path))
        # files that have grown large enough are not written again, so that regular compaction stays affordable
        row_bytes = max(1, folder_bytes(self.path / "data") // max(1, len(self.rows)))
        rows_per_file = min(max(_FILE_BYTES // row_bytes, 256), 2**20)
        plan = Compaction.plan(dataset, {"target_rows_per_fragment": rows_per_file,
                                         "materialize_deletions_threshold": 0.0})
        try:
            done = [task.execute(dataset) for task in plan.tasks]
            _fsync_new(self.path, before)
        except BaseException:
            _remove_new(self.path / "data", before["data"])
            raise
        if done:
            Compaction.commit(dataset, done)
            _fsync_new(self.path, before)
            _record(self.path, before)
        return SpanTable(lance.dataset(str(self.path)))

    def remove_old_versions(self, keep: Iterable[int] = ()) -> None:
        """Leave only the files of this version, which has to be the latest, and of those to keep.

        Raises:
            OSError: a file with rows of an older version is still there.
        """
        # nobody else writes, so files that belong to no version are the remains of killed writers
        options = {"delete_unverified": True, "error_if_tagged_old_versions": False}
        kept = {self.version, *keep}
        if len(kept) > 1:
            old = [version for version, _ in manifest_files(self.path) if version not in kept]
            if old:
                self._dataset.cleanup_old_versions(versions=old, **options)
            return
        self._dataset.cleanup_old_versions(older_than=timedelta(0), **options)
        mine = {Path(name).stem for fragment in self._dataset.get_fragments() for name in _data_files(fragment)}
        _remove_new(self.path / "data", {p for p in _listing(self.path / "data") if p.stem in mine})
        strays = [p.name for p in _listing(self.path / "data") if p.stem not in mine]
        if strays:
            raise OSError(errno.EBUSY, f"files of older versions could not be removed: {', '.join(strays)}")

    def count_rows(self) -> int:
        """Rows on the disk, counted by Lance; as many as `rows`, unless files are unreadable."""
        return int(self._dataset.count_rows())


def _open_dataset(path: Path, version: int | None = None) -> Any:
    import lance

    with _panics_are_errors():
        dataset = lance.dataset(str(path), version=version)
        dataset.get_fragments()
        _ = dataset.schema
        return dataset


def _is_usable(path: Path, latest: Path) -> bool:
    """Whether the latest manifest can be opened and, where it is not what was written, its table read all the same."""
    try:
        dataset = _open_dataset(path)
        if f"_versions/{latest.name}" in altered_files(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                SpanTable._checked(dataset)
    except Exception:
        return False
    return True


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """On damaged bytes Lance may panic, which arrives as a BaseException that no caller expects."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise OSError(errno.EIO, f"Lance gave up: {error}") from error
        raise


def _reason(error: BaseException) -> str:
    return str(error).split(", /")[0].strip()


def _deletion_file(fragment: Any) -> str:
    deletions = fragment.metadata.deletion_file
    return deletions.path(fragment.fragment_id) if deletions is not None else ""


def _data_files(fragment: Any) -> list[str]:
    return [f"data/{file.path}" for file in fragment.metadata.files]


def _row_filter(row_ids: Iterable[int]) -> str:
    return f"_rowid IN ({','.join(map(str, row_ids))})"


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def manifest_files(path: Path) -> list[tuple[int, Path]]:
    """(version, manifest), newest first. Lance names them by 2^64 - 1 - version, so that the newest sorts first."""
    found = []
    for file in _listing(path / "_versions"):
        if file.suffix == ".manifest" and file.stem.isdigit():
            number = int(file.stem)
            found.append((2**64 - 1 - number if len(file.stem) == 20 else number, file))
    return sorted(found, reverse=True)


def set_aside_torn_manifests(path: Path) -> list[Path]:
    """Move manifests that cannot be read out of the way of the next commit; returns where they are now.

    Only for the holder of the writer's lock.
    """

    moved: list[Path] = []
    for version, file in manifest_files(path):
        if _is_usable(path, file):
            break
        moved.append(file.rename(path.parent / f"torn-{version}.manifest"))
    if moved:
        fsync_path(path / "_versions")
    return moved


def remove_torn_manifests(folder: Path) -> None:
    """Remove what `set_aside_torn_manifests` moved to the index folder."""
    for file in folder.glob("torn-*.manifest"):
        file.unlink(missing_ok=True)


def _listing(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in os.scandir(folder)] if folder.is_dir() else []


def _fsync_new(table: Path, before: Mapping[str, set[Path]]) -> None:
    for name, known in before.items():
        folder = table / name
        if not folder.is_dir():
            continue
        for new in set(_listing(folder)) - known:
            inside = _listing(new) if new.is_dir() else []  # spans above 64 KB lie in a folder beside their data file
            fsync_all([*inside, new])
        fsync_path(folder)
    fsync_path(table)


def _record(table: Path, before: Mapping[str, set[Path]]) -> None:
    record_checksums(table, set().union(*before.values()))


def _require_whole(folder: Path, before: set[Path], fragments: Sequence[Any], span_bytes: int) -> None:
    """Raises OSError where files are shorter than what was written: on a full disk Lance does not always say so."""
    for fragment in fragments:
        for file in fragment.files:
            stated, found = file.file_size_bytes, (folder / file.path).stat().st_size
            if stated is not None and stated != found:
                raise OSError(errno.EIO, f"{file.path} has {found} bytes instead of {stated}")
    new = set(_listing(folder)) - before
    total = sum(folder_bytes(path) if path.is_dir() else path.stat().st_size for path in new)
    if total < span_bytes:
        raise OSError(errno.EIO, f"{total} bytes were written instead of at least {span_bytes}")


def _remove_new(folder: Path, known: set[Path]) -> None:
    for new in set(_listing(folder)) - known:
        for file in [*(_listing(new) if new.is_dir() else []), new]:
            try:
                file.rmdir() if file.is_dir() else file.unlink()
            except OSError:
                continue  # compact() removes it
