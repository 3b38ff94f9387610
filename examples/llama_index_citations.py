"""A query engine that reads memory spans and cites the text they stand for.

    pip install ctxcomp-rag[offline] llama-index-ctxcomp
    python examples/llama_index_citations.py
"""

import tempfile

from llama_index.core import VectorStoreIndex

from ctxcomp_rag import CompressedRAG, Document, SpanChat
from ctxcomp_rag.evaluation.fictional import generate_corpus
from llama_index_ctxcomp import CtxcompLLM, EncoderEmbedding, SpanPostprocessor, SpanSynthesizer, SpanVectorStore


def main() -> None:
    corpus = generate_corpus(8, seed=3)
    with tempfile.TemporaryDirectory() as folder, CompressedRAG.create(folder) as rag:
        rag.index(Document(d.id, d.text, {"kind": d.kind}) for d in corpus)  # offline, once

        chat = SpanChat(rag.backbone, rag.memory)
        llm = CtxcompLLM(chat, max_tokens=24)
        index = VectorStoreIndex.from_vector_store(SpanVectorStore(rag.memory),
                                                   embed_model=EncoderEmbedding(rag.encoder))
        engine = index.as_query_engine(
            llm=llm, similarity_top_k=3, streaming=True,
            node_postprocessors=[SpanPostprocessor(chat)],
            response_synthesizer=SpanSynthesizer(llm, streaming=True),
        )

        question = corpus[0].questions[0].question
        response = engine.query(question)
        print(question)
        for piece in response.response_gen:
            print(piece, end="", flush=True)
        print("\n\nread from:")
        for number, source in enumerate(response.source_nodes, start=1):
            node, text = source.node, " ".join(source.node.get_content().split())
            print(f"[{number}] {source.score:.2f} {node.ref_doc_id} ({node.metadata['kind']}): {text[:60]}...")


if __name__ == "__main__":
    main()
