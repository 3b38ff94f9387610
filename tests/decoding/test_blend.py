"""KV spans of neighbours made to see each other: equal to one token after the other, and to the full prefill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from ctxcomp_rag.backbone import Backbone, weights_digest
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor, InfiniPotConfig
from ctxcomp_rag.decoding import Blended, FrozenDecoder, GenerationSettings, Part, TokenIds
from ctxcomp_rag.errors import InputError, UnsupportedModelError
from ctxcomp_rag.kv.scores import NuC
from ctxcomp_rag.rope import rotate_keys
from ctxcomp_rag.spans import KVSpan
from tests.tiny_models import FULL_ATTENTION_ROPE, tiny_backbone, tiny_config, tiny_model

IDS = tuple(torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(8)).tolist())
HEAD, FIRST, SECOND, QUESTION = IDS[:5], IDS[5:25], IDS[25:48], IDS[48:]


def prefilled(backbone: Backbone, ids: tuple[int, ...]) -> Any:
    cache = DynamicCache(config=backbone.model.config)
    with torch.inference_mode():
        backbone.model(torch.tensor([ids]), past_key_values=cache)
    return cache


def kv(backbone: Backbone, ids: tuple[int, ...]) -> KVSpan:
    cache = prefilled(backbone, ids)
    keys, values = (torch.stack([getattr(layer, n)[0] for layer in cache.layers]) for n in ("keys", "values"))
    return KVSpan("kv", len(ids), torch.arange(len(ids)), len(ids), keys, values)


def prompt(backbone: Backbone, fraction: float | None) -> list[Part]:
    """[text][span][span][text]; `None` is the spans as they are."""
    spans: list[Part] = [span if fraction is None else Blended(span, TokenIds(ids), fraction)
                         for ids in (FIRST, SECOND) for span in [kv(backbone, ids)]]
    return [TokenIds(HEAD), *spans, TokenIds(QUESTION)]


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
def test_all_slots_computed_anew_are_the_full_prefill(name: str) -> None:
    backbone = tiny_backbone(name)
    with torch.inference_mode():
        plain = backbone.model(torch.tensor([IDS])).logits[0, -len(QUESTION) :]
    got = FrozenDecoder(backbone).logits(prompt(backbone, 1.0))[len(HEAD) :]
    torch.testing.assert_close(got, plain, atol=1e-4, rtol=0)


def test_none_computed_anew_are_the_independent_spans() -> None:
    backbone = tiny_backbone("llama")
    decoder = FrozenDecoder(backbone)
    assert decoder.logits(prompt(backbone, 0.0)).equal(decoder.logits(prompt(backbone, None)))


def one_after_the_other(backbone: Backbone, fraction: float) -> Tensor:
    """The same prompt slot by slot: a slot is either taken from its span or read as the token it stands for."""
    cache: Any = DynamicCache(config=backbone.model.config)
    layers = range(backbone.config.num_hidden_layers)
    full = prefilled(backbone, HEAD)
    for layer in layers:
        cache.update(full.layers[layer].keys, full.layers[layer].values, layer)
    at = len(HEAD)
    for ids in (FIRST, SECOND):
        span = kv(backbone, ids)
        keys = rotate_keys(span.keys, at, backbone.rope)
        with torch.inference_mode():
            probe: Any = DynamicCache(config=backbone.model.config)
            for layer in layers:
                probe.update(cache.layers[layer].keys, cache.layers[layer].values, layer)
            backbone.model(torch.tensor([ids]), past_key_values=probe)  # the whole model, where two layers would do
            missed = (probe.layers[1].keys[0, :, at:] - keys[1]).pow(2).sum((0, 2)).tolist()
            count = -(-int(fraction * 100) * len(ids) // 100)
            anew = sorted(range(len(ids)), key=lambda i: -missed[i])[:count]
            for slot, token in enumerate(ids):
                if slot in anew:
                    backbone.model(torch.tensor([[token]]), position_ids=torch.tensor([[at + slot]]),
                                   past_key_values=cache)
                else:
                    for layer in layers:
                        cache.update(keys[layer, :, slot][None, :, None], span.values[layer, :, slot][None, :, None],
                                     layer)
        at += len(ids)
    with torch.inference_mode():
        logits: Tensor = backbone.model(torch.tensor([QUESTION]), past_key_values=cache).logits[0]
    return logits


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.5, 0.9])
def test_some_computed_anew_equal_one_slot_after_the_other(name: str, fraction: float) -> None:
    backbone = tiny_backbone(name)
    got = FrozenDecoder(backbone).logits(prompt(backbone, fraction))[len(HEAD) :]
    torch.testing.assert_close(got, one_after_the_other(backbone, fraction), atol=1e-4, rtol=0)
    assert (got - FrozenDecoder(backbone).logits(prompt(backbone, None))[len(HEAD) :]).abs().max() > 1e-3


def test_a_span_with_nothing_before_it_is_what_it_is() -> None:
    backbone = tiny_backbone("llama")
    decoder = FrozenDecoder(backbone)
    span = kv(backbone, FIRST)
    assert decoder.logits([Blended(span, TokenIds(FIRST), 0.5), "x"]).equal(decoder.logits([span, "x"]))


def test_a_model_of_many_layers_is_probed_with_its_first_two_only() -> None:
    backbone = Backbone(tiny_model(tiny_config("llama", num_hidden_layers=4)), None, model_id="four-layers")
    assert len(backbone.first_layers.base_model.layers) == 2
    before = weights_digest(backbone.model)
    got = FrozenDecoder(backbone).logits(prompt(backbone, 0.4))[len(HEAD) :]
    torch.testing.assert_close(got, one_after_the_other(backbone, 0.4), atol=1e-4, rtol=0)
    parts = prompt(backbone, 0.5)
    passes: list[int] = []
    hook = backbone.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: passes.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True)
    try:
        FrozenDecoder(backbone).logits(parts)
    finally:
        hook.remove()
    assert passes == [len(HEAD), 10, 12, len(QUESTION)]
    assert weights_digest(backbone.model) == before


def test_a_batch_of_blended_and_plain_prompts_equals_one_at_a_time() -> None:
    backbone = tiny_backbone("qwen3")
    decoder, settings = FrozenDecoder(backbone), GenerationSettings(8)
    prompts = [prompt(backbone, 0.3), ["plain"], prompt(backbone, None)]
    assert decoder.batch(prompts, settings) == [decoder.generate(p, settings) for p in prompts]


TEXT = "The lighthouse of Varn was built in 1871. It is 31 metres high and its stairs are red."


def span_of(backbone: Backbone, config: InfiniPotConfig) -> KVSpan:
    compressor = InfiniPotCompressor(backbone, config)
    [span] = compressor.compress([Chunk("d", TEXT, 0, len(TEXT), len(backbone.tokenizer.encode(TEXT)))])
    return span


def test_where_heads_agree_all_slots_computed_anew_are_the_prefill_of_the_kept_tokens() -> None:
    backbone = tiny_backbone("llama")
    span = span_of(backbone, InfiniPotConfig(rule=NuC()))
    ids = backbone.tokenizer.encode(TEXT)
    assert span.kept is not None
    kept = [ids[i] for i in span.kept[0, 0].tolist()]
    assert 5 < len(kept) < len(ids) / 2
    decoder = FrozenDecoder(backbone)
    blended = decoder.logits(["Hear this: ", Blended(span, TEXT, 1.0), "x"])
    plain = decoder.logits(["Hear this: ", TokenIds(tuple(kept)), "x"])
    torch.testing.assert_close(blended[-1], plain[-1], atol=1e-4, rtol=0)


def test_what_cannot_be_blended_is_refused_with_the_reason() -> None:
    backbone = tiny_backbone("llama")
    decoder = FrozenDecoder(backbone)
    span = span_of(backbone, InfiniPotConfig())
    with pytest.raises(InputError, match=r"hold different tokens in different heads.*Keep every token"):
        decoder.splice(["x", Blended(span, TEXT, 0.2), "y"])
    with pytest.raises(InputError, match=r"made from \d+ tokens, the source given to blend it has \d+"):
        decoder.splice(["x", Blended(span, TEXT + TEXT, 0.2), "y"])
    with pytest.raises(InputError, match=r"goes from 0 to 1, got 1\.5"):
        Blended(span, TEXT, 1.5)
    sliding = tiny_backbone("gemma2")
    zeros = torch.zeros(2, 2, 3, 8)
    with pytest.raises(UnsupportedModelError, match="sliding-window layers"):
        FrozenDecoder(sliding).splice(["x", Blended(KVSpan("g", 3, torch.arange(3), 3, zeros, zeros),
                                                    TokenIds((1, 2, 3)), 0.5), "y"])
