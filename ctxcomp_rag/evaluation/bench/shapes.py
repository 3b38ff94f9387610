"""Decoders to measure: known sizes with random weights, whose speed is that of the trained model, or a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ctxcomp_rag.backbone import Backbone, embedded_path, load_frozen
from ctxcomp_rag.errors import InputError

SHAPES: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType({
    # Qwen2-0.5B
    "0.5b": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "rope_theta": 1e6},
    # SmolLM2-135M
    "135m": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 1e5},
    # the embedded decoder's vocabulary, whose tokenizer every random decoder gets
    "tiny": {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096},
})
WINDOW: Final = 65536


def shape_config(shape: str) -> dict[str, Any]:
    """The configuration of a shape as transformers reads it."""
    return {**SHAPES[shape], "max_position_embeddings": WINDOW, "tie_word_embeddings": True, "bos_token_id": 0,
            "eos_token_id": 0}


def load_shape(name: str, **overrides: Any) -> Backbone:
    """A decoder of random weights (float32, one seed) by the name of a shape, else `load_frozen`.

    Random ones come with the embedded decoder's tokenizer; what its ids spell plays no part in their speed.

    Raises:
        InputError: neither a shape nor a folder.
    """
    if name not in SHAPES:
        if not Path(name).is_dir() and name != "embedded":
            raise InputError(f"expected a shape ({', '.join(SHAPES)}), 'embedded' or the folder of a model, "
                             f"got {name!r}")
        return load_frozen(name, dtype=torch.float32)
    config = {**shape_config(name), **overrides}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classes: Any = AutoModelForCausalLM
        model = classes.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    return Backbone(model, load_frozen(embedded_path()).tokenizer.hf, model_id=f"random-{name}")
