"""Presses as scoring rules. The stand-ins follow the published signature of kvpress 0.5.5 (presses/scorer_press.py),
which does not install beside the transformers release used here; where kvpress is importable, its own presses are run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctxcomp_rag.compressors import load_compressor
from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor, InfiniPotConfig
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.kv.press import KVPress
from ctxcomp_rag.kv.scores import KeyNorm, make_rule
from tests.slow_infinipot import eager_model
from tests.tiny_models import FULL_ATTENTION_ROPE, tiny_backbone

IDS = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(3)).tolist()


@dataclass
class ScorerPress:
    """As in kvpress."""

    compression_ratio: float = 0.0

    def post_init_from_model(self, model: Any) -> None:
        pass

    def score(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Tensor,
              kwargs: Any) -> Tensor:
        raise NotImplementedError


@dataclass
class Knorm(ScorerPress):
    def score(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Tensor,
              kwargs: Any) -> Tensor:
        return -keys.norm(dim=-1)


@dataclass
class LastTokens(ScorerPress):
    """TOVA of kvpress in plain words: attention of the last token, from its hidden state."""

    def score(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Tensor,
              kwargs: Any) -> Tensor:
        mod: Any = module
        cos, sin = (t[:, -1:] for t in kwargs["position_embeddings"])
        query = mod.q_proj(hidden_states[:, -1:]).view(1, 1, -1, mod.head_dim).transpose(1, 2)
        half = query.shape[-1] // 2
        query = query * cos + torch.cat([-query[..., half:], query[..., :half]], -1) * sin
        products = query @ keys.repeat_interleave(2, dim=1).transpose(-1, -2) * mod.head_dim**-0.5
        scores: Tensor = products.softmax(-1).view(1, 2, 2, -1).mean(2)
        return scores


@dataclass
class WholePrefill(ScorerPress):
    def score(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Tensor,
              kwargs: Any) -> Tensor:
        assert keys.shape[2] == hidden_states.shape[1], "only supports prefill"
        assert kwargs["position_embeddings"][0].shape[1] == keys.shape[2]
        rotary: Any = module.rotary_emb
        assert callable(rotary)
        return hidden_states.norm(dim=-1)[:, None].expand(-1, keys.shape[1], -1)


def infinipot(press: object, name: str = "llama", **settings: Any) -> InfiniPotCompressor:
    return InfiniPotCompressor(tiny_backbone(name), InfiniPotConfig(rule=KVPress(press), **settings))


@pytest.mark.parametrize("pot", [30, 128])
def test_a_press_of_key_norms_keeps_what_the_rule_of_key_norms_keeps(pot: int) -> None:
    own = InfiniPotCompressor(tiny_backbone("llama"), InfiniPotConfig(rule=KeyNorm(), pot_tokens=pot))
    wrapped = infinipot(Knorm(), pot_tokens=pot)
    assert wrapped.distilled(IDS, 12).indices.equal(own.distilled(IDS, 12).indices)


@pytest.mark.parametrize("step", [7, 512])
def test_hidden_states_and_rotations_are_those_of_the_tokens_read(step: int) -> None:
    backbone = tiny_backbone("llama")
    pot = infinipot(LastTokens(), step_tokens=step).distilled(IDS, 12)
    with torch.no_grad():
        weights = eager_model(backbone)(torch.tensor([IDS]), output_attentions=True).attentions
    for layer, found in enumerate(pot.indices):
        expected = weights[layer][0, :, -1].view(2, 2, -1).mean(1).topk(12).indices.sort().values
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
def test_a_press_that_needs_the_whole_prefill_gets_it_in_one_pot_and_says_so_in_two(name: str) -> None:
    compressor = infinipot(WholePrefill(), name, step_tokens=16)
    assert compressor.distilled(IDS, 12).indices.shape == (2, 2, 12)
    assert not any(hasattr(m, "rotary_emb") for n, m in compressor._model.named_modules() if n.endswith("self_attn"))
    with pytest.raises(InputError, match=r"WholePrefill cannot score 40 entries of which the last 28 .*only supports "
                                         r"prefill.*raise pot_tokens"):
        infinipot(WholePrefill(), name, pot_tokens=40).distilled(IDS + IDS, 12)


def test_what_is_no_scorer_press_or_scores_in_another_shape_is_refused() -> None:
    class Odd(ScorerPress):
        def score(self, *_: Any) -> Tensor:  # type: ignore[override]
            return torch.zeros(3)

    with pytest.raises(InputError, match=r"Odd gave scores of shape \(3,\), expected \(1, 2, 60\)"):
        infinipot(Odd()).distilled(IDS, 12)
    with pytest.raises(InputError, match=r"expected a press with a method `score`.*got object"):
        KVPress(object())
    with pytest.raises(InputError, match=r"cannot score 60 entries.*NotImplementedError"):
        infinipot(ScorerPress()).distilled(IDS, 12)
    with pytest.raises(InputError, match="'kvpress' scores all entries together"):
        InfiniPotConfig(rule=KVPress(Knorm()), sink_slots=2)


def test_hooks_are_gone_after_a_pass_that_fails() -> None:
    compressor = infinipot(Knorm())
    model = compressor._model

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    mine = model.get_output_embeddings().register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        compressor.distilled(IDS, 12)
    assert hooks() == 1
    mine.remove()
    assert compressor.distilled(IDS, 12).size == 12


def test_presses_and_their_settings_tell_spans_apart(tmp_path: Path) -> None:
    specs = {infinipot(p).spec.fingerprint for p in (Knorm(), LastTokens(), Knorm(compression_ratio=0.5))}
    assert len(specs) == 3
    infinipot(Knorm()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"'.*test_press:Knorm' is not part of kvpress, and settings on disk"):
        load_compressor(tmp_path, tiny_backbone("llama"))


def test_a_press_of_the_package_needs_the_package() -> None:
    try:
        import kvpress  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r"'KnormPress' needs kvpress, .*pip install --no-deps kvpress"):
            make_rule("kvpress", {"press": "KnormPress"})
    else:
        rule = make_rule("kvpress", {"press": "KnormPress"})
        assert make_rule("kvpress", {k: v for k, v in rule.to_dict().items() if k != "name"}) == rule
        with pytest.raises(InputError, match="no press 'NoPress' in kvpress"):
            make_rule("kvpress", {"press": "NoPress"})


@pytest.mark.parametrize("press", ["KnormPress", "KeyDiffPress", "TOVAPress", "ExpectedAttentionPress", "LagKVPress",
                                   "LeverageScorePress", "SnapKVPress"])
def test_presses_of_the_package_read_texts_of_one_pot_and_most_of_them_of_several(press: str) -> None:
    pytest.importorskip("kvpress")
    settings = {"SnapKVPress": {"window_size": 8}, "LeverageScorePress": {"sketch_dimension": 4}}.get(press, {})
    rule = make_rule("kvpress", {"press": press, "settings": settings})
    backbone = tiny_backbone("llama")
    one = InfiniPotCompressor(backbone, InfiniPotConfig(rule=rule))
    assert one.distilled(IDS, 12).indices.shape == (2, 2, 12)
    if press != "LeverageScorePress":
        several = InfiniPotCompressor(backbone, InfiniPotConfig(rule=rule, pot_tokens=40))
        assert several.distilled(IDS + IDS, 12).num_read == 120
