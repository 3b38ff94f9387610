"""SpanPrecompress: the offline step, in an ingestion pipeline, whichever vector store stands at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent

from ctxcomp_rag import Compressor, InputError, MemoryIndex
from llama_index_ctxcomp.chunks import has_text
from llama_index_ctxcomp.writer import SpanWriter


class SpanPrecompress(TransformComponent):
    """Compresses nodes and stores their spans; the nodes go on as they came. Put it behind the embedding model.

    Per node: a text that is in the index is not compressed again, whatever else changed. Chunks that a document no
    longer has are deleted with their spans, so give it all nodes of a document at once, as pipelines do.

    The fields decide whether a pipeline's cache may skip this step. They say which compressor, how much compression,
    which folder, and in `store_version` which commit: after anything was deleted, or the folder was made anew, the
    step runs again and makes what is missing.

    Args:
        index: open for writing.
        compressor: the one whose spans the index holds.
        compression_factor: the compressor's own by default.
    """

    encoder: str
    compression_factor: float
    store: str
    store_version: str = ""
    _writer: SpanWriter = PrivateAttr()

    def __init__(self, index: MemoryIndex, compressor: Compressor, *, compression_factor: float | None = None) -> None:
        writer = SpanWriter(index, compressor, compression_factor)
        fields: dict[str, Any] = {"encoder": compressor.spec.fingerprint, "store": index.location,
                                  "compression_factor": compression_factor or compressor.compression_factor}
        super().__init__(**fields)
        self._writer = writer

    @classmethod
    def class_name(cls) -> str:
        return "SpanPrecompress"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        self._writer.write([node for node in nodes if has_text(node)], replace_documents=True)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        return await asyncio.to_thread(self.__call__, nodes, **kwargs)

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What a cache hashes. A commit number never comes back, so a hit means: nothing has changed since."""
        index = self._writer.index
        made = (index.path / "index.json").stat().st_mtime_ns  # of the folder: numbers begin anew in a new one
        self.store_version = f"{made}-{index.version}"
        return super().to_dict(**kwargs)

    def __getstate__(self) -> dict[Any, Any]:
        raise InputError("SpanPrecompress cannot go to other processes: it holds a model and the lock of an index. Run "
                         "the pipeline with num_workers=1 (spans are compressed in batches anyway), or precompress "
                         "with the command ctxcomp precompress")


__all__ = ["SpanPrecompress"]
