"""Peers that compress while the question waits, in front of a decoder of transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

from .peer import Peer, package, random_decoder


class Reader(Peer):
    """A peer whose answer comes from a decoder of transformers."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        self.torch = package("torch")
        self.model = random_decoder(task["config"])

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

    packages: tuple[str, ...] = ("torch", "transformers", "kvpress")
    rows: ClassVar[tuple[str, ...]] = ("kvpress",)

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        self.press = package("kvpress").SnapKVPress(compression_ratio=1 - 1 / task["factor"])

    def first(self, row: str) -> int:
        cache = package("transformers").DynamicCache()
        with self.press(self.model):
            self.model.model(input_ids=self.torch.tensor([self.text]), past_key_values=cache)
        self.read(self.question, len(self.text), cache)
        return int(cache.get_seq_length())


class LLMLingua2(Reader):
    """LLMLingua-2: a BERT of the multilingual base size (random weights) drops words; the decoder reads the rest."""

    packages: tuple[str, ...] = ("torch", "transformers", "llmlingua")
    rows: ClassVar[tuple[str, ...]] = ("llmlingua",)

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)

        class Words:
            """The package counts tokens with an encoding that it fetches from the network, and has no option for it."""

            def encode(self, text: str) -> list[str]:
                return text.split()

        package("tiktoken").encoding_for_model = lambda name: Words()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bert-base-multilingual-cased"  # the name tells the package how words begin
            _save_bert(path)
            self.compressor = package("llmlingua").PromptCompressor(str(path), device_map="cpu", use_llmlingua2=True)
        self.chunks = [" ".join(f"w{token % 5000}" for token in ids) for ids in task["chunks"]]

    def first(self, row: str) -> int:
        made = self.compressor.compress_prompt_llmlingua2(self.chunks, rate=1 / self.task["factor"])
        kept = self.text[: len(made["compressed_prompt"].split())]
        self.read([*kept, *self.question], 0, package("transformers").DynamicCache())
        return len(kept) + len(self.question)


def _save_bert(path: Path) -> None:
    transformers = package("transformers")
    path.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *(f"w{n}" for n in range(5000))]
    (path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizerFast(vocab=str(path / "vocab.txt"), do_lower_case=False).save_pretrained(path)
    config = transformers.BertConfig(vocab_size=119547, num_labels=2)
    transformers.BertForTokenClassification(config).save_pretrained(path)
