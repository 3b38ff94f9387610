"""The splice against plain prompts, on every architecture (DESIGN oracles 1, 2, 3, 5, 6). No trained weights needed."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ctxcomp_rag.backbone import Backbone, weights_digest
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, Part, TokenIds
from ctxcomp_rag.decoding.batching import DecodingState, all_logits, prefill, read_in_turn, step
from ctxcomp_rag.errors import IncompatibleSpanError, InputError, UnsupportedModelError
from ctxcomp_rag.spans import KVSpan, SoftSpan
from tests.tiny_models import ARCHITECTURES, FULL_ATTENTION_ROPE, MAX_POSITIONS, tiny_backbone

IDS = tuple(torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(3)).tolist())
TOLERANCE = 2e-5


def plain_logits(backbone: Backbone, ids: tuple[int, ...] = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return backbone.model(torch.tensor([ids])).logits[0]


def soft(backbone: Backbone, ids: tuple[int, ...]) -> SoftSpan:
    return SoftSpan("soft", len(ids), torch.arange(len(ids)), len(ids), backbone.embed(torch.tensor(ids)))


def kv(backbone: Backbone, ids: tuple[int, ...]) -> KVSpan:
    """The cache of a text prefilled alone at position 0, every token kept."""
    cache = DynamicCache(config=backbone.model.config)
    with torch.inference_mode():
        backbone.model(torch.tensor([ids]), past_key_values=cache)
    keys, values = (torch.stack([getattr(layer, n)[0] for layer in cache.layers]) for n in ("keys", "values"))
    return KVSpan("kv", len(ids), torch.arange(len(ids)), len(ids), keys, values)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_soft_span_of_the_texts_own_embeddings_gives_the_logits_of_the_plain_prompt(name: str) -> None:
    backbone = tiny_backbone(name)
    parts: list[Part] = [TokenIds(IDS[:5]), soft(backbone, IDS[5:12]), TokenIds(IDS[12:15]),
                         soft(backbone, IDS[15:20]), TokenIds(IDS[20:])]
    torch.testing.assert_close(FrozenDecoder(backbone).logits(parts), plain_logits(backbone), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [*FULL_ATTENTION_ROPE, "gpt2"])
def test_a_kv_span_that_keeps_every_token_gives_the_logits_of_the_plain_prompt(name: str) -> None:
    backbone = tiny_backbone(name)
    parts: list[Part] = [kv(backbone, IDS[:10]), TokenIds(IDS[10:])]
    torch.testing.assert_close(FrozenDecoder(backbone).logits(parts), plain_logits(backbone)[10:], atol=TOLERANCE,
                               rtol=0)


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
def test_spans_after_text_are_the_chunk_prefilled_alone_at_its_place(name: str) -> None:
    """[text][KV span][text] equals one forward pass in which the span's tokens cannot see the first text."""
    backbone = tiny_backbone(name)
    before, middle = 6, 9
    parts: list[Part] = [TokenIds(IDS[:before]), kv(backbone, IDS[before : before + middle]),
                         TokenIds(IDS[before + middle :])]
    see = torch.ones(len(IDS), len(IDS), dtype=torch.bool).tril()
    see[before : before + middle, :before] = False
    mask = torch.zeros(1, 1, len(IDS), len(IDS)).masked_fill(~see, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        expected = backbone.model(torch.tensor([IDS]), attention_mask=mask).logits[0]
    got = FrozenDecoder(backbone).logits(parts)
    torch.testing.assert_close(got, torch.cat([expected[:before], expected[before + middle :]]), atol=TOLERANCE, rtol=0)


def between_spans(backbone: Backbone) -> list[Part]:
    """[text][KV span][line break][KV span][soft span][text][KV span][text]."""
    return [TokenIds(IDS[:3]), kv(backbone, IDS[3:8]), TokenIds((7,)), kv(backbone, IDS[8:12]),
            soft(backbone, IDS[12:15]), TokenIds(IDS[15:17]), kv(backbone, IDS[17:20]), TokenIds(IDS[20:])]


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
def test_text_between_kv_spans_is_read_in_one_pass_as_it_would_be_in_turn(name: str) -> None:
    backbone = tiny_backbone(name)
    prompt = FrozenDecoder(backbone).splice(between_spans(backbone))
    passes: list[int] = []
    with torch.inference_mode():
        in_turn, _ = read_in_turn(prompt, backbone, keep_all=True)
        counted = backbone.model.register_forward_hook(lambda *_: passes.append(1))
        state = prefill([prompt], backbone)
        counted.remove()
    assert passes == [1]
    torch.testing.assert_close(all_logits(prompt, backbone), in_turn, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(state.logits[0], in_turn[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
def test_after_it_the_answer_goes_on_as_after_reading_in_turn(name: str) -> None:
    backbone = tiny_backbone(name)
    prompt = FrozenDecoder(backbone).splice(between_spans(backbone))
    with torch.inference_mode():
        logits, cache = read_in_turn(prompt, backbone, keep_all=True)
        state = DecodingState(logits[-1:], cache, torch.ones(1, prompt.length, dtype=torch.long),
                              torch.tensor([prompt.next_position]))
        expected = [int(state.logits.argmax())]
        for _ in range(7):
            step(state, expected[-1:], backbone)
            expected.append(int(state.logits.argmax()))
    got = FrozenDecoder(backbone, end_ids=[-1]).generate(between_spans(backbone), GenerationSettings(max_new_tokens=8))
    assert list(got.token_ids) == expected


def test_spread_slots_stand_at_their_places_and_the_text_goes_on_where_the_source_would_have_ended() -> None:
    backbone = tiny_backbone("llama")
    span = SoftSpan("s", 8, torch.tensor([1, 3, 5, 7]), 8, backbone.embed(torch.tensor(IDS[:4])))
    prompt = FrozenDecoder(backbone).splice([TokenIds(IDS[:3]), span, TokenIds(IDS[3:5])])
    (run,) = prompt.runs
    assert run.positions.tolist() == [0, 1, 2, 4, 6, 8, 10, 11, 12]  # type: ignore[union-attr]
    assert prompt.next_position == 13


def test_positions_with_gaps_are_not_taken_for_packed_sequences() -> None:
    """Without a mask transformers would cut attention at every gap; the first token must still matter."""
    backbone = tiny_backbone("llama")
    span = SoftSpan("s", 8, torch.tensor([3, 7]), 8, backbone.embed(torch.tensor(IDS[:2])))
    decoder = FrozenDecoder(backbone)
    one, other = (decoder.logits([TokenIds((first,)), span, TokenIds(IDS[5:7])])[-1] for first in (1, 2))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_kv_spans_are_refused_where_layers_forget_keys(name: str) -> None:
    backbone = tiny_backbone(name)
    n = 3
    shape = (backbone.config.num_hidden_layers, backbone.num_kv_heads, n, backbone.head_dim)
    span = KVSpan("kv", n, torch.arange(n), n, torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(UnsupportedModelError, match="sliding-window layers"):
        FrozenDecoder(backbone).logits([span, TokenIds(IDS)])


def test_a_kv_span_cannot_be_moved_on_learned_positions() -> None:
    backbone = tiny_backbone("gpt2")
    with pytest.raises(UnsupportedModelError, match="no rotary embedding"):
        FrozenDecoder(backbone).logits([TokenIds(IDS[:2]), kv(backbone, IDS[2:6]), TokenIds(IDS[6:])])


def mixed_prompts(backbone: Backbone, *, with_kv: bool) -> list[list[Part]]:
    prompts: list[list[Part]] = [
        [TokenIds(IDS[:3]), soft(backbone, IDS[3:9]), "and then"],
        ["a much longer prompt without any span in it"],
        [soft(backbone, IDS[:2]), "x", soft(backbone, IDS[2:4]), "?"],
    ]
    if with_kv:
        prompts.append(["a", kv(backbone, IDS[4:12]), "b", soft(backbone, IDS[:3]), kv(backbone, IDS[:5]), "c"])
    return prompts


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_batch_of_mixed_lengths_equals_one_at_a_time_and_changes_no_parameter(name: str, temperature: float) -> None:
    backbone = tiny_backbone(name)
    decoder = FrozenDecoder(backbone)
    before = weights_digest(backbone.model)
    settings = GenerationSettings(max_new_tokens=10, temperature=temperature, top_p=0.95, seed=5)
    prompts = mixed_prompts(backbone, with_kv=name in FULL_ATTENTION_ROPE)
    together = decoder.batch(prompts, settings)
    alone = [decoder.generate(p, settings) for p in prompts]
    assert together == alone
    assert weights_digest(backbone.model) == before


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_text_equals_transformers_generate(name: str) -> None:
    backbone = tiny_backbone(name)
    with torch.inference_mode():
        expected = backbone.model.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False)[0, len(IDS):]
    made = FrozenDecoder(backbone).generate([TokenIds(IDS)], GenerationSettings(max_new_tokens=12))
    end = backbone.tokenizer.hf.eos_token_id
    assert list(made.token_ids) == [t for t in expected.tolist() if t != end]


def test_usage_counts_text_slots_and_the_source_tokens_the_slots_stand_for() -> None:
    backbone = tiny_backbone("llama")
    span = SoftSpan("s", 12, torch.tensor([3, 7, 11]), 12, backbone.embed(torch.tensor(IDS[:3])))
    usage = FrozenDecoder(backbone).generate([TokenIds(IDS[:4]), span, TokenIds(IDS[4:6])],
                                             GenerationSettings(max_new_tokens=1)).usage
    assert (usage.text_tokens, usage.slots, usage.source_tokens, usage.positions) == (6, 3, 12, 9)


def test_a_prompt_must_end_with_something_to_compute_from() -> None:
    backbone = tiny_backbone("llama")
    for parts in ([], [kv(backbone, IDS[:4])]):
        with pytest.raises(InputError, match="must end with text or a soft span"):
            FrozenDecoder(backbone).splice(parts)


def test_text_longer_than_the_decoders_window_is_refused_with_the_next_step() -> None:
    with pytest.raises(InputError, match=rf"needs {MAX_POSITIONS + 1} positions.*made for {MAX_POSITIONS}.*--top-k"):
        FrozenDecoder(tiny_backbone("llama")).splice([TokenIds((1,) * (MAX_POSITIONS + 1))])


def test_spans_of_other_sizes_are_refused_with_both_sizes() -> None:
    decoder = FrozenDecoder(tiny_backbone("llama"))
    wide = SoftSpan("w", 2, torch.arange(2), 2, torch.zeros(2, 48))
    with pytest.raises(IncompatibleSpanError, match=r"rows of size 48.*reads rows of size 32"):
        decoder.splice([wide, "x"])
    deep = KVSpan("d", 2, torch.arange(2), 2, torch.zeros(3, 2, 2, 8), torch.zeros(3, 2, 2, 8))
    with pytest.raises(IncompatibleSpanError, match=r"\(3, 2, 2, 8\).*reads \(2, 2, 2, 8\)"):
        decoder.splice([deep, "x"])
