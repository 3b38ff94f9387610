"""An LCEL chain whose context is memory spans, streamed.

    pip install ctxcomp-rag[offline] langchain-ctxcomp
    python examples/langchain_lcel_streaming.py
"""

import tempfile

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from ctxcomp_rag import CompressedRAG, Document, SpanChat
from ctxcomp_rag.evaluation.fictional import generate_corpus
from langchain_ctxcomp import ChatCtxcomp, EncoderEmbeddings, SpanPrompt, SpanVectorStore, with_span_scope


def main() -> None:
    corpus = generate_corpus(8, seed=3)
    with tempfile.TemporaryDirectory() as folder, CompressedRAG.create(folder) as rag:
        rag.index(Document(d.id, d.text, {"kind": d.kind}) for d in corpus)  # offline, once

        chat = SpanChat(rag.backbone, rag.memory)
        store = SpanVectorStore(rag.memory, EncoderEmbeddings(rag.encoder), chat=chat)
        prompt = SpanPrompt(ChatPromptTemplate.from_messages([("human", "{context}\n\nQuestion: {question}")]))
        chain = with_span_scope(
            {"context": store.as_retriever(search_kwargs={"k": 3}), "question": RunnablePassthrough()}
            | prompt | ChatCtxcomp(chat, max_tokens=24) | StrOutputParser())

        for question in (corpus[0].questions[0].question, corpus[1].questions[0].question):
            print(question)
            for piece in chain.stream(question):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main()
