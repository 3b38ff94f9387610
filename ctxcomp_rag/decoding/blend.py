"""Seams between KV spans: some slots computed anew, in sight of everything before them (CacheBlend, arXiv 2405.16444).

Which ones: the first two layers are run for all slots, and those are taken whose keys in the second layer are farthest
from the stored ones (in the first layer keys know nothing of what stands before them). The taken slots then go through
all layers in one pass, beside the stored entries of the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding.splice import BlendedRun, EmbeddedRun


def blend(run: BlendedRun, cache: DynamicCache, backbone: Backbone) -> None:
    """Append the entries of a blended run to the cache of everything before it, in their order."""
    layers: Any = cache.layers
    seen, n = int(layers[0].keys.shape[2]), run.fresh.embeds.shape[0]
    fresh = farthest(run, cache, backbone) if run.num_fresh < n else torch.arange(n, device=backbone.device)
    stored = torch.ones(n, dtype=torch.bool, device=fresh.device).index_fill(0, fresh, False).nonzero()[:, 0]
    for number in range(len(layers)):
        keys, values = run.cached.layer(number, backbone)
        cache.update(keys[None, :, stored], values[None, :, stored], number)
    order = torch.cat([stored, fresh])
    visible = torch.ones(len(fresh), seen + n, dtype=torch.bool, device=fresh.device)
    visible[:, seen:] = order <= fresh[:, None]
    backbone.model(inputs_embeds=run.fresh.embeds[fresh][None], position_ids=run.fresh.positions[fresh][None],
                   attention_mask=additive_mask(visible, backbone.dtype), past_key_values=cache, use_cache=True,
                   logits_to_keep=1)
    back = torch.cat([torch.arange(seen, device=order.device), order.argsort() + seen])
    for entry in layers:
        entry.keys, entry.values = entry.keys[:, :, back], entry.values[:, :, back]


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, rows, entries) to be added to attention scores, from (rows, entries), True where a row sees an entry."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]


def farthest(run: BlendedRun, cache: DynamicCache, backbone: Backbone) -> Tensor:
    """Slots (num_fresh,), in order, whose keys in the second layer are farthest from what they would be here."""
    model = backbone.first_layers
    depth = int(model.config.get_text_config().num_hidden_layers)
    probe: Any = DynamicCache()
    for number, layer in enumerate(list[Any](cache.layers)[:depth]):
        probe.update(layer.keys, layer.values, number)
    seen = int(probe.layers[0].keys.shape[2])
    rows: EmbeddedRun = run.fresh
    mask = torch.ones(1, seen + rows.embeds.shape[0], dtype=torch.long, device=backbone.device)
    body: Any = model.base_model
    body(inputs_embeds=rows.embeds[None], position_ids=rows.positions[None], attention_mask=mask,
         past_key_values=probe, use_cache=True)
    here = probe.layers[depth - 1].keys[0, :, seen:]
    missed: Tensor = (here.float() - run.cached.layer(depth - 1, backbone)[0].float()).pow(2).sum((0, 2))
    return missed.topk(run.num_fresh).indices.sort().values


__all__ = ["additive_mask", "blend", "farthest"]
