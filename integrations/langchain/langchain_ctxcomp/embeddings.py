"""Between LangChain's embeddings and the retrieval encoders of ctxcomp_rag, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from langchain_core.embeddings import Embeddings

from ctxcomp_rag import RetrievalEncoder, embed_texts, encoder_name, load_retrieval_encoder


class EncoderEmbeddings(Embeddings):
    """A retrieval encoder as LangChain embeddings; `CompressedRAG` and a vector store then find the same chunks.

    Args:
        encoder: a name, a folder, or an object with `.encode(list[str])`; by default the one that needs no network.
    """

    def __init__(self, encoder: RetrievalEncoder | str | None = None) -> None:
        self.encoder = load_retrieval_encoder(encoder) if encoder is not None else load_retrieval_encoder()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        rows: list[list[float]] = embed_texts(self.encoder, texts).tolist() if texts else []
        return rows

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


class EmbeddingsEncoder:
    """LangChain embeddings as a retrieval encoder, for `CompressedRAG(..., encoder=...)`.

    Attributes:
        name: the class and, where it says so, the model: what an index remembers its vectors by.
    """

    def __init__(self, embedding: Embeddings) -> None:
        self.embedding = embedding
        self.name = embedding_name(embedding)

    def encode(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        return np.asarray(self.embedding.embed_documents(list(texts)), dtype=np.float32)


def embedding_name(embedding: Embeddings) -> str:
    """A name that stays the same between runs."""
    if isinstance(embedding, EncoderEmbeddings):
        return encoder_name(embedding.encoder)
    model = getattr(embedding, "model", None) or getattr(embedding, "model_name", None)
    kind = f"{type(embedding).__module__}.{type(embedding).__qualname__}"
    return f"{kind}:{model}" if isinstance(model, str) else kind


__all__ = ["EmbeddingsEncoder", "EncoderEmbeddings", "embedding_name"]
