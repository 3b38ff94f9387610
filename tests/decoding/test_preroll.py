"""Pre-rolled spans: soft spans run through the decoder once, kept as keys and values."""

from __future__ import annotations

import pytest
import torch

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding import Blended, FrozenDecoder, Part, PrerolledSpans, TokenIds, blend_rolled, enclosed, preroll
from ctxcomp_rag.errors import InputError, UnsupportedModelError
from ctxcomp_rag.spans import SoftSpan, SpanSpec
from tests.tiny_models import FULL_ATTENTION_ROPE, tiny_backbone

QUESTION = TokenIds(tuple(range(40, 50)))
TOLERANCE = 2e-5


def soft_span(backbone: Backbone, seed: int = 0, slots: int = 5) -> SoftSpan:
    """Slots spread over 4 positions each."""
    embeds = torch.randn(slots, backbone.hidden_size, generator=torch.Generator().manual_seed(seed))
    return SoftSpan(f"{seed:032x}", 4 * slots, torch.arange(slots) * 4 + 3, 4 * slots, embeds)


def spec(backbone: Backbone, delimiters: bool = True) -> SpanSpec:
    rows = torch.randn(2, 1, backbone.hidden_size, generator=torch.Generator().manual_seed(9))
    around = {"before": rows[0], "after": rows[1]} if delimiters else {}
    return SpanSpec("soft", backbone.fingerprint, "test", "spread", around)


