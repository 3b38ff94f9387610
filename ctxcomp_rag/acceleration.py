"""Faster decoders on a CPU: attention without repeated keys, and linear layers in int8.

Both are options. The attention computes the same numbers in another order; int8 computes other numbers.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ctxcomp_rag.errors import UnsupportedModelError

GROUPED_ATTENTION: Final = "ctxcomp_grouped"
"""Name under which transformers knows `grouped_attention` (`attn_implementation`)."""

_FEW_QUERIES = 64


def grouped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      dropout: float = 0.0, scaling: float | None = None, **options: Any) -> tuple[Tensor, None]:
    """Attention of few queries as two matrix products over the heads that share a key; of many as sdpa.

    The query heads of one key head are rows of one matrix, so keys and values are read once and never repeated. With
    many queries the score matrix no longer fits the processor's cache, and torch's fused kernel is faster.

    Args:
        query: (batch, num_heads, n, head_dim); key, value: (batch, num_kv_heads, entries, head_dim).
        attention_mask: (batch or 1, 1, n, entries), True where a query sees an entry, or to be added; None where all
            see all that stands before them.

    Returns:
        (batch, n, num_heads, head_dim), and None for the weights.
    """
    batch, heads, n, width = query.shape
    groups, entries = key.shape[1], key.shape[2]
    bare = attention_mask is None and n > 1  # the causal mask is implied, and the fused kernel skips half of the work
    if n > _FEW_QUERIES or bare or dropout or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **options)
    rows = query.reshape(batch, groups, heads // groups * n, width) * (width**-0.5 if scaling is None else scaling)
    scores = (rows @ key.transpose(2, 3)).view(batch, groups, heads // groups, n, entries)
    if attention_mask is not None:
        mask = attention_mask[:, :, None]
        # not infinity: a row of padding sees nothing, and nan would spread from it
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).view(batch, groups, -1, entries)
    return (weights @ value).view(batch, heads, n, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
AttentionMaskInterface.register(GROUPED_ATTENTION, sdpa_mask)


def with_grouped_attention(model: PreTrainedModel) -> PreTrainedModel:
    """The same model (not a copy), attending by `grouped_attention`.

    Raises:
        UnsupportedModelError: its attention is more than a softmax (Gemma 2 caps the scores).
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"{model.config.model_type!r} caps its attention scores, which the grouped "
                                    "attention does not; leave the option out")
    model.set_attn_implementation(GROUPED_ATTENTION)
    return model


def with_int8_linears(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with its linear layers in int8: weights once, activations as they come (dynamic quantisation).

    **Different numerics**: greedy answers may differ (docs/speed.md says how often on the embedded model).

    Raises:
        UnsupportedModelError: the model is not on a CPU or not float32.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise UnsupportedModelError(f"int8 linear layers need a float32 model on a CPU, got {model.dtype} on "
                                    f"{model.device}; load it with dtype=torch.float32 and device='cpu'")
    tree: Any = model
    head = tree.get_output_embeddings()
    if head is not None:  # tied to the embedding, which stays as it is
        head = copy.copy(head)
        head._parameters = dict(head._parameters)
        tree.set_output_embeddings(head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces torchao, whose int8 is slower without a compiler
        made: PreTrainedModel = quantize_dynamic(  # type: ignore[no-untyped-call]
            model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)
    return made


__all__ = ["GROUPED_ATTENTION", "grouped_attention", "with_grouped_attention", "with_int8_linears"]
