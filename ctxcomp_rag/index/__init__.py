"""Compressed chunks on disk: vector, span and text of a chunk under one id. Needs no model."""

from ctxcomp_rag.index.index_reader import RetrievedSpan
from ctxcomp_rag.index.memory_index import AddReport, MemoryIndex
from ctxcomp_rag.index.publish import PushReport
from ctxcomp_rag.index.verify import Damage, VerifyReport

__all__ = ["AddReport", "Damage", "MemoryIndex", "PushReport", "RetrievedSpan", "VerifyReport"]
