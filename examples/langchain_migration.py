"""From a vector store and a text chain to spans: what changes.

    pip install ctxcomp-rag[offline] langchain-ctxcomp
    python examples/langchain_migration.py

    - store = InMemoryVectorStore.from_texts(texts, embeddings)
    + store = SpanVectorStore.from_texts(texts, embeddings, path="kb")
    + store.chat = SpanChat(load_frozen(), store.index)
    - prompt = ChatPromptTemplate.from_messages(MESSAGES)
    + prompt = SpanPrompt(ChatPromptTemplate.from_messages(MESSAGES))
"""

import tempfile

from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore, VectorStoreRetriever

from ctxcomp_rag import SpanChat, load_frozen
from ctxcomp_rag.evaluation.fictional import generate_corpus
from langchain_ctxcomp import ChatCtxcomp, EncoderEmbeddings, SpanPrompt, SpanVectorStore

MESSAGES = [("human", "{context}\n\nQuestion: {question}")]


def chain(retriever: Runnable, prompt: Runnable, model: ChatCtxcomp) -> Runnable:
    return {"context": retriever, "question": RunnablePassthrough()} | prompt | model


def as_text(retriever: VectorStoreRetriever) -> Runnable:
    return retriever | RunnableLambda(lambda found: "\n\n".join(d.page_content for d in found))


def main() -> None:
    corpus = generate_corpus(8, seed=3)
    texts, embeddings = [d.text for d in corpus], EncoderEmbeddings()
    with tempfile.TemporaryDirectory() as folder:
        after = SpanVectorStore.from_texts(texts, embeddings, path=f"{folder}/kb")
        after.chat = SpanChat(load_frozen(), after.index)
        before = InMemoryVectorStore.from_texts(texts, embeddings)
        model = ChatCtxcomp(after.chat, max_tokens=24)
        old = chain(as_text(before.as_retriever(search_kwargs={"k": 3})),
                    ChatPromptTemplate.from_messages(MESSAGES), model)
        new = chain(after.as_retriever(search_kwargs={"k": 3}),
                    SpanPrompt(ChatPromptTemplate.from_messages(MESSAGES)), model)
        for name, each in (("text", old), ("spans", new)):
            answer = each.invoke(corpus[0].questions[0].question)
            print(f"{name}: {answer.content} ({answer.usage_metadata['input_tokens']} positions)")


if __name__ == "__main__":
    main()
