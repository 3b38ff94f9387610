"""The official ICAE checkpoints: v2, one safetensors file with the LoRA matrices and the memory table,

    icae.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight   (rank, in)   BF16
    ...
    memory_token_embed.weight                                                     (memory tokens + 3, hidden)   F32

and v1, a `.pt` with the same keys (float32) among all keys of the model; what was not trained is a 0-dim 0.0.
v1 reads one segment. Its head had untrained rows for the special tokens, which took part in its training loss; our
decoder has no such rows. Prompts and tokenisation of both: see `layouts`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.errors import InputError, ModelLoadError
from ctxcomp_rag.importers.containers import read_tensors
from ctxcomp_rag.importers.layouts import icae_v1_layout, icae_v2_layout
from ctxcomp_rag.spans import PromptLayout

OFFICIAL_ALPHA = 32.0
"""LoRA alpha of the official code; the checkpoint does not carry it."""

_MEMORY_KEY = "memory_token_embed.weight"
_PREFIX = "icae."
_NUM_SPECIAL_ROWS = 3  # [AE], [LM], [FT]
_LORA_KEY = re.compile(r"icae\.base_model\.model\..+\.(\w+)\.lora_([AB])\.default\.weight")


def load_official_v2(path: str | Path, backbone: Backbone, *, mean_compression_rate: int = 4,
                     segment_tokens: int | None = None) -> ICAECompressor:
    """Read an official ICAE v2 checkpoint for the decoder it was trained on.

    Rank, LoRA targets and the number of memory tokens are found in the file. Weights are held in float32 whatever
    the file's dtype is.

    Args:
        mean_compression_rate: source tokens per slot of a full segment; the file does not carry it.
        segment_tokens: longest segment, instead of that rate.

    Raises:
        ModelLoadError: not such a file, or made for a decoder of another shape; the message names the keys.
    """
    return _compressor(path, _read(Path(path)), backbone, "v2", icae_v2_layout(backbone),
                       mean_compression_rate=mean_compression_rate, segment_tokens=segment_tokens)


def load_official_v1(path: str | Path, backbone: Backbone, *, segment_tokens: int = 512) -> ICAECompressor:
    """Read an official ICAE v1 checkpoint (`.pt`) for the decoder it was trained on.

    Args:
        segment_tokens: longest text that becomes one segment; the file does not carry it.

    Raises:
        ModelLoadError: not such a file, or made for a decoder of another shape; the message names the keys.
    """
    content = read_tensors(Path(path))
    _refuse(path, "holds something else than a tensor as", [k for k, v in content.items() if not isinstance(v, Tensor)])
    placeholders = {key for key, tensor in content.items() if tensor.ndim == 0}
    known = _placeholder_keys(backbone)
    _refuse(path, "was made for another decoder; it has placeholders of", placeholders - known)
    _refuse(path, "was made for another decoder; it lacks the placeholders of", known - placeholders)
    tensors = {key: tensor for key, tensor in content.items() if tensor.ndim}
    _refuse(path, "has other tensors than float32 as",
            [f"{k} ({t.dtype})" for k, t in tensors.items() if t.dtype != torch.float32])
    return _compressor(path, tensors, backbone, "v1", icae_v1_layout(backbone), segment_tokens=segment_tokens)


def save_official_v1(compressor: ICAECompressor, path: str | Path) -> None:
    """Write a compressor as an official ICAE v1 checkpoint, placeholders included."""
    _require_official(compressor, "v1")
    tensors = {key: torch.tensor(0.0) for key in _placeholder_keys(compressor.backbone)}
    tensors |= {key: _on_cpu(p, torch.float32) for key, p in _lora_parameters(compressor).items()}
    torch.save({**tensors, _MEMORY_KEY: _on_cpu(compressor.memory_tokens, torch.float32)}, Path(path))


def _placeholder_keys(backbone: Backbone) -> set[str]:
    """Keys of the untrained weights, and of the rotary frequencies that older Llama code stored in every layer."""
    names = set(backbone.model.state_dict())
    names |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(int(backbone.config.num_hidden_layers))}
    return {f"{_PREFIX}base_model.model.{name}" for name in names}


def _compressor(path: str | Path, tensors: dict[str, Tensor], backbone: Backbone, version: str, layout: PromptLayout,
                *, mean_compression_rate: int = 4, segment_tokens: int | None = None) -> ICAECompressor:
    memory = tensors.get(_MEMORY_KEY)
    matches = {key: _LORA_KEY.fullmatch(key) for key in tensors if key != _MEMORY_KEY}
    _refuse(path, "has unknown keys", [key for key, match in matches.items() if match is None])
    if memory is None or not matches:
        missing = _MEMORY_KEY if memory is None else "icae.….lora_A.default.weight"
        raise ModelLoadError(f"{str(path)!r} is not an ICAE {version} checkpoint: it has no {missing}")
    if memory.ndim != 2 or memory.shape[0] <= _NUM_SPECIAL_ROWS:
        raise ModelLoadError(f"{str(path)!r}: {_MEMORY_KEY} must hold memory tokens, [AE], [LM] and [FT] as rows, "
                             f"got shape {tuple(memory.shape)}")
    num_memory_tokens = int(memory.shape[0]) - _NUM_SPECIAL_ROWS
    first_a = next((key for key, match in matches.items() if match and match[2] == "A"), None)
    segment = segment_tokens or num_memory_tokens * mean_compression_rate
    config = ICAEConfig(
        num_memory_tokens=num_memory_tokens,
        segment_tokens=segment,
        compression_factor=segment / num_memory_tokens,
        lora_rank=int(tensors[first_a].shape[0]) if first_a else 1,
        lora_alpha=OFFICIAL_ALPHA,
        lora_targets=tuple(sorted({match[1] for match in matches.values() if match})),
        layout=layout,
    )
    try:
        compressor = ICAECompressor(backbone, config, memory_tokens=memory)
    except ValueError as error:  # PEFT finds no module of that name
        raise ModelLoadError(f"{str(path)!r} does not fit the decoder {backbone.model_id!r}: {error}") from error
    lora = _lora_parameters(compressor)
    _refuse(path, "was made for another decoder; it lacks", lora.keys() - tensors.keys())
    _refuse(path, "was made for another decoder; it has besides", matches.keys() - lora.keys())
    _refuse(path, "was made for another decoder; shapes differ (file, expected):",
            [f"{key} {tuple(tensors[key].shape)}, {tuple(parameter.shape)}" for key, parameter in lora.items()
             if tensors[key].shape != parameter.shape])
    with torch.no_grad():
        for key, parameter in lora.items():
            parameter.copy_(tensors[key])
    return compressor


def save_official_v2(compressor: ICAECompressor, path: str | Path, *, lora_dtype: torch.dtype = torch.bfloat16,
                     memory_dtype: torch.dtype = torch.float32) -> None:
    """Write a compressor as an official ICAE v2 checkpoint; the default dtypes are those of the published files.

    Raises:
        InputError: the official code would compute something else with these settings.
    """
    _require_official(compressor, "v2")
    tensors = {key: _on_cpu(parameter, lora_dtype) for key, parameter in _lora_parameters(compressor).items()}
    save_file({**tensors, _MEMORY_KEY: _on_cpu(compressor.memory_tokens, memory_dtype)}, Path(path))


def _require_official(compressor: ICAECompressor, version: str) -> None:
    config = compressor.config
    if config.slots != "fixed" or config.slot_positions != "consecutive" or config.lora_alpha != OFFICIAL_ALPHA:
        raise InputError(
            f"the official ICAE {version} format knows slots='fixed', slot_positions='consecutive' and "
            "lora_alpha=32 only, got "
            f"{config.slots!r}, {config.slot_positions!r} and {config.lora_alpha:g}; use save_pretrained instead"
        )


def _lora_parameters(compressor: ICAECompressor) -> dict[str, nn.Parameter]:
    """LoRA matrices of the encoder under their official keys."""
    return {_PREFIX + name: p for name, p in compressor.encoder.named_parameters() if ".lora_" in name}


def _on_cpu(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise ModelLoadError(f"there is no file {str(path)!r}") from error
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{str(path)!r} is not a safetensors file that can be read: {error}") from error
    return tensors


def _refuse(path: str | Path, problem: str, keys: Collection[str]) -> None:
    if keys:
        shown = sorted(keys)
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        raise ModelLoadError(f"{str(path)!r} {problem} {'; '.join(shown[:3])}{more}")
