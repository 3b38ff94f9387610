"""What is left in memory of many short requests that come through many threads: nothing should grow with their number.

    python benchmarks/concurrency.py [--requests 2000] [--threads 32] [--tokens 4] [--lifetime 5] [--out FILE]

Through both frameworks, one after the other, in this process: retrieve three documents, mint their references in a
scope of the request's own, answer. At ten checkpoints, when all requests so far are over: resident memory, references
and requests that are still held. Every answer is compared with that of the same request alone.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from common import print_table
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from llama_index.core import VectorStoreIndex
from tqdm import tqdm

from ctxcomp_rag import CompressedRAG, Document, SpanChat, SpanReferences, Ticket
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.provenance import write_result
from langchain_ctxcomp import ChatCtxcomp, EncoderEmbeddings, SpanPrompt, with_span_scope
from langchain_ctxcomp import SpanVectorStore as LangChainStore
from llama_index_ctxcomp import CtxcompLLM, EncoderEmbedding, SpanPostprocessor, SpanSynthesizer
from llama_index_ctxcomp import SpanVectorStore as LlamaIndexStore

CHECKPOINTS = 10
Ask = Callable[[str], str]


def langchain(rag: CompressedRAG, chat: SpanChat, tokens: int) -> Ask:
    store = LangChainStore(rag.memory, EncoderEmbeddings(rag.encoder), chat=chat)
    prompt = SpanPrompt(ChatPromptTemplate.from_messages([("human", "{context}\n\nQuestion: {question}")]))
    chain = with_span_scope({"context": store.as_retriever(search_kwargs={"k": 3}), "question": RunnablePassthrough()}
                            | prompt | ChatCtxcomp(chat, max_tokens=tokens) | StrOutputParser())
    return lambda question: str(chain.invoke(question))


def llama_index(rag: CompressedRAG, chat: SpanChat, tokens: int) -> Ask:
    llm = CtxcompLLM(chat, max_tokens=tokens)
    index = VectorStoreIndex.from_vector_store(LlamaIndexStore(rag.memory), embed_model=EncoderEmbedding(rag.encoder))
    engine = index.as_query_engine(llm=llm, similarity_top_k=3, node_postprocessors=[SpanPostprocessor(chat)],
                                   response_synthesizer=SpanSynthesizer(llm))
    return lambda question: str(engine.query(question))


def held(chat: SpanChat) -> dict[str, Any]:
    """What this process holds once the decoder is idle."""
    time.sleep(0.5)
    gc.collect()
    return {"rss_mib": round(psutil.Process().memory_info().rss / 2**20, 1), "references": len(chat.references),
            "requests": sum(type(o) is Ticket for o in gc.get_objects())}


def measure(name: str, ask: Ask, chat: SpanChat, questions: list[str], requests: int, threads: int
            ) -> list[dict[str, Any]]:
    alone = {q: ask(q) for q in questions}
    rows = [{"framework": name, "done": 0, **held(chat), "wrong": 0, "per_second": None}]
    done = wrong = 0
    for checkpoint in tqdm(range(1, CHECKPOINTS + 1), desc=name):
        batch = [questions[i % len(questions)] for i in range(done, requests * checkpoint // CHECKPOINTS)]
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            wrong += sum(said != alone[q] for q, said in zip(batch, pool.map(ask, batch), strict=True))
        speed = round(len(batch) / (time.perf_counter() - began), 1)
        done += len(batch)
        rows.append({"framework": name, "done": done, **held(chat), "wrong": wrong, "per_second": speed})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="through each framework")
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4, help="of every answer")
    parser.add_argument("--lifetime", type=float, default=5.0, help="seconds that a reference is good")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "concurrency.json")
    args = parser.parse_args()
    corpus = generate_corpus(24, seed=9)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, CompressedRAG.create(folder) as rag:
        rag.index(Document(d.id, d.text) for d in corpus)
        for name, make in (("langchain", langchain), ("llama_index", llama_index)):
            chat = SpanChat(rag.backbone, rag.memory, references=SpanReferences("kb", seconds=args.lifetime))
            rows += measure(name, make(rag, chat, args.tokens), chat, [d.questions[0].question for d in corpus],
                            args.requests, args.threads)
            chat.scheduler.close()
    print_table(rows)
    write_result(args.out, {"threads": args.threads, "tokens": args.tokens, "lifetime": args.lifetime, "rows": rows})


if __name__ == "__main__":
    main()
