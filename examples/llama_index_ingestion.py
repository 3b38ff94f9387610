"""Documents through an IngestionPipeline into compressed spans; a second run makes only what has changed.

    pip install ctxcomp-rag[offline] llama-index-ctxcomp
    python examples/llama_index_ingestion.py
"""

import tempfile

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore

from ctxcomp_rag import CompressedRAG, SpanChat
from ctxcomp_rag.evaluation.fictional import generate_corpus
from llama_index_ctxcomp import CtxcompLLM, EncoderEmbedding, SpanPostprocessor, SpanPrecompress, SpanSynthesizer


def main() -> None:
    corpus = generate_corpus(6, seed=4)
    documents = [Document(text=d.text, id_=d.id) for d in corpus]
    with tempfile.TemporaryDirectory() as folder, CompressedRAG.create(folder) as rag:
        assert rag.compressor is not None
        embedding = EncoderEmbedding(rag.encoder)
        store = SimpleVectorStore()  # any vector store: the spans are in the index
        pipeline = IngestionPipeline(
            transformations=[SentenceSplitter(chunk_size=128, chunk_overlap=0), embedding,
                             SpanPrecompress(rag.memory, rag.compressor)],
            vector_store=store, docstore=SimpleDocumentStore(),
        )
        nodes = list(pipeline.run(documents=documents))
        print(f"first run: {len(nodes)} nodes, {len(rag.memory)} spans")
        documents[0] = Document(text=documents[0].text + " It is closed on Mondays.", id_=corpus[0].id)
        changed = pipeline.run(documents=documents)
        print(f"one document changed: {len(changed)} nodes, {len(rag.memory)} spans")

        chat = SpanChat(rag.backbone, rag.memory)
        llm = CtxcompLLM(chat, max_tokens=24)
        kept = [n for n in nodes if n.ref_doc_id != corpus[0].id] + list(changed)
        engine = VectorStoreIndex(kept, embed_model=embedding).as_query_engine(
            llm=llm, node_postprocessors=[SpanPostprocessor(chat, on_missing="raise")],
            response_synthesizer=SpanSynthesizer(llm))
        print(engine.query(corpus[1].questions[0].question))


if __name__ == "__main__":
    main()
