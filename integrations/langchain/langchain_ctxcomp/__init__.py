"""LangChain over compressed documents: retrieve memory spans, splice them, instead of text, into a frozen decoder."""

from langchain_ctxcomp.chat_model import ChatCtxcomp
from langchain_ctxcomp.compressor import SpanDocumentCompressor
from langchain_ctxcomp.embeddings import EncoderEmbeddings
from langchain_ctxcomp.prompt import SPAN_DOCUMENT_PROMPT, SpanPrompt
from langchain_ctxcomp.retriever import SpanRetriever
from langchain_ctxcomp.scope import with_span_scope
from langchain_ctxcomp.vector_store import SpanVectorStore

__all__ = [
    "SPAN_DOCUMENT_PROMPT",
    "ChatCtxcomp",
    "EncoderEmbeddings",
    "SpanDocumentCompressor",
    "SpanPrompt",
    "SpanRetriever",
    "SpanVectorStore",
    "with_span_scope",
]
