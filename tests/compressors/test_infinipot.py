"""InfiniPot against eager attention, cross-entropy and a slow, obvious reference."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPTNeoXConfig, Qwen3NextConfig

from ctxcomp_rag.backbone import Backbone, load_frozen
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import Budget, compressor_class
from ctxcomp_rag.compressors.infinipot import QUESTION_CATALYST, InfiniPotCompressor, InfiniPotConfig
from ctxcomp_rag.decoding import FrozenDecoder, Part, TokenIds
from ctxcomp_rag.errors import InputError, UnsupportedModelError
from ctxcomp_rag.evaluation.kept import score_question_aware, single_document_questions
from ctxcomp_rag.kv.catalyst import answer_turn, catalyst, question_catalyst
from ctxcomp_rag.kv.pot import ContextPot
from ctxcomp_rag.kv.scores import CaP, Entries, InfiniPot, NuC, SnapKV, StreamingLLM
from ctxcomp_rag.spans import KVSpan
from tests.compressors.contract import CompressorContract, assert_same_span
from tests.slow_infinipot import SlowPot, eager_model
from tests.tiny_models import FULL_ATTENTION_ROPE, tiny_backbone, tiny_config, tiny_model, tiny_tokenizer

IDS = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(7)).tolist()
QUESTION = (3, 14, 15, 92, 65)
SMALL = InfiniPotConfig(pot_tokens=128, chunk_tokens=24, catalyst="\n\nKey facts:")


def infinipot(config: InfiniPotConfig = SMALL, name: str = "llama") -> InfiniPotCompressor:
    return InfiniPotCompressor(tiny_backbone(name), config)


def chunk_of(backbone: Backbone, text: str) -> Chunk:
    return Chunk("doc", text, 0, len(text), len(backbone.tokenizer.encode(text)))


class TestContract(CompressorContract):
    impossible_factor = 0.5
    impossible_factor_message = r"expected a compression factor of at least 1, got 0\.5"

    @pytest.fixture(scope="class")
    @classmethod
    def compressor(cls) -> InfiniPotCompressor:
        return infinipot()


class TestContractOfAnotherRuleAndAFixedBudget(CompressorContract):
    impossible_factor = 0.5
    impossible_factor_message = r"expected a compression factor of at least 1, got 0\.5"

    @pytest.fixture(scope="class")
    @classmethod
    def compressor(cls) -> InfiniPotCompressor:
        return infinipot(InfiniPotConfig(pot_tokens=64, chunk_tokens=24, num_slots=10, rule=SnapKV(window=4)))


# -- nothing to forget ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
@pytest.mark.parametrize("step", [9, 512])
def test_a_budget_of_the_whole_text_changes_nothing(name: str, step: int) -> None:
    backbone = tiny_backbone(name)
    compressor = infinipot(InfiniPotConfig(compression_factor=1.0, step_tokens=step), name)
    text = "The lighthouse of Varn was built in 1871; its stairs are red. It is 31 metres high."
    [span] = compressor.compress([chunk_of(backbone, text)])
    ids = backbone.tokenizer.encode(text)
    assert span.kept is not None
    assert span.kept.tolist() == torch.arange(len(ids)).expand(2, 2, -1).tolist()
    with torch.inference_mode():
        plain = backbone.model(torch.tensor([[*ids, *QUESTION]])).logits[0, len(ids) :]
    torch.testing.assert_close(FrozenDecoder(backbone).logits([span, TokenIds(QUESTION)]), plain, atol=1e-4, rtol=0)


# -- the two scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_cap_is_the_eager_attention_mass_that_the_catalyst_puts_on_the_text(name: str, reduce: str,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone(name)
    compressor = infinipot(InfiniPotConfig(catalyst="\n\nKey facts:", rule=CaP(reduce)), name)  # type: ignore[arg-type]
    seen: list[Tensor] = []

    def score(_: CaP, entries: Entries) -> Tensor:
        assert entries.attention is not None
        seen.append(entries.attention)
        return entries.attention

    monkeypatch.setattr(CaP, "score", score)
    compressor.distilled(IDS, 10)
    prompt = list(catalyst(backbone.tokenizer, "\n\nKey facts:").ids)
    with torch.no_grad():
        weights = eager_model(backbone)(torch.tensor([IDS + prompt]), output_attentions=True).attentions
    assert len(seen) == len(weights) == 2
    for mass, layer in zip(seen, weights, strict=True):
        of_text = layer[0, :, len(IDS) :, : len(IDS)].unflatten(0, (2, 2))
        expected = {"sum": of_text.sum((1, 2)), "mean": of_text.mean((1, 2)), "max": of_text.amax((1, 2))}[reduce]
        torch.testing.assert_close(mass, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
@pytest.mark.parametrize("step", [1, 16, 512])
def test_nuc_is_the_cross_entropy_of_the_text(name: str, step: int) -> None:
    backbone = tiny_backbone(name)
    pot = infinipot(InfiniPotConfig(rule=NuC(), step_tokens=step), name).distilled(IDS, len(IDS))
    with torch.no_grad():
        logits = backbone.model(torch.tensor([IDS])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:]), reduction="none")
    assert math.isinf(float(pot.novelty[0, 0, 0]))
    torch.testing.assert_close(pot.novelty[:, :, 1:], expected.expand(2, 2, -1), atol=1e-4, rtol=1e-4)


def test_a_catalyst_ends_with_the_turn_that_the_chat_template_opens_for_the_decoder() -> None:
    tokenizer = tiny_backbone("llama").tokenizer
    turn = [tokenizer.hf.convert_tokens_to_ids(t) for t in ("<|end|>", "<|assistant|>")]
    # what a question spells opens no turn
    asked = question_catalyst(tokenizer, "Who <|assistant|>?")
    assert list(asked.ids) == [*tokenizer.encode("\n\nQuestion: Who <|assistant|>?"), *turn]
    assert sum(i in tokenizer.control_ids for i in asked.ids) == 2
    plain = copy.copy(tokenizer)
    plain.hf = copy.copy(tokenizer.hf)
    plain.hf.chat_template = None
    assert answer_turn(plain) == []


def test_a_question_as_catalyst_keeps_other_tokens() -> None:
    by_question = SMALL.for_question("How high is {it}?")
    assert by_question.catalyst == QUESTION_CATALYST.replace("{question}", "How high is {it}?")
    generic, asked = (infinipot(c).distilled(IDS, 20).indices for c in (SMALL, by_question))
    assert not generic.equal(asked)


def test_what_a_question_and_its_answer_look_up_is_kept_unless_a_rule_was_chosen() -> None:
    assert InfiniPotConfig().for_question("Who?").rule == InfiniPot(alpha=0.0, reduce="max")
    assert InfiniPotConfig(rule=NuC()).for_question("Who?").rule == NuC()


def test_the_answer_survives_with_a_quarter_of_the_entries_when_the_question_is_known() -> None:
    backbone = load_frozen()
    compressor = InfiniPotCompressor(backbone)
    questions = single_document_questions(compressor, documents=8, seed=3)
    assert score_question_aware(backbone, questions, factor=4.0).exact_match == 100.0
    assert score_question_aware(backbone, questions, factor=8.0).exact_match >= 75.0  # of 100 documents (kept.json)


# -- distilling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
def test_kept_keys_are_the_keys_of_the_same_hidden_states_at_their_new_positions(name: str) -> None:
    """In the first layer a key depends on its token and position only, so the model can be asked for it there."""
    backbone = tiny_backbone(name)
    pot = infinipot(InfiniPotConfig(pot_tokens=40, catalyst="So:"), name).distilled(IDS, 12)
    assert pot.num_read == len(IDS)
    for head, places in enumerate(pot.indices[0].tolist()):
        cache: Any = DynamicCache(config=backbone.model.config)
        with torch.no_grad():
            backbone.model(torch.tensor([[IDS[p] for p in places]]), past_key_values=cache)
        torch.testing.assert_close(pot.keys[0][head], cache.layers[0].keys[0, head], atol=1e-4, rtol=0)
        torch.testing.assert_close(pot.values[0][head], cache.layers[0].values[0, head], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
@pytest.mark.parametrize("pots", [1, 2, 6])
@pytest.mark.parametrize(("repeats", "draft_tokens"), [(False, 0), (False, 5), (True, 0)])
def test_any_number_of_pots_equals_the_slow_reference(name: str, pots: int, repeats: bool, draft_tokens: int) -> None:
    backbone = tiny_backbone(name)
    keep = 13
    room = {1: 70, 2: 42, 6: 23}[pots]
    rule = InfiniPot(alpha=0.25, reduce="max") if repeats else InfiniPot()
    prompt = catalyst(backbone.tokenizer, "So:", repeats=repeats, draft_tokens=draft_tokens)
    room = 2 * room if repeats else room  # a text that is repeated takes its length twice
    config = InfiniPotConfig(pot_tokens=prompt.length + room, catalyst="So:", step_tokens=8, rule=rule,
                             repeats=repeats, draft_tokens=draft_tokens)
    slow = SlowPot(backbone, prompt, alpha=rule.alpha, reduce=rule.reduce)
    read_since = 0
    with torch.no_grad():
        for number, token in enumerate(IDS):
            slow.read(token)
            read_since += 1
            full = slow.size + 1 + (read_since + 1) * repeats > room
            if slow.size > keep and (full or number == len(IDS) - 1):
                slow.distil(keep)
                read_since = 0
    pot = infinipot(config, name).distilled(IDS, keep)
    assert pot.indices.tolist() == slow.held
    for layer in range(2):
        torch.testing.assert_close(pot.keys[layer], slow.cache.layers[layer].keys[0], atol=2e-4, rtol=0)
        torch.testing.assert_close(pot.values[layer], slow.cache.layers[layer].values[0], atol=2e-4, rtol=0)


def test_the_order_of_the_text_is_kept_and_positions_are_consecutive() -> None:
    compressor = infinipot(InfiniPotConfig(pot_tokens=40, catalyst="So:"))
    chunk = chunk_of(compressor.backbone, "One two three four five six seven eight nine ten. " * 3)
    [span] = compressor.compress([chunk])
    assert span.kept is not None
    assert bool((span.kept.diff(dim=-1) > 0).all())
    assert (span.positions.tolist(), span.num_positions) == (list(range(span.num_slots)), span.num_slots)
    assert span.num_slots == math.ceil(chunk.num_tokens / 4)


def test_sink_and_recent_tokens_stay_through_all_pots() -> None:
    config = InfiniPotConfig(pot_tokens=32, catalyst="So:", sink_slots=3, recent_slots=2, rule=InfiniPot(alpha=0.0))
    indices = infinipot(config).distilled(IDS, 10).indices
    assert bool((indices[..., :3] == torch.arange(3)).all())
    assert bool((indices[..., -2:] == torch.tensor([68, 69])).all())


def test_slots_in_bfloat16_take_half_the_bytes_and_miss_the_keys_and_values_by_rounding_only() -> None:
    text = "One two three four five six seven eight nine ten. " * 2
    exact_maker, small_maker = infinipot(), infinipot(replace(SMALL, slot_dtype="bfloat16"))
    chunk = chunk_of(exact_maker.backbone, text)
    [exact], [small] = exact_maker.compress([chunk]), small_maker.compress([chunk])
    assert small.nbytes == exact.nbytes // 2 == 2 * 2 * 2 * small.num_slots * 8 * 2
    assert exact_maker.spec.fingerprint != small_maker.spec.fingerprint
    for rounded, full in ((small.keys, exact.keys), (small.values, exact.values)):
        torch.testing.assert_close(rounded.float(), full, atol=0, rtol=2**-8)
    decoder = FrozenDecoder(exact_maker.backbone)
    wide = KVSpan(small.chunk_id, small.num_source_tokens, small.positions, small.num_positions, small.keys.float(),
                  small.values.float())
    prompts: list[list[Part]] = [[TokenIds(QUESTION), span, TokenIds(QUESTION)] for span in (small, wide)]
    # moving the keys to their place in the prompt rounds nothing more
    assert decoder.logits(prompts[0]).equal(decoder.logits(prompts[1]))


# -- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [40, 300, 1500])
def test_the_cache_never_holds_more_than_the_pot_however_long_the_text(length: int,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    positions: list[int] = []
    update = DynamicCache.update

    def measured(self: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(self, *args, **kwargs)
        lengths.append(keys.shape[2])
        return keys, values

    compressor = infinipot(InfiniPotConfig(pot_tokens=64, step_tokens=16))
    monkeypatch.setattr(DynamicCache, "update", measured)
    hook = compressor._model.register_forward_pre_hook(
        lambda _m, _a, kwargs: positions.append(int(kwargs["position_ids"].max())), with_kwargs=True)
    pot = compressor.distilled((IDS * 22)[:length], 10)
    hook.remove()
    assert pot.num_read == length
    assert pot.size == 10
    assert max(lengths) <= 64
    assert max(positions) < 64


def test_a_budget_that_the_pot_cannot_hold_is_refused_before_anything_is_read() -> None:
    compressor = infinipot(InfiniPotConfig(pot_tokens=32, catalyst="So:"))
    with pytest.raises(InputError, match=r"50 slots of a text of 200 tokens do not fit into a pot that takes \d+ "):
        compressor.num_slots(200)
    assert compressor.num_slots(200, 10.0) == 20


@pytest.mark.parametrize(("config", "message"), [
    (InfiniPotConfig(pot_tokens=1000), r"pot of 1000 tokens is larger than the window of 'tiny-llama', 512"),
    (InfiniPotConfig(pot_tokens=8), r"catalyst takes \d+ of the 8 tokens of the pot"),
])
def test_pots_of_impossible_sizes_are_refused(config: InfiniPotConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        infinipot(config)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match=r"compression factor of at least 1, got 0\.2"):
        InfiniPotConfig(compression_factor=0.2)
    with pytest.raises(InputError, match="slot_dtype='decoder' or 'bfloat16', got 'int3'"):
        InfiniPotConfig(slot_dtype="int3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_slots of at least 1, got 0"):
        InfiniPotConfig(num_slots=0)
    with pytest.raises(InputError, match="'cap' scores by a catalyst prompt; `catalyst` must not be empty"):
        InfiniPotConfig(rule=CaP(), catalyst="")
    assert InfiniPotConfig(rule=StreamingLLM(), catalyst="").rule.sink == 4
    with pytest.raises(InputError, match="number of slots or of bytes, got num_slots=3 and span_bytes=100"):
        InfiniPotConfig(num_slots=3, span_bytes=100)
    with pytest.raises(InputError, match=r"adds up over all pots; expected .* reduce='max' or 'sum', got 'mean'"):
        InfiniPotConfig(rule=CaP("mean"), repeats=True)


# -- budgets ---------------------------------------------------------------------------------------------------------

SLOT_BYTES = 2 * 2 * 2 * 8 * 4  # keys and values, layers, kv heads, head size, float32


@pytest.mark.parametrize(("budget", "slots"), [
    ("7slots", 7), ("1 slot", 1), ("10x", 15), ("2.5x", 60), (f"{SLOT_BYTES * 9}B", 9),
    (f"{SLOT_BYTES * 9 + SLOT_BYTES - 1}B", 9), ("2KiB", 2048 // SLOT_BYTES), ("0.5 KiB", 512 // SLOT_BYTES),
    ("1GiB", 150), ("1000slots", 150),
])
def test_a_budget_is_slots_bytes_or_a_factor_and_never_more_than_the_text(budget: str, slots: int) -> None:
    compressor = InfiniPotCompressor.ready_for(tiny_backbone("llama"), Budget.parse(budget))
    [span] = compressor.compress([chunk_of(compressor.backbone, "~" * 150)])
    assert span.num_source_tokens == 150
    assert span.num_slots == slots == compressor.num_slots(150)
    assert span.nbytes == slots * compressor.slot_bytes
    assert compressor.slot_bytes == SLOT_BYTES


def test_bytes_are_counted_as_the_slots_leave_the_pot() -> None:
    config = InfiniPotConfig(span_bytes=SLOT_BYTES * 9, slot_dtype="bfloat16")
    assert infinipot(config).num_slots(150) == 18


@pytest.mark.parametrize("budget", ["", "4", "x", "-3slots", "4 X", "1e9slots", "64kb", "slots", "nanx"])
def test_other_budgets_are_refused_with_an_example_of_each_kind(budget: str) -> None:
    with pytest.raises(InputError, match=r"a budget such as '256slots', '64KiB' or '4x', got "):
        Budget.parse(budget)


def test_budgets_that_hold_nothing_are_refused_with_the_size_of_a_slot() -> None:
    with pytest.raises(InputError, match=rf"takes {SLOT_BYTES} bytes, so a budget of 100 bytes holds none; raise it"):
        infinipot(InfiniPotConfig(span_bytes=100))
    with pytest.raises(InputError, match="num_slots of at least 1, got 0"):
        InfiniPotCompressor.ready_for(tiny_backbone("llama"), Budget.parse("0slots"))
    with pytest.raises(InputError, match=r"factor of at least 1, got 0\.5"):
        Budget.parse("0.5x")


def test_trained_methods_take_no_budget() -> None:
    with pytest.raises(InputError, match=r"pcc spans have the size that the compressor was trained for.*--factor"):
        compressor_class("pcc").ready_for(tiny_backbone("llama"), Budget.parse("4x"))


# -- hooks and other models ------------------------------------------------------------------------------------------


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_afterwards_and_never_touch_the_decoders_own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = infinipot()
    assert hooks_of(compressor._model) == 0
    compressor.distilled(IDS, 10)
    assert hooks_of(compressor._model) == 0
    during: list[tuple[int, int]] = []

    def fails(*_: object) -> None:
        during.append((hooks_of(compressor._model), hooks_of(compressor.backbone.model)))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ContextPot, "_add_mass", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        compressor.distilled(IDS, 10)
    assert during == [(6, 0)]
    assert hooks_of(compressor._model) == 0
    monkeypatch.undo()
    compressor.distilled(IDS, 10)  # and the lock is free again


def test_the_attention_implementation_stays_what_it_is() -> None:
    compressor = infinipot()
    compressor.distilled(IDS, 10)
    for model in (compressor.backbone.model, compressor._model):
        assert model.config._attn_implementation == "sdpa"


def test_threads_that_compress_and_decode_at_once_do_not_disturb_each_other() -> None:
    compressor = infinipot()
    decoder = FrozenDecoder(compressor.backbone)
    chunks = [chunk_of(compressor.backbone, f"The number {i} stands in line {i * i} of this text. " * 2)
              for i in range(3)]
    alone = compressor.compress(chunks)
    logits = decoder.logits([TokenIds(tuple(IDS))])
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(compressor.compress, chunks) for _ in range(4)]
        reads = [pool.submit(decoder.logits, [TokenIds(tuple(IDS))]) for _ in range(8)]
        for job in jobs:
            for span, expected in zip(job.result(), alone, strict=True):
                assert_same_span(span, expected)
        assert all(r.result().equal(logits) for r in reads)


def test_linear_attention_is_refused_with_the_reason() -> None:
    config = Qwen3NextConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"], eos_token_id=1)
    backbone = Backbone(tiny_model(config), tiny_tokenizer(), model_id="next")
    for make in (InfiniPotCompressor, partial(FrozenDecoder, cache_budget=128)):
        with pytest.raises(UnsupportedModelError, match=r"linear-attention layers .* keep a state and no keys"):
            make(backbone)


@pytest.mark.parametrize(("name", "reason"), [
    ("gemma2", "it has sliding-window layers"),
    ("gemma3", "it has sliding-window layers"),
    ("gpt2", "it has no rotary embedding"),
])
def test_decoders_whose_keys_cannot_be_moved_are_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        InfiniPotCompressor(tiny_backbone(name))


def test_a_decoder_whose_attention_is_not_what_its_queries_say_is_refused() -> None:
    backbone = Backbone(tiny_model(tiny_config("llama")), tiny_tokenizer(), model_id="gated")
    # a gate on what attention reads, such as some architectures have, shows neither in queries nor in keys
    for layer in backbone.model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: args[0] * args[0].sigmoid())
    with pytest.raises(UnsupportedModelError, match=r"misses the model's own by .*no plain softmax attention"):
        InfiniPotCompressor(backbone)


def test_where_queries_cannot_be_seen_the_rules_without_attention_still_work() -> None:
    config = GPTNeoXConfig(vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, max_position_embeddings=512, initializer_range=0.2)
    backbone = Backbone(tiny_model(config), tiny_tokenizer(), model_id="neox")
    with pytest.raises(UnsupportedModelError, match=r"'gpt_neox' are not built of .*Use a scoring rule without"):
        InfiniPotCompressor(backbone)
    pot = InfiniPotCompressor(backbone, InfiniPotConfig(pot_tokens=40, rule=NuC())).distilled(IDS, 10)
    assert pot.indices.shape == (2, 4, 10)
