"""An unmodified stuff chain behind any retriever: a document compressor hands it spans.

    pip install ctxcomp-rag[offline] langchain-ctxcomp langchain-classic
    python examples/langchain_stuff_chain.py
"""

import tempfile

from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore

from ctxcomp_rag import CompressedRAG, SpanChat
from ctxcomp_rag import Document as Source
from ctxcomp_rag.evaluation.fictional import generate_corpus
from langchain_ctxcomp import (
    SPAN_DOCUMENT_PROMPT,
    ChatCtxcomp,
    EncoderEmbeddings,
    SpanDocumentCompressor,
    with_span_scope,
)


def main() -> None:
    corpus = generate_corpus(8, seed=3)
    with tempfile.TemporaryDirectory() as folder, CompressedRAG.create(folder) as rag:
        rag.index(Source(d.id, d.text) for d in corpus)  # offline, once
        chat = SpanChat(rag.backbone, rag.memory)

        yours = InMemoryVectorStore(EncoderEmbeddings(rag.encoder))  # any retriever: BM25, Chroma, ...
        yours.add_documents([Document(c.text, metadata={"source": c.document_id}) for c in rag.memory.chunks()])
        retriever = ContextualCompressionRetriever(base_retriever=yours.as_retriever(search_kwargs={"k": 3}),
                                                   base_compressor=SpanDocumentCompressor(chat))
        prompt = ChatPromptTemplate.from_messages([("human", "{context}\n\nQuestion: {input}")])
        answer = create_stuff_documents_chain(ChatCtxcomp(chat, max_tokens=24, allow_text_references=True), prompt,
                                              document_prompt=SPAN_DOCUMENT_PROMPT)
        chain = with_span_scope(create_retrieval_chain(retriever, answer))

        out = chain.invoke({"input": corpus[0].questions[0].question})
        print(out["input"], "->", out["answer"])
        for document in out["context"]:
            print("-", document.metadata["source"], document.page_content[:60])


if __name__ == "__main__":
    main()
