"""llama.cpp through llama-cpp-python, from a GGUF file of random weights that is written here."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

from .peer import PrefixCaching, package


class LlamaCpp(PrefixCaching):
    """Reads token ids and decodes greedily; what it keeps is the last prompt, as far as the next one begins with it."""

    packages: tuple[str, ...] = ("llama-cpp-python", "gguf")
    rows: ClassVar[tuple[str, ...]] = ("llama.cpp-raw", "llama.cpp-prefix-same-order", "llama.cpp-prefix-reordered")

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        llama_cpp = package("llama_cpp")
        longest = len(self.text) + len(self.question) + task["new_tokens"] + 64
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random.gguf"
            write_gguf(path, task["config"])
            self.engine = llama_cpp.Llama(
                str(path), n_ctx=longest, n_batch=longest, n_threads=1, n_threads_batch=1, use_mmap=False,
                type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False)

    def forget(self) -> None:
        self.engine.reset()

    def read(self, ids: list[int]) -> None:
        self.tokens = self.engine.generate(ids, temp=0.0)
        next(self.tokens)

    def following(self) -> None:
        next(self.tokens)


def write_gguf(path: Path, config: dict[str, Any]) -> None:
    """A decoder of random float32 weights, with tied embeddings and no vocabulary, as a GGUF file.

    Args:
        config: of transformers, `model_type` llama or qwen2 (which has biases on queries, keys and values).
    """
    gguf, np = package("gguf"), package("numpy")
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads, vocabulary = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    kv = hidden // heads * kv_heads
    writer = gguf.GGUFWriter(path, config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(float(config.get("rope_theta", 1e4)))
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)

    def matrix(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", 0.02 * random.standard_normal(shape, np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))

    matrix("token_embd", vocabulary, hidden)
    norm("output_norm")
    for block in (f"blk.{layer}" for layer in range(layers)):
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        for name, rows in (("attn_q", hidden), ("attn_k", kv), ("attn_v", kv)):
            matrix(f"{block}.{name}", rows, hidden)
            if config["model_type"] == "qwen2":
                writer.add_tensor(f"{block}.{name}.bias", np.zeros(rows, np.float32))
        matrix(f"{block}.attn_output", hidden, hidden)
        matrix(f"{block}.ffn_gate", inner, hidden)
        matrix(f"{block}.ffn_up", inner, hidden)
        matrix(f"{block}.ffn_down", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
