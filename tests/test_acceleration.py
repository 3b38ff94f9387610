"""Attention without repeated keys equals sdpa; int8 is another decoder with the same fingerprint."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ctxcomp_rag.acceleration import GROUPED_ATTENTION, grouped_attention
from ctxcomp_rag.backbone import Backbone, load_frozen
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, Part, Text, TokenIds, preroll
from ctxcomp_rag.errors import UnsupportedModelError
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.spans import SoftSpan, SpanSpec
from tests.tiny_models import ARCHITECTURES, tiny_backbone, tiny_config, tiny_model, tiny_tokenizer

WITHOUT_CAP = [name for name in ARCHITECTURES if name != "gemma2"]


class Heads(torch.nn.Module):
    """What the attention asks of the module it works for."""

    num_key_value_groups = 3
    is_causal = True


@pytest.mark.parametrize("queries", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("masked", ["no", "bool", "float", "rows"])
def test_it_equals_sdpa(queries: int, masked: str) -> None:
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn(2, 6, queries, 8, generator=generator)
    entries = queries if masked == "no" and queries > 1 else 80  # without a mask, many queries are a whole prompt
    key, value = (torch.randn(2, 2, entries, 8, generator=generator) for _ in range(2))
    see = torch.ones(queries, entries, dtype=torch.bool).tril(entries - queries)[None, None]
    if masked == "rows":  # left padding of one row
        see = see.repeat(2, 1, 1, 1)
        see[1, :, :, :9] = False
    mask = {"no": None, "bool": see, "rows": see,
            "float": torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)}[masked]
    expected = sdpa_attention_forward(Heads(), query, key, value, mask, scaling=0.3)[0]
    torch.testing.assert_close(grouped_attention(Heads(), query, key, value, mask, scaling=0.3)[0], expected,
                               atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", WITHOUT_CAP)
def test_a_decoder_with_it_gives_the_same_logits_and_answers(name: str) -> None:
    backbone = tiny_backbone(name)
    prompt = [TokenIds(tuple(range(30)))]
    plain, fast = FrozenDecoder(backbone), FrozenDecoder(backbone.accelerated())
    assert fast.backbone.model.config._attn_implementation == GROUPED_ATTENTION
    torch.testing.assert_close(fast.logits(prompt), plain.logits(prompt), atol=2e-5, rtol=0)
    prompts = [[TokenIds(tuple(range(n)))] for n in (3, 17, 30)]  # left-padded
    settings = GenerationSettings(max_new_tokens=12)
    assert [g.token_ids for g in fast.batch(prompts, settings)] == [g.token_ids for g in plain.batch(prompts, settings)]


def test_it_reads_cached_spans_alike() -> None:
    backbone = tiny_backbone("llama")
    span = SoftSpan("s", 8, torch.arange(8), 8, torch.randn(8, 32, generator=torch.Generator().manual_seed(1)))
    rolled = preroll(span, SpanSpec("soft", backbone.fingerprint, "test"), backbone)
    prompt: list[Part] = [TokenIds((1, 2)), rolled, TokenIds((3, 4, 5)), rolled, TokenIds((6, 7))]
    torch.testing.assert_close(FrozenDecoder(backbone.accelerated()).logits(prompt),
                               FrozenDecoder(backbone).logits(prompt), atol=2e-5, rtol=0)


def test_the_original_stays_as_it_was_and_shares_its_weights() -> None:
    backbone = tiny_backbone("qwen2")
    fast = backbone.accelerated()
    assert backbone.model.config._attn_implementation == "sdpa"
    assert fast.model.get_input_embeddings().weight is backbone.model.get_input_embeddings().weight  # type: ignore[union-attr]
    assert fast.fingerprint == backbone.fingerprint


def test_capped_scores_are_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError, match="'gemma2' caps its attention scores"):
        tiny_backbone("gemma2").accelerated()


def test_int8_is_near_leaves_the_original_alone_and_keeps_the_fingerprint() -> None:
    backbone = load_frozen()
    prompt = [Text(generate_corpus(1, seed=3)[0].text)]
    expected = FrozenDecoder(backbone).logits(prompt)
    small = backbone.accelerated(int8=True)
    got = FrozenDecoder(small).logits(prompt)
    assert 0 < float((got - expected).norm() / expected.norm()) < 0.1
    assert torch.equal(FrozenDecoder(backbone).logits(prompt), expected)
    assert small.fingerprint == backbone.fingerprint


def test_int8_needs_float32() -> None:
    half = Backbone(tiny_model(tiny_config("llama")).to(torch.bfloat16), tiny_tokenizer(), model_id="half")
    with pytest.raises(UnsupportedModelError, match=r"need a float32 model on a CPU, got torch\.bfloat16"):
        half.accelerated(int8=True)
