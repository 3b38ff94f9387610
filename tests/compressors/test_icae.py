"""ICAE: segments, slots and their places. The numbers of the official code are in test_golden_icae_v2.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import load_compressor
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.errors import InputError, ModelLoadError
from tests.compressors.contract import CompressorContract
from tests.tiny_models import ARCHITECTURES, tiny_backbone

OFFICIAL = ICAEConfig(num_memory_tokens=6, segment_tokens=24, lora_rank=4)
FUSED = {"phi3": ("qkv_proj",), "gpt2": ("c_attn",)}
SPREAD = replace(OFFICIAL, slots="proportional", slot_positions="spread", num_memory_tokens=2)


def icae(config: ICAEConfig, name: str = "llama") -> ICAECompressor:
    """A compressor whose LoRA has an effect, as if it had been trained."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        compressor = ICAECompressor(tiny_backbone(name), config)
        with torch.no_grad():
            for parameter_name, parameter in compressor.encoder.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.2)
    return compressor


class TestOfficialLayout(CompressorContract):
    impossible_factor = 8.0
    impossible_factor_message = r"makes 6 slots of every segment \(4x\); it cannot make 8x"

    @pytest.fixture(scope="class")
    @classmethod
    def compressor(cls) -> ICAECompressor:
        return icae(OFFICIAL)

    def test_every_segment_gets_all_memory_tokens(self, compressor: ICAECompressor) -> None:
        assert [compressor.span_positions(n) for n in (1, 24)] == [(list(range(6)), 6)] * 2
        assert compressor.span_positions(25) == (list(range(12)), 12)


class TestSpreadLayout(CompressorContract):
    impossible_factor = 0.5
    impossible_factor_message = r"expected a compression factor of at least 1, got 0\.5"

    @pytest.fixture(scope="class")
    @classmethod
    def compressor(cls) -> ICAECompressor:
        return icae(SPREAD)

    def test_each_slot_stands_on_the_last_token_of_its_piece(self, compressor: ICAECompressor) -> None:
        assert compressor.span_positions(12) == ([3, 7, 11], 12)
        assert compressor.span_positions(10) == ([2, 5, 9], 10)
        assert compressor.span_positions(3) == ([2], 3)
        assert compressor.span_positions(1) == ([0], 1)

    def test_positions_go_on_in_the_next_segment(self, compressor: ICAECompressor) -> None:
        # 26 tokens are two segments of 13; 30 tokens at 8x are two segments of 15
        assert compressor.span_positions(26) == ([2, 5, 8, 12, 15, 18, 21, 25], 26)
        assert compressor.span_positions(30, 8.0) == ([6, 14, 21, 29], 30)

    @pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 16.0, 1000.0])
    def test_any_factor_from_one_on(self, compressor: ICAECompressor, factor: float) -> None:
        [span] = compressor.compress([Chunk("d", "the end of it", 0, 13, 0)], compression_factor=factor)
        assert span.num_slots == -(-span.num_source_tokens // factor)

    @pytest.mark.parametrize("factor", [0.99, 0.0, -4.0, float("nan")])
    def test_no_factor_below_one(self, compressor: ICAECompressor, factor: float) -> None:
        with pytest.raises(InputError, match="expected a compression factor of at least 1"):
            compressor.encode([[1, 2, 3]], compression_factor=factor)

    @settings(deadline=None)
    @given(num_tokens=st.integers(1, 200), factor=st.floats(1, 50))
    def test_places_increase_within_the_text(self, num_tokens: int, factor: float) -> None:
        places, length = SPREAD_COMPRESSOR.span_positions(num_tokens, factor)
        assert length == num_tokens
        assert all(a < b for a, b in zip([-1, *places], [*places, num_tokens], strict=True))
        assert len(SPREAD.segment_lengths(num_tokens)) <= len(places) <= num_tokens


SPREAD_COMPRESSOR = icae(SPREAD)


@pytest.mark.parametrize(("num_tokens", "lengths"), [
    (1, [1]), (24, [24]), (25, [13, 12]), (48, [24, 24]), (49, [17, 17, 15]), (76, [19, 19, 19, 19]),
])
def test_text_is_cut_into_equal_segments(num_tokens: int, lengths: list[int]) -> None:
    assert OFFICIAL.segment_lengths(num_tokens) == lengths


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 600))
def test_segments_hold_every_token_and_keep_the_bound(num_tokens: int, bound: int) -> None:
    lengths = replace(OFFICIAL, segment_tokens=bound).segment_lengths(num_tokens)
    assert sum(lengths) == num_tokens
    assert all(1 <= length <= bound for length in lengths)


