"""Tiny random decoders of the supported architectures, with one tiny tokenizer; nothing is downloaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from ctxcomp_rag.backbone import Backbone

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"]
FULL_ATTENTION_ROPE = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2-full"]
"""The architectures whose cached keys can be moved to new positions. "gemma2-full" is a Gemma 2 without sliding
windows, whose soft cap on attention products is low enough to matter."""

CONTROL_TOKENS = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_MERGES = ["t h", "th e", "i n", "e r", "a n", "an d", "Ġ t", "Ġ a", "Ġ the", "o n", "r e", "Ġ o", "Ġo f", "in g",
           "e n", "a t", "i s", "Ġ is", "o r", "e s", "< |", "| >", "Ġ w", "Ġ c", "Ġ p", "l l", "e d", "Ġ s"]
MAX_POSITIONS = 512


class LetterCounts:
    """A retrieval encoder without a model: texts as counts of letters, enough to find a text by itself."""

    name = "letters"

    def encode(self, sentences: list[str], /) -> NDArray[np.float32]:
        return np.array([[s.lower().count(chr(97 + i)) for i in range(26)] for s in sentences], dtype=np.float32)


@cache
def tiny_tokenizer(num_merges: int = len(_MERGES)) -> PreTrainedTokenizerFast:
    """Byte-level BPE over all 256 bytes, a few merges and five control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a, b in (m.split(" ") for m in _MERGES[:num_merges])]
    words = {w: i for i, w in enumerate(dict.fromkeys([*alphabet, *(a + b for a, b in merges)]))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL_TOKENS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>",
                                   pad_token="<|end|>", chat_template=CHAT_TEMPLATE)


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """Configuration of a tiny decoder; `overrides` replace any field."""
    tokenizer = tiny_tokenizer()
    # weights far larger than the usual 0.02: attention has to depend on positions visibly
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.2,
    }
    if name == "gpt2":
        return GPT2Config(**{**common, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS,
                             **overrides})
    common |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "max_position_embeddings": MAX_POSITIONS}
    window = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
    classes: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
        "llama": (LlamaConfig, {}),
        "mistral": (MistralConfig, {"sliding_window": None}),
        "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
        "qwen3": (Qwen3Config, {"head_dim": 16}),
        "gemma2": (Gemma2Config, window),
        "gemma2-full": (Gemma2Config, {**window, "layer_types": ["full_attention"] * 2,
                                       "attn_logit_softcapping": 1.0}),
        "gemma3": (Gemma3TextConfig, window),
        "phi3": (Phi3Config, {"sliding_window": None}),
    }
    cls, own = classes[name]
    return cls(**{**common, **own, **overrides})


def tiny_model(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A random decoder; the same configuration and seed give the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


@cache
def tiny_backbone(name: str) -> Backbone:
    """The frozen tiny decoder of an architecture of ARCHITECTURES; one object for the whole test run."""
    return Backbone(tiny_model(tiny_config(name)), tiny_tokenizer(), model_id=f"tiny-{name}")


def save_tiny(name: str, folder: Path) -> Path:
    """Save the tiny decoder and its tokenizer as a Hugging Face folder."""
    tiny_model(tiny_config(name)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
