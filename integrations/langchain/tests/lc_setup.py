"""What the tests share: the corpus, the core pipeline, and the same chain in LangChain's parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnablePassthrough

from ctxcomp_rag import CompressedRAG, Compressor, SpanChat
from ctxcomp_rag.evaluation.fictional import generate_corpus
from langchain_ctxcomp import ChatCtxcomp, EncoderEmbeddings, SpanPrompt, SpanVectorStore
from langchain_ctxcomp.scope import SCOPE_KEY

CORPUS = generate_corpus(8, seed=21)
QUESTIONS = [d.questions[0].question for d in CORPUS]
PROMPT = ChatPromptTemplate.from_messages([("human", "{context}\n\nQuestion: {question}")])
"""The layout of the core's own pipeline."""


@dataclass
class Setup:
    rag: CompressedRAG
    chat: SpanChat

    @property
    def compressor(self) -> Compressor:
        assert self.rag.compressor is not None
        return self.rag.compressor

    @property
    def embeddings(self) -> EncoderEmbeddings:
        return EncoderEmbeddings(self.rag.encoder)

    @property
    def store(self) -> SpanVectorStore:
        return SpanVectorStore(self.rag.memory, self.embeddings, self.compressor, chat=self.chat)

    def model(self, **settings: Any) -> ChatCtxcomp:
        return ChatCtxcomp(self.chat, **{"max_tokens": 16, **settings})

    def chain(self, **settings: Any) -> Runnable[str, str]:
        retriever = self.store.as_retriever(search_kwargs={"k": 3})
        return ({"context": retriever, "question": RunnablePassthrough()} | SpanPrompt(PROMPT)
                | self.model(**settings) | StrOutputParser())


def about(message: Any) -> dict[str, Any]:
    assert isinstance(message, AIMessage)
    found: dict[str, Any] = message.response_metadata["ctxcomp"]
    return found


def references(setup: Setup, scope: str, question: str = QUESTIONS[0]) -> list[str]:
    documents = setup.store.as_retriever(search_kwargs={"k": 2}).invoke(
        question, config={"configurable": {SCOPE_KEY: scope}})
    return [d.metadata["ctxcomp_ref"] for d in documents]


def block(reference: str, text: str = "what it stands for") -> dict[str, str]:
    return {"type": "span", "ref": reference, "text": text}
