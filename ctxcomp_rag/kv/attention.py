"""What tokens attend to, seen from outside: queries come from hooks, masses are computed from queries and keys.

The model's attention implementation stays what it is (sdpa gives no weights, eager needs the whole matrix), and the
full matrix never exists: a few hundred queries at a time meet all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ctxcomp_rag.errors import UnsupportedModelError
from ctxcomp_rag.kv.scores import Reading, Reduce

Observer: TypeAlias = Callable[[int, Tensor], None]
"""Called with (layer, queries (num_heads, n, head_dim) as they meet the keys) when a layer's attention is done."""

_BLOCK_QUERIES = 256
_CHECK_TOKENS = 12


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of a decoder, by layer."""
    found = {int(m.layer_idx): m for m in model.modules() if hasattr(m, "layer_idx") and _query_source(m) is not None}  # type: ignore[arg-type]
    return [found[i] for i in sorted(found)]


def _query_source(attention: nn.Module) -> nn.Module | None:
    # the last step before the rotation: the norm where queries are normed, else the projection
    for name in ("q_norm", "q_proj", "qkv_proj"):
        source = getattr(attention, name, None)
        if isinstance(source, nn.Module):
            return source
    return None


@contextmanager
def observed_queries(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """While the context is open, every forward pass of `model` (batch of one) reports its queries.

    The hooks are removed on leaving, whatever happened. They see every thread that uses these modules, so `model`
    must not be the tree that others decode with: `Backbone.second_tree()` has the same weights and is one's own.
    """
    handles: list[Any] = []
    try:
        for attention in attention_layers(model):
            watcher = _Watcher(attention, model.config.get_text_config(), observer)
            source = _query_source(attention)
            assert source is not None
            handles += [attention.register_forward_pre_hook(watcher.before, with_kwargs=True),
                        source.register_forward_hook(watcher.raw),
                        attention.register_forward_hook(watcher.after)]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observed_inputs(model: PreTrainedModel, observer: Callable[[int, Reading], None]) -> Iterator[None]:
    """While the context is open, every forward pass of `model` reports what its attention modules are given.

    Called with (layer, reading) when a layer's attention begins; else as `observed_queries`.
    """
    handles: list[Any] = []
    rotary = next((m for n, m in model.named_modules() if n.split(".")[-1] == "rotary_emb"), None)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        rotation = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
        observer(int(module.layer_idx), Reading(module, rotary, hidden, rotation))  # type: ignore[arg-type]

    try:
        for attention in attention_layers(model):
            handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watcher:
    """Follows one attention module through one forward pass."""

    def __init__(self, attention: nn.Module, config: Any, observer: Observer) -> None:
        self.layer = int(attention.layer_idx)  # type: ignore[arg-type]
        self.num_heads = int(config.num_attention_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.observer = observer
        self.rotation: tuple[Tensor, Tensor] | None = None
        self.queries: Tensor | None = None

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rotation = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)

    def raw(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        # a fused projection gives queries, keys and values side by side, queries first
        flat = output.reshape(*output.shape[:2], -1)[..., : self.num_heads * self.head_dim]
        self.queries = flat.reshape(-1, self.num_heads, self.head_dim).transpose(0, 1)

    def after(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        assert self.queries is not None
        queries = _rotated(self.queries, *self.rotation) if self.rotation is not None else self.queries
        self.queries = self.rotation = None
        self.observer(self.layer, queries)


def _rotated(queries: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dim, half = cos.shape[-1], cos.shape[-1] // 2
    turned, rest = queries[..., :dim], queries[..., dim:]
    swapped = torch.cat([-turned[..., half:], turned[..., :half]], dim=-1)
    return torch.cat([turned * cos[0] + swapped * sin[0], rest], dim=-1)


def scaling_of(attention: nn.Module) -> float:
    """Factor on the product of query and key."""
    scaling = getattr(attention, "scaling", None)
    return float(scaling if scaling is not None else attention.head_dim**-0.5)  # type: ignore[operator]


def softcap_of(attention: nn.Module) -> float | None:
    """Bound that the products are squashed to before the softmax (Gemma 2); None without one."""
    cap = getattr(attention, "attn_logit_softcapping", None)
    return None if cap is None else float(cap)


def attention_weights(queries: Tensor, keys: Tensor, scaling: float, first: int,
                      softcap: float | None = None) -> Tensor:
    """Softmax weights (num_kv_heads, group, q, n) in float32; query i stands at entry `first + i` and sees up to it."""
    heads, q, dim = queries.shape
    kv_heads, n = keys.shape[:2]
    products = queries.reshape(kv_heads, heads // kv_heads, q, dim) @ keys[:, None].transpose(-1, -2)
    products = products.float() * scaling
    if softcap is not None:
        products = softcap * (products / softcap).tanh()
    ahead = torch.arange(n, device=keys.device) > torch.arange(first, first + q, device=keys.device)[:, None]
    return products.masked_fill(ahead, -torch.inf).softmax(dim=-1)


def attention_mass(queries: Tensor, keys: Tensor, scaling: float, reduce: Reduce,
                   softcap: float | None = None) -> Tensor:
    """Mass (num_kv_heads, n) that the last tokens put on every entry.

    Args:
        queries: (num_heads, q, head_dim) of the last q entries.
        keys: (num_kv_heads, n, head_dim) of all entries, theirs included.
        reduce: over the queries and over the query heads that share a kv head.
    """
    q, n = queries.shape[1], keys.shape[1]
    total = torch.zeros(keys.shape[:2], device=keys.device)
    for begin in range(0, q, _BLOCK_QUERIES):
        block = queries[:, begin : begin + _BLOCK_QUERIES]
        weights = attention_weights(block, keys, scaling, n - q + begin, softcap)
        total = torch.maximum(total, weights.amax((1, 2))) if reduce == "max" else total + weights.sum((1, 2))
    return total / (q * queries.shape[0] // keys.shape[0]) if reduce == "mean" else total


def require_observable(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError unless the queries that the hooks see explain the model's own attention.

    Architectures differ in ways that no name tells (gates, norms after the rotation, caps on the products), and
    masses computed from the wrong queries would only show as bad answers; so the model is asked once.
    """
    config = model.config.get_text_config()
    layers = attention_layers(model)
    outputs = [next((m for n in ("o_proj", "out_proj", "dense") if isinstance(m := getattr(a, n, None), nn.Module)),
                    None) for a in layers]
    if len(layers) != config.num_hidden_layers or None in outputs:
        raise UnsupportedModelError(f"the attention modules of {config.model_type!r} are not built of query, key, "
                                    "value and output projections that are known here, so what it attends to cannot "
                                    "be observed. Use a scoring rule without attention (nuc, key_norm, streaming_llm)")
    ids = torch.arange(_CHECK_TOKENS, device=model.device)[None] % int(config.vocab_size)
    cache: Any = DynamicCache(config=model.config)
    own: list[Tensor] = []
    queries: dict[int, Tensor] = {}
    handles = [m.register_forward_pre_hook(lambda _m, args: own.append(args[0][0].float()))
               for m in outputs if m is not None]
    try:
        with torch.no_grad(), observed_queries(model, queries.__setitem__):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    error = max(_explained(queries[i], cache.layers[i], a, own[i]) for i, a in enumerate(layers))
    if not error < 0.05:  # correct queries: 1e-6 in float32, 1e-2 in bfloat16
        raise UnsupportedModelError(f"attention of {config.model_type!r} computed from its queries and keys misses the "
                                    f"model's own by {error:.0%}, so it is no plain softmax attention. "
                                    "Use a scoring rule without attention (nuc, key_norm, streaming_llm)")


def _explained(queries: Tensor, layer: Any, attention: nn.Module, own: Tensor) -> float:
    weights = attention_weights(queries, layer.keys[0], scaling_of(attention), 0, softcap_of(attention))
    mixed = (weights @ layer.values[0].float()[:, None]).flatten(0, 1).transpose(0, 1).flatten(1)
    if mixed.shape != own.shape:
        return float("inf")
    return float((mixed - own).norm() / own.norm())


__all__ = ["Observer", "attention_layers", "attention_mass", "attention_weights", "observed_inputs",
           "observed_queries", "require_observable", "scaling_of", "softcap_of"]
