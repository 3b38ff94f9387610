"""The folders that the package loads, as weights to train on from: what export.py wrote."""

from __future__ import annotations

from pathlib import Path

import torch
from model import PROJECTIONS, Model, owner
from safetensors.torch import load_file

DECODER = "decoder/model.safetensors"
ADAPTER, MEMORY = "icae/adapter_model.safetensors", "icae/memory_tokens.safetensors"
RELEASED = (DECODER, ADAPTER, MEMORY, "decoder/tokenizer.json")


def load_released(model: Model, folder: Path) -> None:
    """Let the model have the weights of FOLDER/decoder and FOLDER/icae."""
    decoder, adapter, memory = (load_file(folder / name) for name in (DECODER, ADAPTER, MEMORY))
    with torch.no_grad():
        model.embed.copy_(decoder["model.embed_tokens.weight"])
        model.final_norm.copy_(decoder["model.norm.weight"])
        model.special.copy_(memory["memory_tokens"][:2])
        for i, block in enumerate(model.blocks):
            layer = f"model.layers.{i}."
            block.input_norm.copy_(decoder[layer + "input_layernorm.weight"])
            block.post_norm.copy_(decoder[layer + "post_attention_layernorm.weight"])
            for name in PROJECTIONS:
                where = f"{layer}{owner(name)}.{name}"
                block.weight[name].copy_(decoder[where + ".weight"])
                block.lora_a[name].copy_(adapter[f"base_model.model.{where}.lora_A.weight"])
                block.lora_b[name].copy_(adapter[f"base_model.model.{where}.lora_B.weight"])
