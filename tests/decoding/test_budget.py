"""Reading within a fixed cache: equal to the full cache while it fits, to a slow reference when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding import Blended, FrozenDecoder, GenerationSettings, Part, RequestScheduler, TokenIds
from ctxcomp_rag.decoding.budget import BoundedPrompt, CacheBudget
from ctxcomp_rag.decoding.splice import lay_out
from ctxcomp_rag.errors import InputError, UnsupportedModelError
from ctxcomp_rag.kv.catalyst import GENERIC_CATALYST, catalyst, question_catalyst
from ctxcomp_rag.kv.pot import ContextPot
from ctxcomp_rag.kv.scores import CaP
from ctxcomp_rag.spans import KVSpan, SoftSpan
from tests.slow_infinipot import SlowPot
from tests.tiny_models import FULL_ATTENTION_ROPE, MAX_POSITIONS, tiny_backbone

IDS = tuple(torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(5)).tolist())
BUDGET = 128


def soft(backbone: Backbone, ids: tuple[int, ...], *, every: int = 1) -> SoftSpan:
    places = torch.arange(every - 1, every * len(ids), every)
    return SoftSpan("soft", every * len(ids), places, every * len(ids), backbone.embed(torch.tensor(ids)))


def kv(backbone: Backbone, ids: tuple[int, ...]) -> KVSpan:
    cache: Any = DynamicCache(config=backbone.model.config)
    with torch.inference_mode():
        backbone.model(torch.tensor([ids]), past_key_values=cache)
    keys, values = (torch.stack([getattr(layer, n)[0] for layer in cache.layers]) for n in ("keys", "values"))
    return KVSpan("kv", len(ids), torch.arange(len(ids)), len(ids), keys, values)


def read(prompt: BoundedPrompt) -> Tensor:
    """Logits of all rows."""
    pieces: list[Tensor] = []
    with torch.inference_mode():
        prompt.prefill(pieces.append)
    return torch.cat(pieces)


def mixed(backbone: Backbone) -> list[Part]:
    return [TokenIds(IDS[:9]), kv(backbone, IDS[9:17]), "and", soft(backbone, IDS[17:22], every=3),
            TokenIds(IDS[30:55])]


# -- it fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
def test_while_the_input_fits_logits_are_those_of_the_full_cache(name: str) -> None:
    backbone = tiny_backbone(name)
    full, bounded = FrozenDecoder(backbone), FrozenDecoder(backbone, cache_budget=BUDGET)
    parts = mixed(backbone)
    assert bounded.logits(parts).equal(full.logits(parts))
    # the same where reading has to be ready to forget, because the answer may be long
    prompt = BoundedPrompt(lay_out(parts, backbone), CacheBudget(backbone, BUDGET))
    torch.testing.assert_close(read(prompt), full.logits(parts), atol=1e-4, rtol=0)


def test_an_answer_is_that_of_the_full_cache_until_the_cache_is_full() -> None:
    backbone = tiny_backbone("llama")
    parts = mixed(backbone)
    room = BUDGET - catalyst(backbone.tokenizer, GENERIC_CATALYST).length
    before = room - lay_out(parts, backbone).num_positions
    long = GenerationSettings(max_new_tokens=BUDGET, temperature=0.8, seed=4)
    free, bounded = (FrozenDecoder(backbone, cache_budget=b).generate(parts, long) for b in (None, BUDGET))
    assert before > 5
    assert bounded.token_ids[:before] == free.token_ids[:before]


# -- it does not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("question", [None, "How high is it?"])
def test_prompt_and_answer_beyond_the_budget_equal_the_slow_reference(name: str, question: str | None) -> None:
    backbone = tiny_backbone(name)
    tokenizer = backbone.tokenizer
    prompt = question_catalyst(tokenizer, question) if question else catalyst(tokenizer, GENERIC_CATALYST)
    room = BUDGET - prompt.length
    keep = room // 2
    slow = SlowPot(backbone, prompt, recent=keep // 8)
    answer: list[int] = []
    with torch.no_grad():
        for number in range(200 + 40):
            if slow.size == room:
                slow.distil(keep)
            if number >= 200:
                assert slow.logits is not None
                answer.append(int(slow.logits.argmax()))
            slow.read(IDS[number] if number < 200 else answer[-1])
    assert slow.held[0] != slow.held[1]
    decoder = FrozenDecoder(backbone, cache_budget=BUDGET)
    decoder.end_ids = frozenset()
    made = decoder.generate([TokenIds(IDS[:200])], GenerationSettings(40), question=question)
    assert list(made.token_ids) == answer
    read_all = decoder.logits([TokenIds((*IDS[:200], *answer))], question=question)
    assert slow.logits is not None
    torch.testing.assert_close(read_all[-1], slow.logits, atol=5e-4, rtol=0)
    assert read_all.shape[0] == 240


def test_a_question_keeps_what_it_asks_for() -> None:
    decoder = FrozenDecoder(tiny_backbone("llama"), cache_budget=BUDGET)
    prompt = [TokenIds(IDS)]
    assert not decoder.logits(prompt)[-1].equal(decoder.logits(prompt, question="How high is {it}?")[-1])


class CaPWithAllLogits(CaP):
    novelty: ClassVar[bool] = True


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_spans_of_the_texts_own_tokens_are_forgotten_as_the_text_is(name: str) -> None:
    """By the catalyst's attention alone: slots have no novelty. The KV span comes first, so it is the text's cache."""
    backbone = tiny_backbone(name)
    budget = CacheBudget(backbone, BUDGET, CaPWithAllLogits())
    parts: list[Part] = [kv(backbone, IDS[:40]), TokenIds(IDS[40:60]), soft(backbone, IDS[60:230]), TokenIds(IDS[230:])]
    plain = read(BoundedPrompt(lay_out([TokenIds(IDS)], backbone), budget))
    spliced = read(BoundedPrompt(lay_out(parts, backbone), budget))
    torch.testing.assert_close(spliced, plain[40:], atol=2e-4, rtol=0)


def test_slots_without_a_novelty_take_no_place_from_tokens_that_have_one() -> None:
    backbone = tiny_backbone("llama")
    budget = CacheBudget(backbone, BUDGET)
    prompt = BoundedPrompt(lay_out([TokenIds(IDS[:50]), soft(backbone, IDS[50:250]), TokenIds(IDS[:20])], backbone),
                           budget)
    read(prompt)
    novelty = prompt._pot.novelty
    assert bool(novelty.isneginf().any())
    assert bool(novelty.isfinite().any())


# -- bounds ----------------------------------------------------------------------------------------------------------


@contextmanager
def measured(decoder: FrozenDecoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[int], list[int]]]:
    """Lengths of the cache, and positions, that the decoder's passes come to."""
    lengths: list[int] = []
    positions: list[int] = []
    update = DynamicCache.update

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(self, *args, **kwargs)
        lengths.append(keys.shape[2])
        return keys, values

    assert decoder._budget is not None
    hook = decoder._budget._model.register_forward_pre_hook(
        lambda _m, _a, kwargs: positions.append(int(kwargs["position_ids"].max())), with_kwargs=True)
    monkeypatch.setattr(DynamicCache, "update", watched)
    try:
        yield lengths, positions
    finally:
        monkeypatch.undo()
        hook.remove()


