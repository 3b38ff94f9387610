"""LlamaIndex over compressed documents: retrieved nodes enter the decoder as memory spans instead of text."""

from llama_index_ctxcomp.blocks import PlainBlock, SpanBlock
from llama_index_ctxcomp.embedding import EncoderEmbedding
from llama_index_ctxcomp.errors import PromptError
from llama_index_ctxcomp.llm import CtxcompLLM
from llama_index_ctxcomp.nodes import SpanNode
from llama_index_ctxcomp.postprocessor import SpanPostprocessor
from llama_index_ctxcomp.precompress import SpanPrecompress
from llama_index_ctxcomp.prompt_helper import SpanPromptHelper, span_prompt_helper
from llama_index_ctxcomp.synthesizer import SpanSynthesizer
from llama_index_ctxcomp.vector_store import SpanVectorStore

__all__ = [
    "CtxcompLLM",
    "EncoderEmbedding",
    "PlainBlock",
    "PromptError",
    "SpanBlock",
    "SpanNode",
    "SpanPostprocessor",
    "SpanPrecompress",
    "SpanPromptHelper",
    "SpanSynthesizer",
    "SpanVectorStore",
    "span_prompt_helper",
]
