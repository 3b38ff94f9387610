"""ctxcomp-rag: compress documents once into memory spans, splice the spans into a frozen decoder.

Names are imported on first use, so that `ctxcomp --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxcomp_rag.backbone import Backbone, load_frozen
    from ctxcomp_rag.chat import (
        ChatPrompt,
        ChatTurn,
        SpanChat,
        SpanReference,
        Stripper,
        context_places,
        with_references,
    )
    from ctxcomp_rag.chunking import Chunk, Document, split_document
    from ctxcomp_rag.compressors import Compressor, load_compressor
    from ctxcomp_rag.decoding import (
        Blended,
        FrozenDecoder,
        Generation,
        GenerationSettings,
        Message,
        Part,
        RequestScheduler,
        Text,
        Ticket,
        render_chat,
        splice,
    )
    from ctxcomp_rag.errors import (
        CtxcompError,
        InputError,
        SchedulerFullError,
        SpanReferenceError,
        UnsupportedModelError,
    )
    from ctxcomp_rag.index import MemoryIndex, RetrievedSpan
    from ctxcomp_rag.pipeline import Answer, CompressedRAG, load_trained_compressor
    from ctxcomp_rag.readers import read_documents
    from ctxcomp_rag.references import SpanReferences, find_references, new_scope, quoted
    from ctxcomp_rag.retrieval import RetrievalEncoder, embed_texts, encoder_name, load_retrieval_encoder
    from ctxcomp_rag.rope import rotate_keys
    from ctxcomp_rag.spans import KVSpan, LatentSpan, MemorySpan, SoftSpan, SpanSpec

__version__ = "0.1.0"

_HOME = {
    "backbone": ("Backbone", "load_frozen"),
    "chat": ("ChatPrompt", "ChatTurn", "SpanChat", "SpanReference", "Stripper", "context_places", "with_references"),
    "chunking": ("Chunk", "Document", "split_document"),
    "compressors": ("Compressor", "load_compressor"),
    "decoding": (
        "Blended", "FrozenDecoder", "Generation", "GenerationSettings", "Message", "Part", "RequestScheduler", "Text",
        "Ticket", "render_chat", "splice",
    ),
    "errors": (
        "CtxcompError", "InputError", "SchedulerFullError", "SpanReferenceError", "UnsupportedModelError",
    ),
    "index": ("MemoryIndex", "RetrievedSpan"),
    "pipeline": ("Answer", "CompressedRAG", "load_trained_compressor"),
    "readers": ("read_documents",),
    "references": ("SpanReferences", "find_references", "new_scope", "quoted"),
    "retrieval": ("RetrievalEncoder", "embed_texts", "encoder_name", "load_retrieval_encoder"),
    "rope": ("rotate_keys",),
    "spans": ("KVSpan", "LatentSpan", "MemorySpan", "SoftSpan", "SpanSpec"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Answer",
    "Backbone",
    "Blended",
    "ChatPrompt",
    "ChatTurn",
    "Chunk",
    "CompressedRAG",
    "Compressor",
    "CtxcompError",
    "Document",
    "FrozenDecoder",
    "Generation",
    "GenerationSettings",
    "InputError",
    "KVSpan",
    "LatentSpan",
    "MemoryIndex",
    "MemorySpan",
    "Message",
    "Part",
    "RequestScheduler",
    "RetrievalEncoder",
    "RetrievedSpan",
    "SchedulerFullError",
    "SoftSpan",
    "SpanChat",
    "SpanReference",
    "SpanReferenceError",
    "SpanReferences",
    "SpanSpec",
    "Stripper",
    "Text",
    "Ticket",
    "UnsupportedModelError",
    "context_places",
    "embed_texts",
    "encoder_name",
    "find_references",
    "load_compressor",
    "load_frozen",
    "load_retrieval_encoder",
    "load_trained_compressor",
    "new_scope",
    "quoted",
    "read_documents",
    "render_chat",
    "rotate_keys",
    "splice",
    "split_document",
    "with_references",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
