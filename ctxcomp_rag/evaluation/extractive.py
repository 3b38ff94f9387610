"""Extractive text: a small classifier keeps the words that matter (LLMLingua-2, Pan et al., ACL 2024)."""

from __future__ import annotations

from ctxcomp_rag.errors import InputError, ModelLoadError


class LLMLingua2:
    """The real `llmlingua` package with any LLMLingua-2 model; needs the extra `llmlingua`.

    Args:
        model: folder or hub id of a token classifier, such as microsoft/llmlingua-2-xlm-roberta-large-meetingbank.
    """

    def __init__(self, model: str) -> None:
        try:
            from llmlingua import PromptCompressor
        except ImportError as error:
            raise InputError("extractive text needs the package llmlingua, which is not installed; "
                             "pip install 'ctxcomp-rag[llmlingua]'") from error
        try:
            self._compressor = PromptCompressor(model, device_map="cpu", use_llmlingua2=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadError(f"the LLMLingua-2 model {model!r} cannot be loaded: {error}") from error

    def __call__(self, text: str, factor: float) -> str:
        """About one in `factor` of the text's words, in their order."""
        return str(self._compressor.compress_prompt([text], rate=1 / factor)["compressed_prompt"])