@pytest.mark.parametrize("length", [130, 700, 2000])
def test_neither_entries_nor_positions_pass_the_budget_however_long_the_input(length: int,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = FrozenDecoder(tiny_backbone("llama"), cache_budget=BUDGET)
    decoder.end_ids = frozenset()
    assert length < BUDGET + 3 or length > MAX_POSITIONS
    with measured(decoder, monkeypatch) as (lengths, positions):
        made = decoder.generate([TokenIds((IDS * 8)[:length])], GenerationSettings(90))
    assert made.completion_tokens == 90
    assert made.usage.text_tokens == length
    assert max(lengths) <= BUDGET
    assert max(positions) < BUDGET


def test_spans_larger_than_the_cache_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("qwen2")
    decoder = FrozenDecoder(backbone, cache_budget=BUDGET)
    apart = SoftSpan("apart", 900, torch.tensor([0, 1, 400, 899]), 900, backbone.embed(torch.tensor(IDS[:4])))
    parts: list[Part] = ["a", kv(backbone, IDS), "b", soft(backbone, IDS[:90], every=4), apart, "c"]
    with measured(decoder, monkeypatch) as (lengths, positions):
        logits = decoder.logits(parts)
    assert logits.shape[0] == 3 + 90 + 4
    assert bool(logits.isfinite().all())
    assert max(lengths) <= BUDGET
    assert max(positions) < BUDGET


# -- many at once ----------------------------------------------------------------------------------------------------


def test_batches_streams_and_schedulers_of_short_and_long_prompts_equal_one_at_a_time() -> None:
    backbone = tiny_backbone("llama")
    decoder = FrozenDecoder(backbone, cache_budget=BUDGET)
    settings = GenerationSettings(max_new_tokens=24, temperature=0.9, seed=2)
    prompts: list[list[Part]] = [[TokenIds(IDS)], mixed(backbone), ["short"], [kv(backbone, IDS[:150]), TokenIds(IDS)]]
    alone = [decoder.generate(p, settings) for p in prompts]
    assert decoder.batch(prompts, settings) == alone
    assert ["".join(decoder.stream(p, settings)) for p in prompts] == [a.text for a in alone]
    with RequestScheduler(decoder, max_batch=3) as scheduler:
        tickets = [scheduler.submit(p, settings) for p in prompts]
        assert [t.result(60) for t in tickets] == alone
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda p: decoder.generate(p, settings), prompts)) == alone


