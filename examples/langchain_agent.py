"""An agent's retrieval tool: the artifact carries the references, the decoder reads the spans.

    pip install ctxcomp-rag[offline] langchain-ctxcomp
    python examples/langchain_agent.py

The planner decides what to look up; here it is scripted, in your agent it is any model that calls tools.
"""

import tempfile

from langchain_core.documents import Document
from langchain_core.language_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool

from ctxcomp_rag import CompressedRAG, SpanChat
from ctxcomp_rag import Document as Source
from ctxcomp_rag.evaluation.fictional import generate_corpus
from langchain_ctxcomp import ChatCtxcomp, EncoderEmbeddings, SpanPrompt, SpanVectorStore


def main() -> None:
    corpus = generate_corpus(8, seed=3)
    question = corpus[0].questions[0].question
    with tempfile.TemporaryDirectory() as folder, CompressedRAG.create(folder) as rag:
        rag.index(Source(d.id, d.text) for d in corpus)  # offline, once
        chat = SpanChat(rag.backbone, rag.memory)
        retriever = SpanVectorStore(rag.memory, EncoderEmbeddings(rag.encoder), chat=chat).as_retriever()

        @tool(response_format="content_and_artifact")
        def search(query: str) -> tuple[str, list[Document]]:
            """Find documents."""
            found = retriever.invoke(query)  # the artifact is never sent to a model, so nobody can write one
            return f"{len(found)} documents found", found

        call = {"name": "search", "args": {"query": question}, "id": "1", "type": "tool_call"}
        planner = FakeMessagesListChatModel(responses=[AIMessage("", tool_calls=[call])])
        asked = planner.invoke([HumanMessage(question)])
        found = search.invoke(asked.tool_calls[0])
        print(found.content)

        prompt = SpanPrompt(ChatPromptTemplate.from_messages([("human", "{context}\n\nQuestion: {question}")]))
        answer = (prompt | ChatCtxcomp(chat, max_tokens=24)).invoke({"context": found.artifact, "question": question})
        print(question, "->", answer.content, answer.response_metadata["ctxcomp"])


if __name__ == "__main__":
    main()
