"""EncoderEmbedding: the retrieval encoder of an index as an embedding model of llama_index."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import PrivateAttr

from ctxcomp_rag import RetrievalEncoder, embed_texts, encoder_name, load_retrieval_encoder


class EncoderEmbedding(BaseEmbedding):
    """Embeds as `CompressedRAG` does, so that both find the same chunks.

    Args:
        encoder: a name, a folder, or an object with `.encode(list[str])`; by default the one that needs no network.
    """

    _encoder: RetrievalEncoder = PrivateAttr()

    def __init__(self, encoder: RetrievalEncoder | str | None = None, **kwargs: Any) -> None:
        loaded = load_retrieval_encoder(encoder) if encoder is not None else load_retrieval_encoder()
        super().__init__(model_name=encoder_name(loaded), **kwargs)
        self._encoder = loaded

    @classmethod
    def class_name(cls) -> str:
        return "EncoderEmbedding"

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._get_text_embeddings([query])[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        rows: list[Embedding] = embed_texts(self._encoder, texts).tolist()
        return rows

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


__all__ = ["EncoderEmbedding"]
