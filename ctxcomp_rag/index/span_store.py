"""The Lance table that holds one row per chunk: text, vector, span, checksum.

A `SpanTable` is one version of the table and never changes; `append`, `delete` and `compact` return the next one.
The Lance version is the only commit point of an index. Rows are named by Lance's stable row ids, which grow,
survive compaction and are never given out twice.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import IndexDamagedError
from ctxcomp_rag.index.checksums import altered_files
from ctxcomp_rag.index.folder import folder_bytes, fsync_all, fsync_path
from ctxcomp_rag.index.lance_reader import LanceReader, data_files, deletion_file, panics_are_errors, row_filter
from ctxcomp_rag.index.rows import Row, arrow_schema, intact_text, rows_to_arrow
from ctxcomp_rag.index.stored_rows import StoredRows
from ctxcomp_rag.index.table_files import DATA, DELETIONS, VERSIONS, TableChange, listing, manifest_files, remove_but
from ctxcomp_rag.index.table_reader import TEXT_COLUMNS, WITHOUT_SPAN, Names

FILE_VERSION: Final = "2.2"
_FILE_BYTES = 2**30  # compaction makes files of about this size


class SpanTable(LanceReader):
    """One version of the table. Every method may be called from several threads.

    Attributes: see `TableReader`.
    """

    def __init__(self, dataset: Any, names: Names | None = None, unreadable: Mapping[str, str] | None = None) -> None:
        super().__init__(dataset, Path(dataset.uri).parent)
        self._stored = StoredRows(dataset)
        self.unreadable |= unreadable or {}
        if self.unreadable:
            self._good = [f for f in dataset.get_fragments() if not set(data_files(f)) & set(self.unreadable)]
        self._names = names or self._read_names()

    @property
    def path(self) -> Path:
        return Path(self._dataset.uri)

    @classmethod
    def create(cls, path: Path, vector_size: int) -> Self:
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
    def open(cls, path: Path) -> Self:
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
    def _checked(cls, dataset: Any) -> Self:
        """A version as its checksums let it be: rows whose deletions are in doubt are left out."""
        path = Path(dataset.uri)
        altered = altered_files(path)
        doubtful = {name: f"{name} is not what was written" for name in altered}
        unreadable = {file: reason for fragment in dataset.get_fragments() for file in data_files(fragment)
                      for reason in [doubtful.get(deletion_file(fragment))] if reason is not None}
        table = cls(dataset, None, unreadable)
        table.altered = any(version == table.version and f"{VERSIONS}/{file.name}" in altered
                            for version, file in manifest_files(path))
        for what in [*unreadable.values(), *(["its manifest is not what was written"] if table.altered else [])]:
            warnings.warn(f"{path}: {what}: chunks may be missing. Run verify(), then compress the missing documents "
                          "again.", stacklevel=5)
        return table

    def latest(self) -> Self | None:
        return None if int(self._dataset.latest_version) == self.version else type(self).open(self.path)

    def newer_unreadable(self) -> Path | None:
        version, file = manifest_files(self.path)[0]
        return file if version > self.version and not _is_usable(self.path, file) else None

    # -- reading

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

    def _find_unreadable(self) -> None:
        fragments = self._dataset.get_fragments() if self._good is None else self._good
        self._good = []
        for fragment in fragments:
            try:
                with panics_are_errors():
                    self._dataset.scanner(columns=[*WITHOUT_SPAN, "span"], fragments=[fragment],
                                          with_row_id=True).to_table()
                self._good.append(fragment)
            except Exception as error:
                self.unreadable |= dict.fromkeys(data_files(fragment), _reason(error))
        if self.unreadable:
            warnings.warn(
                f"these data files of {self.path} cannot be read, their chunks are left out: "
                f"{', '.join(self.unreadable)}. Run verify(), then compress the missing documents again.",
                stacklevel=6,
            )

    def _whole_rows(self, row_ids: Sequence[int]) -> Iterator[tuple[dict[str, Any], NDArray[np.float32]]]:
        return self._stored.read(row_ids)

    def _forget(self, row_ids: Sequence[int]) -> None:
        self._stored.forget(row_ids)

    def uncached(self) -> SpanTable:
        again = copy(self)
        again._stored = StoredRows(self._dataset)
        return again

    def texts_of_unreadable(self) -> dict[str, list[tuple[Chunk, int]]]:
        found = {}
        for fragment in self._unreadable_fragments():
            if self.unreadable[data_files(fragment)[0]].startswith(DELETIONS):
                continue  # which of its rows are deleted is not known
            try:
                with panics_are_errors():
                    rows = self._dataset.scanner(columns=TEXT_COLUMNS, fragments=[fragment]).to_table().to_pylist()
            except Exception:
                continue
            intact = [kept for row in rows if (kept := intact_text(row)) is not None]
            if len(intact) == len(rows) == fragment.count_rows():
                found[data_files(fragment)[0]] = intact
        return found

    def files(self) -> list[str]:
        """What this version is read from, below the table, its manifest last."""
        names: list[str] = []
        for fragment in self._dataset.get_fragments():
            for name in data_files(fragment):
                beside = (self.path / name).with_suffix("")  # spans above 64 KB
                names += [name, *(p.relative_to(self.path).as_posix() for p in listing(beside))]
            names += filter(None, [deletion_file(fragment)])
        (manifest,) = (file for version, file in manifest_files(self.path) if version == self.version)
        return [*names, f"{VERSIONS}/{manifest.name}"]

    def _unreadable_fragments(self) -> list[Any]:
        return [f for f in self._dataset.get_fragments() if set(data_files(f)) & set(self.unreadable)]

    # -- writing: the caller holds the writer's lock

    def append(self, rows: Sequence[Row], vector_size: int) -> SpanTable:
        """One commit with all rows, on the disk when this returns. On failure nothing of it is visible."""
        import lance

        return self._commit(rows, vector_size, lance.LanceOperation.Append, set(), self.unreadable)

    def replace(self, row_ids: Sequence[int], files: Sequence[str], rows: Sequence[Row], vector_size: int) -> SpanTable:
        """One commit in which rows take the place of others, given by row id or as whole unreadable data files."""
        import lance

        old = set(row_ids)
        gone = [f.fragment_id for f in self._unreadable_fragments() if set(data_files(f)) & set(files)]
        left = {file: reason for file, reason in self.unreadable.items() if file not in files}

        def update(fragments: list[Any]) -> Any:
            updated = []
            for fragment in self._dataset.get_fragments() if old else []:
                if fragment.fragment_id in gone or not fragment.count_rows(row_filter(old)):
                    continue
                rest = fragment.delete(row_filter(old))
                updated += [rest] if rest is not None else []
                gone.extend([] if rest is not None else [fragment.fragment_id])
            return lance.LanceOperation.Update(removed_fragment_ids=gone, updated_fragments=updated,
                                               new_fragments=fragments)

        return self._commit(rows, vector_size, update, old, left)

    def _commit(self, rows: Sequence[Row], vector_size: int, operation: Callable[[list[Any]], Any], gone: set[int],
                unreadable: Mapping[str, str]) -> SpanTable:
        import lance
        from lance.fragment import write_fragments

        change = TableChange(self.path)
        # an index of an earlier version has no column for the text's checksum
        table = rows_to_arrow(rows, vector_size).select(self._dataset.schema.names)
        try:
            fragments = write_fragments(table, self._dataset, mode="append", data_storage_version=FILE_VERSION,
                                        enable_stable_row_ids=True)
            to_commit = operation(fragments)
            change.fsync()
            change.require_whole(fragments, sum(len(row.span) for row in rows))
            dataset = lance.LanceDataset.commit(self._dataset, to_commit, read_version=self.version)
        except BaseException:
            change.withdraw()
            raise
        change.committed()
        known = {f.fragment_id for f in self._dataset.get_fragments()}
        new = [f for f in dataset.get_fragments() if f.fragment_id not in known]
        names = SpanTable(dataset, Names.EMPTY)._names_in(new)
        kept = self._names.minus(gone) if gone else self._names
        return SpanTable(dataset, kept.plus((r.chunk.id, r.chunk.document_id, names.rows[r.chunk.id]) for r in rows),
                         unreadable)

    def delete(self, row_ids: Sequence[int]) -> SpanTable:
        """One commit without these rows. The bytes stay on the disk until `compact`."""
        import lance

        change = TableChange(self.path)
        dataset = lance.dataset(str(self.path), version=self.version)
        dataset.delete(row_filter(row_ids))
        change.committed()
        return SpanTable(dataset, self._names.minus(set(row_ids)), self.unreadable)

    def drop_unreadable(self) -> SpanTable:
        """One commit without the data files that cannot be read."""
        import lance

        change = TableChange(self.path)
        bad = [f.fragment_id for f in self._unreadable_fragments()]
        operation = lance.LanceOperation.Delete([], bad, "unreadable data files")
        dataset = lance.LanceDataset.commit(self._dataset, operation, read_version=self.version)
        change.committed()
        return SpanTable(dataset)

    def compact(self) -> SpanTable:
        """Few large files without deleted rows; those of old versions stay until `remove_old_versions`."""
        import lance
        from lance.optimize import Compaction

        change = TableChange(self.path)
        dataset = lance.dataset(str(self.path))
        # files that have grown large enough are not written again, so that regular compaction stays affordable
        row_bytes = max(1, folder_bytes(self.path / DATA) // max(1, len(self.rows)))
        rows_per_file = min(max(_FILE_BYTES // row_bytes, 256), 2**20)
        plan = Compaction.plan(dataset, {"target_rows_per_fragment": rows_per_file,
                                         "materialize_deletions_threshold": 0.0})
        try:
            done = [task.execute(dataset) for task in plan.tasks]
            change.fsync()
        except BaseException:
            change.withdraw()
            raise
        if done:
            Compaction.commit(dataset, done)
            change.committed()
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
        mine = {Path(name).stem for fragment in self._dataset.get_fragments() for name in data_files(fragment)}
        remove_but(self.path / DATA, {p for p in listing(self.path / DATA) if p.stem in mine})
        strays = [p.name for p in listing(self.path / DATA) if p.stem not in mine]
        if strays:
            raise OSError(errno.EBUSY, f"files of older versions could not be removed: {', '.join(strays)}")


def _open_dataset(path: Path, version: int | None = None) -> Any:
    import lance

    with panics_are_errors():
        dataset = lance.dataset(str(path), version=version)
        dataset.get_fragments()
        _ = dataset.schema
        return dataset


def _is_usable(path: Path, latest: Path) -> bool:
    """Whether the latest manifest can be opened and, where it is not what was written, its table read all the same."""
    try:
        dataset = _open_dataset(path)
        if f"{VERSIONS}/{latest.name}" in altered_files(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                SpanTable._checked(dataset)
    except Exception:
        return False
    return True


def _reason(error: BaseException) -> str:
    return str(error).split(", /")[0].strip()


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
        fsync_path(path / VERSIONS)
    return moved
