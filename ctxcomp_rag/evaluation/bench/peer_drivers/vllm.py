"""vLLM with automatic prefix caching, one engine step a token."""

from __future__ import annotations

import os
from importlib.metadata import packages_distributions
from typing import Any, ClassVar

from .peer import DecoderFolder, PrefixCaching, package


class VLLM(PrefixCaching):
    """The engine in this process, eager, float32; a prompt is read in one step."""

    rows: ClassVar[tuple[str, ...]] = ("vllm-raw", "vllm-prefix-same-order", "vllm-prefix-reordered")

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", DO_NOT_TRACK="1",
                          VLLM_CPU_OMP_THREADS_BIND="0", VLLM_LOGGING_LEVEL="ERROR")
        vllm = package("vllm")
        # vLLM is built under several names: vllm, vllm-cpu
        self.packages = ("torch", "transformers", packages_distributions()["vllm"][0])
        self.folder = DecoderFolder(task["config"])
        longest = len(self.text) + len(self.question) + task["new_tokens"] + 64
        made = vllm.LLM(str(self.folder.path), dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
                        enable_prefix_caching=True, max_model_len=longest, max_num_batched_tokens=longest)
        self.engine = made.llm_engine
        self.sampling = vllm.SamplingParams(temperature=0, max_tokens=task["new_tokens"], ignore_eos=True,
                                            detokenize=False)

    def forget(self) -> None:
        self._leave()
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")

    def prepare(self, row: str) -> None:
        super().prepare(row)
        self._leave()

    def read(self, ids: list[int]) -> None:
        self.engine.add_request(str(self.asked), {"prompt_token_ids": ids}, self.sampling)
        self.following()

    def following(self) -> None:
        while not self.engine.step():  # a step may end before a token is there
            pass

    def _leave(self) -> None:
        """End what was read to fill the cache."""
        self.engine.abort_request([str(self.asked)])
