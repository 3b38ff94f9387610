"""Scoring rules against their formulas, on entries made by hand and on entries of a tiny decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor, InfiniPotConfig
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.kv.attention import attention_mass
from ctxcomp_rag.kv.scores import (
    H2O,
    RULES,
    CaP,
    Entries,
    InfiniPot,
    KeyNorm,
    NuC,
    Random,
    ScoringRule,
    SnapKV,
    StreamingLLM,
    choose,
    make_rule,
)
from tests.tiny_models import tiny_backbone

IDS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(11)).tolist()


def entries(n: int = 10, keep: int = 4, *, seed: int = 0) -> Entries:
    """Two kv heads, n entries, whose tokens stood at the even places of a text."""
    g = torch.Generator().manual_seed(seed)
    indices = (2 * torch.arange(n)).expand(2, n)
    novelty = torch.rand(n, generator=g).expand(2, n)
    return Entries(torch.randn(2, n, 8, generator=g), torch.randn(2, n, 8, generator=g), indices, novelty,
                   torch.rand(2, n, generator=g), keep, 2 * n, 0)


def kept(rule: ScoringRule, e: Entries, *, sink: int = 0, recent: int = 0) -> list[list[int]]:
    places: list[list[int]] = choose(rule, e, sink=sink, recent=recent).tolist()
    return places


def top(scores: Tensor, k: int) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda i: -row[i])[:k] for row in scores.tolist()]


def test_every_rule_of_the_registry_can_be_made_by_name_and_made_again_from_its_settings() -> None:
    assert set(RULES) >= {"infinipot", "cap", "nuc", "snapkv", "streaming_llm", "h2o", "key_norm", "random"}
    for name in RULES:
        rule = make_rule(name)
        settings = rule.to_dict()
        assert settings.pop("name") == name
        assert make_rule(name, settings) == rule


def test_unknown_rules_and_settings_are_named_with_the_ones_there_are() -> None:
    with pytest.raises(InputError, match="no scoring rule 'tova'; expected one of cap, h2o, infinipot, key_norm"):
        make_rule("tova")
    with pytest.raises(InputError, match=r"'infinipot' has no setting 'beta'; expected one of alpha, reduce"):
        make_rule("infinipot", {"beta": 1})
    with pytest.raises(InputError, match=r"from 0 to 1, got 1\.5"):
        InfiniPot(alpha=1.5)
    with pytest.raises(InputError, match="'sum', 'mean' or 'max', got 'median'"):
        make_rule("cap", {"reduce": "median"})


def test_infinipot_gives_the_first_places_to_novelty_and_the_rest_to_the_catalyst_per_head() -> None:
    e = entries(keep=5)
    assert e.novelty is not None
    assert e.attention is not None
    for alpha, num_novel in ((0.0, 0), (0.25, 1), (0.5, 2), (1.0, 5)):
        for head, places in enumerate(kept(InfiniPot(alpha), e)):
            novel = top(e.novelty, num_novel)[head]
            rest = [i for i in top(e.attention, 10)[head] if i not in novel][: 5 - num_novel]
            assert places == sorted(novel + rest)


def test_the_limits_of_infinipot_are_cap_and_nuc() -> None:
    e = entries()
    assert kept(InfiniPot(0.0), e) == kept(CaP(), e) == [sorted(p) for p in top(e.attention, 4)]  # type: ignore[arg-type]
    assert kept(InfiniPot(1.0), e) == kept(NuC(), e) == [sorted(p) for p in top(e.novelty, 4)]  # type: ignore[arg-type]


def test_heads_hold_different_tokens_by_cap_and_the_same_by_nuc() -> None:
    e = entries()
    assert kept(CaP(), e)[0] != kept(CaP(), e)[1]
    assert kept(NuC(), e)[0] == kept(NuC(), e)[1]


def test_streaming_llm_keeps_the_first_and_the_last() -> None:
    rule = StreamingLLM(sinks=2)
    assert kept(rule, entries(keep=5), sink=rule.sink) == [[0, 1, 7, 8, 9]] * 2


def test_key_norm_keeps_the_shortest_keys() -> None:
    e = entries()
    norms = e.keys.pow(2).sum(-1).sqrt()
    assert kept(KeyNorm(), e) == [sorted(p) for p in top(-norms, 4)]


def test_snapkv_smooths_over_neighbours_and_keeps_its_window() -> None:
    e = entries(keep=6)
    rule = SnapKV(window=3, kernel=3)
    assert e.attention is not None
    seen = e.attention[:, :-3].tolist()
    for head, row in enumerate(seen):
        smooth = [sum(row[max(0, i - 1) : i + 2]) / len(row[max(0, i - 1) : i + 2]) for i in range(len(row))]
        assert kept(rule, e, recent=rule.recent)[head] == [*sorted(top(torch.tensor([smooth]), 3)[0]), 7, 8, 9]


def test_random_is_the_same_for_the_same_text_and_differs_between_layers_heads_and_seeds() -> None:
    e = entries(n=60, keep=20)
    first = kept(Random(), e)
    assert first == kept(Random(), e)
    assert first[0] != first[1]
    assert first != kept(Random(seed=1), e)
    later = Entries(e.keys, e.values, e.indices, e.novelty, e.attention, 20, e.num_read, layer=1)
    assert first != kept(Random(), later)


def test_sink_and_recent_entries_are_kept_whatever_their_score_and_take_half_of_the_places_each_at_most() -> None:
    e = entries(keep=6)
    for places in kept(KeyNorm(), e, sink=2, recent=1):
        assert places[:2] == [0, 1]
        assert places[-1] == 9
        assert len(set(places)) == 6
    assert kept(KeyNorm(), entries(keep=2), sink=4, recent=4) == [[0, 9]] * 2
    assert [len(p) for p in kept(KeyNorm(), entries(keep=1), sink=4, recent=4)] == [1, 1]


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("num_queries", [1, 7, 600])
def test_masses_in_blocks_equal_the_full_causal_matrix(reduce: str, num_queries: int) -> None:
    g = torch.Generator().manual_seed(2)
    queries, keys = torch.randn(4, num_queries, 8, generator=g), torch.randn(2, num_queries + 9, 8, generator=g)
    n = num_queries + 9
    expected = torch.zeros(2, n)
    rows: list[list[Tensor]] = [[], []]
    for head in range(4):
        for i in range(num_queries):
            seen = 9 + i + 1
            weights = torch.softmax(keys[head // 2, :seen] @ queries[head, i] * 0.3, dim=0)
            rows[head // 2].append(torch.cat([weights, torch.zeros(n - seen)]))
    for kv_head in range(2):
        stacked = torch.stack(rows[kv_head])
        expected[kv_head] = {"sum": stacked.sum(0), "mean": stacked.mean(0), "max": stacked.amax(0)}[reduce]
    made = attention_mass(queries, keys, 0.3, reduce)  # type: ignore[arg-type]
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


def test_a_rule_of_ones_own_is_its_formula_only() -> None:
    @dataclass(frozen=True)
    class LargestValues(ScoringRule):
        name: ClassVar[str] = "largest_values"

        def score(self, entries: Entries) -> Tensor:
            return entries.values.pow(2).sum(-1)

    compressor = InfiniPotCompressor(tiny_backbone("llama"), InfiniPotConfig(rule=LargestValues()))
    everything, pot = compressor.distilled(IDS, 40), compressor.distilled(IDS, 6)
    for layer in range(2):
        norms = everything.values[layer].norm(dim=-1)
        assert pot.indices[layer].tolist() == [sorted(p) for p in top(norms, 6)]


def eager(ids: list[int]) -> tuple[Tensor, ...]:
    model = tiny_backbone("llama").second_tree()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights: tuple[Tensor, ...] = model(torch.tensor([ids]), output_attentions=True).attentions
    return tuple(w[0].reshape(2, 2, *w.shape[2:]) for w in weights)


@pytest.mark.parametrize("step", [5, 16, 512])
def test_h2o_accumulates_the_eager_attention_of_all_tokens_read(step: int) -> None:
    compressor = InfiniPotCompressor(tiny_backbone("llama"), InfiniPotConfig(rule=H2O(), step_tokens=step))
    pot = compressor.distilled(IDS, 8)
    for layer, weights in enumerate(eager(IDS)):
        assert pot.indices[layer].tolist() == [sorted(p) for p in top(weights.sum((1, 2)), 8)]


@pytest.mark.parametrize("step", [5, 16, 512])
def test_snapkv_sees_the_eager_attention_of_its_window(step: int) -> None:
    rule = SnapKV(window=6, kernel=1)
    compressor = InfiniPotCompressor(tiny_backbone("llama"), InfiniPotConfig(rule=rule, step_tokens=step))
    pot = compressor.distilled(IDS, 16)
    for layer, weights in enumerate(eager(IDS)):
        best = top(weights[:, :, -6:, :-6].mean((1, 2)), 10)
        assert pot.indices[layer].tolist() == [[*sorted(p), *range(34, 40)] for p in best]


def test_every_rule_reads_texts_longer_than_the_pot() -> None:
    for name in RULES:
        config = InfiniPotConfig(pot_tokens=24, catalyst="So:", rule=make_rule(name), step_tokens=7)
        pot = InfiniPotCompressor(tiny_backbone("qwen3"), config).distilled(IDS, 6)
        assert pot.indices.shape == (2, 2, 6), name
        assert bool((pot.indices.diff(dim=-1) > 0).all()), name
