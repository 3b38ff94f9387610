"""Parts that the tests of this distribution share. (A name of its own: tests of several distributions run together.)"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode

from ctxcomp_rag import (
    ChatPrompt,
    Chunk,
    CompressedRAG,
    Compressor,
    GenerationSettings,
    SoftSpan,
    SpanChat,
    SpanSpec,
    Text,
)
from ctxcomp_rag.evaluation.fictional import generate_corpus
from llama_index_ctxcomp import CtxcompLLM, EncoderEmbedding, SpanPostprocessor, SpanSynthesizer, SpanVectorStore

CORPUS = generate_corpus(6, seed=5)
QUESTIONS = [d.questions[0].question for d in CORPUS]
TOKENS = 10
SHORT = GenerationSettings(max_new_tokens=TOKENS)


@dataclass(frozen=True)
class Setup:
    """The core's own pipeline, and the parts of a framework over the same index and decoder."""

    rag: CompressedRAG
    chat: SpanChat
    embedding: EncoderEmbedding

    @property
    def compressor(self) -> Compressor:
        assert self.rag.compressor is not None
        return self.rag.compressor

    @property
    def store(self) -> SpanVectorStore:
        return SpanVectorStore(self.rag.memory, self.compressor)

    def llm(self, scope: str | None = None) -> CtxcompLLM:
        return CtxcompLLM(self.chat, scope=scope, max_tokens=TOKENS)

    def postprocessor(self, scope: str | None = None) -> SpanPostprocessor:
        return SpanPostprocessor(self.chat, scope=scope)

    def synthesizer(self, streaming: bool = False) -> SpanSynthesizer:
        return SpanSynthesizer(self.llm(), streaming=streaming)

    def retrieved(self, question: str, top_k: int = 3) -> list[NodeWithScore]:
        """What a retriever of the framework returns."""
        return self.store_index().as_retriever(similarity_top_k=top_k).retrieve(question)

    def store_index(self):  # type: ignore[no-untyped-def]  # VectorStoreIndex is slow to import; tests that need it pay
        from llama_index.core import VectorStoreIndex

        return VectorStoreIndex.from_vector_store(self.store, embed_model=self.embedding)

    def answer(self, question: str) -> str:
        """The core's own answer."""
        return self.rag.answer(question, settings=SHORT).text


class EmbeddingCompressor(Compressor):
    """Spans that are the text's own embedding rows: the decoder reads the text itself."""

    name = "own-embeddings"

    def __init__(self, like: Compressor) -> None:
        self.backbone = like.backbone
        self._spec = SpanSpec("soft", like.spec.decoder, "own-embeddings")

    @property
    def spec(self) -> SpanSpec:
        return self._spec

    @property
    def max_chunk_tokens(self) -> int:
        return 512

    @property
    def compression_factor(self) -> float:
        return 1.0

    def compress(self, chunks: Sequence[Chunk], *, compression_factor: float | None = None) -> list[SoftSpan]:  # type: ignore[override]
        rows = [self.backbone.embed(torch.tensor(self.backbone.tokenizer.encode(c.text))) for c in chunks]
        return [SoftSpan(c.id, len(r), torch.arange(len(r)), len(r), r) for c, r in zip(chunks, rows, strict=True)]

    def save_pretrained(self, path: str | Path) -> None:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, path: str | Path, backbone: object) -> EmbeddingCompressor:
        raise NotImplementedError


def node(text: str, document: str = "d", *, id_: str | None = None, start: int = 0, vector: int = 0,
         **metadata: object) -> TextNode:
    """A node with an embedding: `vector` says which axis it points along."""
    made = TextNode(text=text, start_char_idx=start, metadata=metadata, embedding=np.eye(8)[vector].tolist(),
                    relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)})
    if id_ is not None:
        made.id_ = id_
    return made


class RecordingLLM(CtxcompLLM):
    """The model, and what was spliced for it."""

    _prompts: list[ChatPrompt] = PrivateAttr(default_factory=list)

    def _prompt(self, messages: Sequence[ChatMessage]) -> ChatPrompt:
        prompt = super()._prompt(messages)
        self._prompts.append(prompt)
        return prompt

    @property
    def spliced(self) -> list[str]:
        """Chunk ids of all calls, in order."""
        return [name for prompt in self._prompts for name in prompt.chunk_ids]

    @property
    def rejected(self) -> dict[str, int]:
        return dict(sum((prompt.rejected for prompt in self._prompts), Counter[str]()))

    @property
    def text(self) -> str:
        """All that the model was told in text."""
        parts = [part for prompt in self._prompts for part in prompt.parts]
        return "".join(p if isinstance(p, str) else p.text for p in parts if isinstance(p, str | Text))