def test_no_hook_is_ever_on_the_decoders_own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    def hooks_of(model: torch.nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    decoder = FrozenDecoder(tiny_backbone("llama"), cache_budget=BUDGET)
    assert decoder._budget is not None
    during: list[tuple[int, int]] = []
    add = ContextPot._add_mass

    def watched(self: ContextPot, *args: Any) -> None:
        assert decoder._budget is not None
        during.append((hooks_of(decoder._budget._model), hooks_of(decoder.backbone.model)))
        add(self, *args)

    monkeypatch.setattr(ContextPot, "_add_mass", watched)
    decoder.logits([TokenIds(IDS)])
    assert set(during) == {(6, 0)}
    assert hooks_of(decoder._budget._model) == 0


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reason"), [
    ("gemma2", "it has sliding-window layers"),
    ("gemma3", "it has sliding-window layers"),
    ("gpt2", "it has no rotary embedding"),
])
def test_decoders_that_cannot_forget_are_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        FrozenDecoder(tiny_backbone(name), cache_budget=BUDGET)


@pytest.mark.parametrize(("size", "message"), [
    (MAX_POSITIONS + 1, r"cache budget of 513 entries is larger than the window of 'tiny-llama', 512 .*at most 512"),
    (20, r"catalyst prompt takes \d+ of the 20 entries of the cache budget.*raise the budget$"),
    (0, r"of the 0 entries"),
])
def test_budgets_of_impossible_sizes_are_refused(size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FrozenDecoder(tiny_backbone("llama"), cache_budget=size)


def test_a_question_that_fills_the_cache_is_refused() -> None:
    decoder = FrozenDecoder(tiny_backbone("llama"), cache_budget=BUDGET)
    with pytest.raises(InputError, match=r"of the 128 entries.*raise the budget or shorten the question"):
        decoder.generate([TokenIds(IDS)], question="why? " * 60)


def test_blended_spans_are_refused_where_the_cache_forgets_and_read_where_it_does_not() -> None:
    backbone = tiny_backbone("llama")
    decoder = FrozenDecoder(backbone, cache_budget=BUDGET)
    blended = Blended(kv(backbone, IDS[:30]), TokenIds(IDS[:30]), 0.5)
    assert decoder.logits(["a", blended, "b"]).equal(FrozenDecoder(backbone).logits(["a", blended, "b"]))
    with pytest.raises(InputError, match=r"takes \d+ positions, the cache budget is 128.*cannot be blended"):
        decoder.logits(["a", blended, TokenIds(IDS)])
