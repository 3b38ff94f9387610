"""Extractive text: a small classifier keeps the words that matter (LLMLingua-2, Pan et al., ACL 2024)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ctxcomp_rag.chunking import TextEncoder
from ctxcomp_rag.errors import InputError, ModelLoadError


class LLMLingua2:
    """The real `llmlingua` package with any LLMLingua-2 model; needs the extra `llmlingua`.

    Args:
        model: folder or hub id of a token classifier, such as microsoft/llmlingua-2-xlm-roberta-large-meetingbank; the
            package tells by "xlm-roberta-large" or "bert-base-multilingual-cased" in its name how words begin.
        encoder: the decoder's tokenizer, in whose tokens it is counted how much is kept. The package counts in those
            of GPT-3.5, whose table it fetches from a network.
    """

    def __init__(self, model: str, encoder: TextEncoder) -> None:
        try:
            from llmlingua import PromptCompressor, prompt_compressor
        except ImportError as error:
            raise InputError("extractive text needs the package llmlingua, which is not installed; "
                             "pip install 'ctxcomp-rag[llmlingua]'") from error
        counting: Any = prompt_compressor
        theirs, counting.tiktoken = counting.tiktoken, SimpleNamespace(encoding_for_model=lambda name: encoder)
        try:
            self._compressor = PromptCompressor(model, device_map="cpu", use_llmlingua2=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadError(f"the LLMLingua-2 model {model!r} cannot be loaded: {error}") from error
        finally:
            counting.tiktoken = theirs

    def __call__(self, text: str, factor: float) -> str:
        """About one in `factor` of the text's tokens, as whole words in their order.

        Raises:
            ModelLoadError: the model's name does not say how its words begin.
        """
        try:
            return str(self._compressor.compress_prompt([text], rate=1 / factor)["compressed_prompt"])
        except NotImplementedError as error:
            raise ModelLoadError(f"llmlingua does not know how words begin in {self._compressor.model_name!r}; its "
                                 "folder must be called after xlm-roberta-large or bert-base-multilingual-cased, "
                                 "whichever the model comes from") from error
