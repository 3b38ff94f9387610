"""Another project reading the workload, in an interpreter of its own: `PYTHON peer_driver.py NAME`.

Runs by itself: it imports nothing of ours, because the peer's environment has other versions. One line of JSON in (the
workload and the decoder's configuration), one line out when it is ready, `{"versions": ...}` or `{"skip": reason}`;
then for each line in, one answer is timed and one line comes out. Weights are random, of the given shape.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
                  TOKENIZERS_PARALLELISM="false")


def package(name: str) -> Any:
    """A module of the peer's environment, whose types are not known here."""
    return importlib.import_module(name)


class Peer(ABC):
    """One project. `task` is the line of JSON that the driver was given."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        self.text = [token for ids in task["chunks"] for token in ids]
        self.question: list[int] = task["question"]

    @abstractmethod
    def first(self) -> int:
        """Read everything, up to the first token; returns cache entries."""

    @abstractmethod
    def following(self) -> None:
        """One more token."""

    def answer(self) -> dict[str, Any]:
        """Times of one answer, as `Timing` of the parent names them."""
        cpu, wall = time.process_time(), time.perf_counter()
        positions = self.first()
        first, first_wall = time.process_time(), time.perf_counter()
        for _ in range(self.task["new_tokens"] - 1):
            self.following()
        last, last_wall = time.process_time(), time.perf_counter()
        return {"ttft": first - cpu, "total": last - cpu, "ttft_wall": first_wall - wall,
                "total_wall": last_wall - wall, "positions": positions}


class Reader(Peer):
    """A peer whose answer comes from a decoder of transformers."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        torch = self.torch = package("torch")
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.model = _decoder(task["config"]).eval()

    def read(self, ids: list[int], position: int, cache: Any) -> None:
        """Feed ids; the next token's place is `position` + their number."""
        torch, self.cache = self.torch, cache
        self.position = position + len(ids)
        logits = self.model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1,
                            position_ids=torch.arange(position, self.position)[None]).logits
        self.token = int(logits[0, -1].argmax())

    def following(self) -> None:
        self.read([self.token], self.position, self.cache)


class KVPress(Reader):
    """kvpress: the whole text is read, then entries are evicted by SnapKV; the question is read after."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "kvpress")

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        self.press = package("kvpress").SnapKVPress(compression_ratio=1 - 1 / task["factor"])

    def first(self) -> int:
        cache = package("transformers").DynamicCache()
        with self.press(self.model):
            self.model.model(input_ids=self.torch.tensor([self.text]), past_key_values=cache)
        self.read(self.question, len(self.text), cache)
        return int(cache.get_seq_length())


class LLMLingua2(Reader):
    """LLMLingua-2: a BERT of the multilingual base size (random weights) drops words; the decoder reads the rest."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "llmlingua")

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        class Words:
            """The package counts tokens with an encoding that it would fetch from the network."""

            def encode(self, text: str) -> list[str]:
                return text.split()

        package("tiktoken").encoding_for_model = lambda name: Words()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bert-base-multilingual-cased"  # the name tells the package how words begin
            _save_bert(path)
            self.compressor = package("llmlingua").PromptCompressor(str(path), device_map="cpu", use_llmlingua2=True)
        self.chunks = [" ".join(f"w{token % 5000}" for token in ids) for ids in task["chunks"]]

    def first(self) -> int:
        made = self.compressor.compress_prompt_llmlingua2(self.chunks, rate=1 / self.task["factor"])
        kept = self.text[: len(made["compressed_prompt"].split())]
        self.read([*kept, *self.question], 0, package("transformers").DynamicCache())
        return len(kept) + len(self.question)


class VLLM(Peer):
    """vLLM with automatic prefix caching; the documents come in another order each time, as retrieval brings them."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "vllm")

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", DO_NOT_TRACK="1",
                          VLLM_CPU_OMP_THREADS_BIND="0", VLLM_LOGGING_LEVEL="ERROR")
        self.vllm = package("vllm")
        self.folder = tempfile.TemporaryDirectory()
        _decoder(task["config"]).save_pretrained(self.folder.name)
        longest = len(self.text) + len(self.question) + task["new_tokens"] + 64
        self.engine = self.vllm.LLM(self.folder.name, dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
                                    enable_prefix_caching=True, max_model_len=longest,
                                    max_num_batched_tokens=longest)
        self._generate([*self.text, *self.question], 1)  # fills the prefix cache
        self.turn = 0

    def _generate(self, ids: list[int], new_tokens: int) -> None:
        sampling = self.vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self.engine.generate({"prompt_token_ids": ids}, use_tqdm=False, sampling_params=sampling)

    def _prompt(self) -> list[int]:
        chunks = self.task["chunks"]
        self.turn += 1
        order = chunks[self.turn % len(chunks) :] + chunks[: self.turn % len(chunks)]
        return [*(token for ids in order for token in ids), *self.question]

    def first(self) -> int:
        ids = self._prompt()
        self._generate(ids, 1)
        return len(ids)

    def following(self) -> None:
        raise NotImplementedError  # the engine answers as a whole

    def answer(self) -> dict[str, Any]:
        """The first token of one order, then a whole answer to another: the engine shows no times in between."""
        cpu, wall = time.process_time(), time.perf_counter()
        positions = self.first()
        ttft, ttft_wall = time.process_time() - cpu, time.perf_counter() - wall
        ids = self._prompt()
        cpu, wall = time.process_time(), time.perf_counter()
        self._generate(ids, self.task["new_tokens"])
        return {"ttft": ttft, "total": time.process_time() - cpu, "ttft_wall": ttft_wall,
                "total_wall": time.perf_counter() - wall, "positions": positions}


PEERS: dict[str, type[Peer]] = {"kvpress": KVPress, "llmlingua": LLMLingua2, "vllm": VLLM}


def _decoder(config: dict[str, Any]) -> Any:
    transformers = package("transformers")
    made = transformers.AutoConfig.for_model(**config)
    return transformers.AutoModelForCausalLM.from_config(made, dtype=package("torch").float32)


def _save_bert(path: Path) -> None:
    transformers = package("transformers")
    path.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *(f"w{n}" for n in range(5000))]
    (path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizerFast(vocab=str(path / "vocab.txt"), do_lower_case=False).save_pretrained(path)
    config = transformers.BertConfig(vocab_size=119547, num_labels=2)
    transformers.BertForTokenClassification(config).save_pretrained(path)


def main() -> None:
    name = sys.argv[1]
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")  # what the peer prints must not come between
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    try:
        peer = PEERS[name](json.loads(sys.stdin.readline()))
        say({"versions": {package: version(package) for package in peer.packages}})
        for _ in sys.stdin:
            say(peer.answer())
    except Exception as error:
        say({"skip": f"{type(error).__name__}: {error}".splitlines()[0][:300]})


if __name__ == "__main__":
    main()
