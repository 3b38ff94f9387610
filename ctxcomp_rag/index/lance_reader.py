"""Reading a version of the table through Lance, from a folder or from an object store."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ctxcomp_rag.index.table_reader import Names, TableReader, names_in

if TYPE_CHECKING:
    import pyarrow as pa

_INLINE, _PACKED, _DEDICATED = 0, 1, 2  # blobs in the data file (up to 64 KB), in a file with others, in their own


class LanceReader(TableReader):
    """The rows of a Lance dataset, or of some of its fragments, as they are stored. `folder`: see `TableReader`."""

    def __init__(self, dataset: Any, folder: Path, fragments: list[Any] | None = None) -> None:
        super().__init__(int(dataset.version), folder)
        self._dataset = dataset
        self._good = fragments

    def latest(self) -> Self | None:
        return None

    def _scan(self, columns: Sequence[str], row_ids: Sequence[int] | None = None, **options: Any) -> pa.Table:
        chosen = {} if row_ids is None else {"filter": row_filter(row_ids)}
        with panics_are_errors():
            return self._dataset.scanner(columns=list(columns), fragments=self._good, with_row_id=True, **chosen,
                                         **options).to_table()

    def _stream(self, columns: Sequence[str], row_ids: Sequence[int]) -> Iterator[pa.RecordBatch]:
        chosen = {"filter": row_filter(row_ids)} if len(row_ids) <= 4096 else {}
        with panics_are_errors():
            yield from self._dataset.scanner(columns=list(columns), fragments=self._good, with_row_id=True,
                                             **chosen).to_batches()

    def _with_spans(self, columns: Sequence[str], row_ids: Sequence[int]) -> tuple[pa.Table, list[Any]]:
        table = self._scan([*columns, "span"], row_ids, blob_handling="all_binary")
        spans = [value.as_buffer() for value in table["span"]]  # to_pylist would copy them
        return table.drop_columns(["span"]), spans

    def _names_in(self, fragments: list[Any] | None) -> Names:
        with panics_are_errors():
            return names_in(self._dataset.scanner(columns=["chunk_id", "document_id"], fragments=fragments,
                                                  with_row_id=True).to_table())

    def count_rows(self) -> int:
        return int(self._dataset.count_rows())


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """On damaged bytes Lance may panic, which arrives as a BaseException that no caller expects."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise OSError(errno.EIO, f"Lance gave up: {error}") from error
        raise


def data_files(fragment: Any) -> list[str]:
    """Data files of a fragment, below the table."""
    return [f"data/{file.path}" for file in fragment.metadata.files]


def blob_file(data_file: str, kind: int, blob_id: int) -> str | None:
    """Where Lance keeps a blob of a data file, both below the table; None for a kind that only Lance can find."""
    if kind == _INLINE:
        return data_file
    if kind not in (_PACKED, _DEDICATED):
        return None
    # a blob's file is named by its number in binary, lowest bit first
    return f"{data_file.removesuffix('.lance')}/{f'{blob_id:032b}'[::-1]}.blob"


def deletion_file(fragment: Any) -> str:
    """The list of a fragment's deleted rows, below the table; "" where none is deleted."""
    deletions = fragment.metadata.deletion_file
    return deletions.path(fragment.fragment_id) if deletions is not None else ""


def row_filter(row_ids: Iterable[int]) -> str:
    """These rows, for Lance."""
    return f"_rowid IN ({','.join(map(str, row_ids))})"