def prompt_of(*contents: list[Part]) -> list[Part]:
    """[text][content] for each of the contents, and the question."""
    return [*(part for content in contents for part in (TokenIds((3, 4, 5)), *content)), QUESTION]


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
@pytest.mark.parametrize("delimiters", [True, False])
def test_at_the_start_of_a_prompt_it_equals_the_soft_span(name: str, delimiters: bool) -> None:
    backbone = tiny_backbone(name)
    span, layout = soft_span(backbone), spec(backbone, delimiters)
    decoder = FrozenDecoder(backbone)
    expected = decoder.logits([*enclosed(span, layout), QUESTION])[-10:]
    torch.testing.assert_close(decoder.logits([preroll(span, layout, backbone), QUESTION]), expected,
                               atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
def test_anywhere_else_it_equals_one_pass_in_which_the_span_cannot_see_what_stands_before(name: str) -> None:
    backbone = tiny_backbone(name)
    span, layout = soft_span(backbone), spec(backbone)
    decoder = FrozenDecoder(backbone)
    before = TokenIds(tuple(range(6)))
    soft: list[Part] = [before, *enclosed(span, layout), QUESTION]
    run = decoder.splice(soft).runs[0]
    length = run.embeds.shape[0]  # type: ignore[union-attr]
    see = torch.ones(length, length, dtype=torch.bool).tril()
    see[6 : 6 + 7, :6] = False  # five slots and two delimiters
    mask = torch.zeros(1, 1, length, length).masked_fill(~see, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        expected = backbone.model(inputs_embeds=run.embeds[None], position_ids=run.positions[None],  # type: ignore[union-attr]
                                  attention_mask=mask).logits[0, -10:]
    got = decoder.logits([before, preroll(span, layout, backbone), QUESTION])[-10:]
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
@pytest.mark.parametrize("delimiters", [True, False])
def test_with_all_slots_computed_anew_they_are_the_soft_spans(name: str, delimiters: bool) -> None:
    backbone = tiny_backbone(name)
    first, second, layout = soft_span(backbone, 1), soft_span(backbone, 2), spec(backbone, delimiters)
    decoder = FrozenDecoder(backbone)
    expected = decoder.logits(prompt_of(*(enclosed(s, layout) for s in (first, second))))[-10:]
    got, rolled = (
        decoder.logits(prompt_of(*([blend_rolled(preroll(s, layout, backbone), s, layout, backbone, fraction)]
                                   for s in (first, second))))[-10:] for fraction in (1.0, 0.0))
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    assert (rolled - expected).abs().max() > 1e-3


def test_with_no_slot_computed_anew_they_are_independent() -> None:
    backbone = tiny_backbone("llama")
    span, layout, decoder = soft_span(backbone), spec(backbone), FrozenDecoder(backbone)
    cache = PrerolledSpans(backbone, layout, 2**20)
    assert decoder.logits(prompt_of([cache.blended(span, 0.0)])).equal(decoder.logits(prompt_of([cache.get(span)])))
    assert (cache.misses, cache.hits) == (1, 1)


def test_other_rows_than_those_it_was_rolled_from_are_refused() -> None:
    backbone = tiny_backbone("llama")
    rolled = preroll(soft_span(backbone), spec(backbone), backbone)
    with pytest.raises(InputError, match=r"has 7 slots, so it is blended from rows of shape \(7, 32\), got \(5, 32\)"):
        FrozenDecoder(backbone).logits(prompt_of([Blended(rolled, torch.zeros(5, backbone.hidden_size), 0.5)]))


def test_a_kv_span_comes_back_unchanged() -> None:
    backbone = tiny_backbone("llama")
    rolled = preroll(soft_span(backbone), spec(backbone), backbone)
    assert preroll(rolled, spec(backbone, delimiters=False), backbone) is rolled


def test_a_sliding_window_model_is_refused_with_the_reason() -> None:
    backbone = tiny_backbone("gemma2")
    with pytest.raises(UnsupportedModelError, match="sliding-window layers"):
        preroll(soft_span(backbone), spec(backbone), backbone)


def test_hot_spans_stay_within_their_bytes_and_rare_ones_do_not_wash_them_out() -> None:
    backbone = tiny_backbone("llama")
    size = preroll(soft_span(backbone), spec(backbone), backbone).nbytes
    hot = PrerolledSpans(backbone, spec(backbone), max_bytes=2 * size)
    for _ in range(3):
        hot.get(soft_span(backbone, 1))
    for rare in range(2, 12):
        hot.get(soft_span(backbone, rare))
        assert hot.nbytes <= 2 * size
    before = hot.hits
    again = hot.get(soft_span(backbone, 1))
    assert (hot.hits, hot.misses) == (before + 1, 11)
    assert torch.equal(again.keys, preroll(soft_span(backbone, 1), spec(backbone), backbone).keys)


def test_where_room_is_short_a_span_is_kept_from_its_second_request_on() -> None:
    backbone = tiny_backbone("llama")
    size = preroll(soft_span(backbone), spec(backbone), backbone).nbytes
    hot = PrerolledSpans(backbone, spec(backbone), max_bytes=size)
    hot.get(soft_span(backbone, 1))
    hot.get(soft_span(backbone, 2))
    assert soft_span(backbone, 1) in hot
    hot.get(soft_span(backbone, 2))
    assert soft_span(backbone, 2) in hot
    assert soft_span(backbone, 1) not in hot


def test_the_same_chunk_at_another_factor_is_another_span() -> None:
    backbone = tiny_backbone("llama")
    hot = PrerolledSpans(backbone, spec(backbone), max_bytes=10**6)
    assert hot.get(soft_span(backbone, 1, slots=5)).num_slots != hot.get(soft_span(backbone, 1, slots=3)).num_slots


def test_a_span_larger_than_the_cache_is_made_and_not_kept() -> None:
    backbone = tiny_backbone("llama")
    hot = PrerolledSpans(backbone, spec(backbone), max_bytes=1)
    assert hot.get(soft_span(backbone)).num_slots == 7
    assert hot.nbytes == 0


def test_no_bytes_at_all_are_refused() -> None:
    backbone = tiny_backbone("llama")
    with pytest.raises(InputError, match="at least 1 byte for pre-rolled spans, got 0"):
        PrerolledSpans(backbone, spec(backbone), max_bytes=0)
