"""A prompt helper for the synthesizers of llama_index: it counts positions, and cuts no reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.indices.prompt_helper import DEFAULT_PADDING, PromptHelper
from llama_index.core.llms import LLM
from llama_index.core.node_parser.text.token import TokenTextSplitter
from llama_index.core.prompts import BasePromptTemplate

from ctxcomp_rag import InputError, find_references
from llama_index_ctxcomp.llm import CtxcompLLM
from llama_index_ctxcomp.minted import ledger_of


class SpanPromptHelper(PromptHelper):
    """Packs references as what they take of the decoder's window. Made by `span_prompt_helper`."""

    @classmethod
    def class_name(cls) -> str:
        return "SpanPromptHelper"

    def repack(self, prompt: BasePromptTemplate, text_chunks: Sequence[str], padding: int = DEFAULT_PADDING,
               llm: LLM | None = None, tools: list[Any] | None = None) -> list[str]:
        self._require_room(prompt, text_chunks, 1, padding, llm, tools)
        return super().repack(prompt, text_chunks, padding, llm, tools)

    def truncate(self, prompt: BasePromptTemplate, text_chunks: Sequence[str], padding: int = DEFAULT_PADDING,
                 llm: LLM | None = None, tools: list[Any] | None = None) -> list[str]:
        self._require_room(prompt, text_chunks, len(text_chunks), padding, llm, tools)
        return super().truncate(prompt, text_chunks, padding, llm, tools)

    def get_text_splitter_given_prompt(self, prompt: BasePromptTemplate, num_chunks: int = 1,
                                       padding: int = DEFAULT_PADDING, llm: LLM | None = None,
                                       tools: list[Any] | None = None) -> TokenTextSplitter:
        try:
            return super().get_text_splitter_given_prompt(prompt, num_chunks, padding, llm, tools)
        except ValueError as error:  # "Chunk size -3 is not positive."
            raise InputError(f"the window of {self.context_window} positions has no room for a context beside the "
                             f"prompt and {self.num_output} tokens of answer; shorten the prompt, or lower "
                             "max_tokens") from error

    def _require_room(self, prompt: BasePromptTemplate, texts: Sequence[str], num_chunks: int, padding: int,
                      llm: LLM | None, tools: list[Any] | None) -> None:
        references = [r for text in texts for r in find_references(text)[1::2]]
        if not references:
            return
        room = self.get_text_splitter_given_prompt(prompt, num_chunks, padding, llm, tools).chunk_size
        largest = max(self._token_counter.get_string_tokens(r) for r in references)
        if largest > room:
            raise InputError(f"a span takes {largest} positions, but the prompt leaves room for {room} of the "
                             f"{self.context_window}; compress more, shorten the prompt, or lower max_tokens")


def span_prompt_helper(llm: CtxcompLLM) -> PromptHelper:
    """The prompt helper for `compact`, `refine`, `tree_summarize` and `accumulate` over references as text.

    Pass it as `prompt_helper` to `get_response_synthesizer`. The model needs a scope.
    """
    scope = llm.scope
    if scope is None:
        raise InputError("references travel as text only within a scope; pass CtxcompLLM(chat, scope=...) and "
                         "SpanPostprocessor(chat, scope=...) the same one, or use SpanSynthesizer")
    ledger, tokenizer = ledger_of(llm.span_chat), llm.span_chat.backbone.tokenizer

    def positions(text: str) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(find_references(text)):
            minted = ledger.find(piece, scope) if i % 2 else None
            ids += [0] * minted.positions if minted is not None else tokenizer.encode(piece)
        return ids

    # without overlap: a span that stands in two pieces would be spliced twice
    options: dict[str, Any] = {"chunk_overlap_ratio": 0.0, "tokenizer": positions}
    return SpanPromptHelper.from_llm_metadata(llm.metadata, **options)


__all__ = ["SpanPromptHelper", "span_prompt_helper"]