@pytest.mark.parametrize("config", [OFFICIAL, SPREAD], ids=["official", "spread"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_slots_are_the_final_states_at_the_memory_tokens(name: str, config: ICAEConfig) -> None:
    """The definition, spelled out for one segment: [text][memory tokens], final norm, LoRA on."""
    compressor = icae(replace(config, lora_targets=FUSED.get(name, config.lora_targets)), name)
    ids = torch.arange(40, 62)
    places = config.slot_places(22, config.num_slots(22, 4.0))
    memory = compressor.memory_tokens[torch.arange(len(places)) % config.num_memory_tokens]
    positions = [*range(22), *(p + (0 if config.slot_positions == "spread" else 22) for p in places)]
    with torch.no_grad():
        states = compressor.encoder(
            inputs_embeds=torch.cat([compressor.backbone.embed(ids), memory])[None], output_hidden_states=True,
            position_ids=torch.tensor([positions]), attention_mask=torch.ones(1, len(positions), dtype=torch.long),
        ).hidden_states[-1][0]
        slots = compressor.encode([ids.tolist()])[0]
    torch.testing.assert_close(slots, states[22:], atol=1e-6, rtol=0)


def test_segments_are_compressed_independently() -> None:
    compressor = icae(OFFICIAL)
    ids = list(range(40, 88))
    with torch.no_grad():
        whole, first, second = compressor.encode([ids, ids[:24], ids[24:]])
    torch.testing.assert_close(whole, torch.cat([first, second]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_batch_size_does_not_change_the_slots(batch_tokens: int) -> None:
    texts = [list(range(3, 3 + n)) for n in (1, 50, 7, 24, 23)]
    with torch.no_grad():
        expected = [SPREAD_COMPRESSOR.encode([t])[0] for t in texts]
        for slots, alone in zip(SPREAD_COMPRESSOR.encode(texts, batch_tokens=batch_tokens), expected, strict=True):
            torch.testing.assert_close(slots, alone, atol=1e-5, rtol=0)


def test_fixed_slots_cannot_be_spread() -> None:
    with pytest.raises(InputError, match="use slots='proportional' to spread them"):
        ICAECompressor(tiny_backbone("llama"), replace(OFFICIAL, slot_positions="spread"))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_new_memory_tokens_are_as_large_as_embedded_text(name: str) -> None:
    """Also where the architecture scales its embeddings."""
    compressor = ICAECompressor(tiny_backbone(name), replace(OFFICIAL, num_memory_tokens=200))
    text = compressor.backbone.embed(torch.arange(200))
    assert compressor.memory_tokens.std().item() == pytest.approx(text.std().item(), rel=0.1)


def test_only_lora_and_memory_tokens_can_be_trained() -> None:
    trainable = {n for n, p in icae(OFFICIAL).named_parameters() if p.requires_grad}
    assert "memory_tokens" in trainable
    assert all(".lora_" in n for n in trainable - {"memory_tokens"})
    assert len(trainable) == 1 + 2 * 2 * 2  # layers, targets, A and B


def test_loaded_compressor_can_be_trained_further(tmp_path: Path) -> None:
    original = icae(OFFICIAL)
    original.save_pretrained(tmp_path)
    loaded = load_compressor(tmp_path, tiny_backbone("llama"))
    assert isinstance(loaded, ICAECompressor)
    assert ({n for n, p in loaded.named_parameters() if p.requires_grad}
            == {n for n, p in original.named_parameters() if p.requires_grad})


def test_specification_follows_the_weights() -> None:
    compressor = icae(OFFICIAL)
    before = compressor.spec
    assert compressor.spec is before
    optimizer = torch.optim.SGD([p for p in compressor.parameters() if p.requires_grad], lr=0.1)
    compressor.encode([[1, 2, 3]])[0].sum().backward()
    optimizer.step()
    assert compressor.spec.fingerprint != before.fingerprint


def test_delimiters_are_the_rows_after_the_memory_tokens() -> None:
    compressor = icae(replace(OFFICIAL, delimiters=("after", "reconstruct")))
    assert set(compressor.spec.delimiters) == {"after", "reconstruct"}
    assert compressor.spec.delimiters["reconstruct"].equal(compressor.memory_tokens[6:7])
    assert compressor.spec.delimiters["after"].equal(compressor.memory_tokens[8:9])


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "memory_tokens.safetensors"])
@pytest.mark.parametrize("damage", ["absent", "cut off"])
def test_damaged_folder_is_named(file: str, damage: str, tmp_path: Path) -> None:
    icae(OFFICIAL).save_pretrained(tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    if damage == "cut off":
        (tmp_path / file).write_bytes(whole[:-10])
    with pytest.raises(ModelLoadError, match=f"the compressor in '{tmp_path}' cannot be loaded"):
        load_compressor(tmp_path, tiny_backbone("llama"))
