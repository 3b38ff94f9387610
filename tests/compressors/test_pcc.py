"""PCC: brackets, segments, padding. The numbers of the official code are in test_golden_pcc.py."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors.base import Compressor
from ctxcomp_rag.compressors.pcc import PCCCompressor, PCCConfig, load_encoder
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.spans import MemorySpan
from tests.compressors.contract import CompressorContract, assert_same_span
from tests.tiny_models import save_tiny, tiny_backbone, tiny_tokenizer

CONFIG = PCCConfig(segment_tokens=24, slots_per_segment=6)
SPREAD = replace(CONFIG, slot_positions="spread")


def save_bert(folder: Path) -> Path:
    """A tiny bidirectional encoder of another width than the decoder, with the same tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        BertModel(BertConfig(vocab_size=len(tiny_tokenizer()), hidden_size=24, num_hidden_layers=2,
                             intermediate_size=48, num_attention_heads=4,
                             max_position_embeddings=64, initializer_range=0.2)
                  ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pcc(source: Path, *, large: bool = False, config: PCCConfig = CONFIG) -> PCCCompressor:
    """A compressor whose LoRA, if any, has an effect, as if it had been trained."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        encoder = load_encoder(source, large=large, lora_rank=4, lora_alpha=8)
        with torch.no_grad():
            for name, parameter in encoder.model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
        return PCCCompressor(tiny_backbone("llama"), encoder, replace(config, encoder=str(source)))


class _Contract(CompressorContract):
    impossible_factor = 8.0
    impossible_factor_message = r"makes 6 slots of every segment of 24 tokens \(4x\); it cannot make 8x"


class TestTrainedWhole(_Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def compressor(cls, tmp_path_factory: pytest.TempPathFactory) -> PCCCompressor:
        return pcc(save_tiny("gpt2", tmp_path_factory.mktemp("lite")))

    def test_every_segment_stands_in_its_own_bracket(self, compressor: PCCCompressor) -> None:
        text = "The keeper painted the stairs red every spring, and the lamp green."
        ids = compressor.encoder.tokenizer.encode(text)
        count = len(compressor.config.segment_lengths(len(ids)))
        assert count > 1
        span = compressor.compress([Chunk("d", text, 0, len(text), len(ids))])[0]
        assert span.num_slots == 6 * count + 2 * (count - 1)
        opening, closing = (compressor.spec.delimiters[n][0] for n in ("before", "after"))
        for segment in range(1, count):
            assert span.embeds[8 * segment - 2].equal(closing)
            assert span.embeds[8 * segment - 1].equal(opening)

    @pytest.mark.parametrize(("tokens", "slots"), [(1, 6), (24, 6), (25, 6 + 2 + 6), (72, 3 * 6 + 2 * 2)])
    def test_brackets_between_segments_are_counted(self, tokens: int, slots: int, compressor: PCCCompressor) -> None:
        assert compressor.num_slots(tokens) == compressor.num_slots(tokens, 4.0) == slots

    def test_padding_is_read_only_where_asked_for(self, compressor: PCCCompressor) -> None:
        short, long = [5, 6, 7], list(range(20))
        alone = compressor.memory([short])[0]
        torch.testing.assert_close(compressor.memory([short, long])[0], alone, atol=1e-5, rtol=0)
        attended = PCCCompressor(compressor.backbone, compressor.encoder, PCCConfig(24, 6, "attended"))
        padded = [*short, *[compressor.encoder.padding_id] * 17]
        torch.testing.assert_close(attended.memory([short, long])[0], compressor.memory([padded])[0], atol=1e-5, rtol=0)
        assert (attended.memory([short, long])[0] - alone).abs().max() > 1e-3

    def test_sizes_that_the_encoder_cannot_hold_are_refused(self, compressor: PCCCompressor) -> None:
        with pytest.raises(InputError, match=r"expected 1 to 64 slots per segment.*got 65"):
            PCCCompressor(compressor.backbone, compressor.encoder, PCCConfig(256, 65))
        with pytest.raises(InputError, match="do not fit the 512 positions of the encoder"):
            PCCCompressor(compressor.backbone, compressor.encoder, PCCConfig(512, 64))


class TestLoRA(_Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def compressor(cls, tmp_path_factory: pytest.TempPathFactory) -> PCCCompressor:
        return pcc(save_tiny("llama", tmp_path_factory.mktemp("large")), large=True)

    def test_a_saved_adapter_names_its_encoder_and_no_other_place(self, compressor: PCCCompressor,
                                                                  tmp_path: Path) -> None:
        compressor.config = replace(compressor.config, encoder="OWNER/ENCODER")
        compressor.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "encoder" / "adapter_config.json").read_text("utf-8"))
        assert saved["base_model_name_or_path"] == "OWNER/ENCODER"
        card = (tmp_path / "README.md").read_text("utf-8")
        assert "encoder OWNER/ENCODER: 6 slots for a segment of 24 tokens" in card


class TestBidirectionalEncoder(_Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def compressor(cls, tmp_path_factory: pytest.TempPathFactory) -> PCCCompressor:
        return pcc(save_bert(tmp_path_factory.mktemp("bert")))


class TestSpread(CompressorContract):
    impossible_factor = 0.5
    impossible_factor_message = "expected a compression factor of at least 1, got 0.5"

    def inner_brackets(self, compressor: Compressor, span: MemorySpan) -> int:
        return 2 * (math.ceil(span.num_source_tokens / 24) - 1)

    @pytest.fixture(scope="class")
    @classmethod
    def compressor(cls, tmp_path_factory: pytest.TempPathFactory) -> PCCCompressor:
        return pcc(save_tiny("llama", tmp_path_factory.mktemp("spread")), large=True, config=SPREAD)

    def test_slots_stand_on_the_last_token_of_their_piece_of_text(self, compressor: PCCCompressor) -> None:
        rows = torch.randn(3, compressor.backbone.hidden_size)
        segments = compressor.config.segments(30, 12.0)
        assert [s.places for s in segments] == [(11, 23), (5,)]
        span, positions, occupied = compressor.bracketed(rows, segments)
        opening, closing = (compressor.spec.delimiters[n][0] for n in ("before", "after"))
        # two segments of 24 and 6 tokens, </mem> and <mem> between them
        torch.testing.assert_close(span, torch.stack([rows[0], rows[1], closing, opening, rows[2]]))
        assert (positions.tolist(), occupied) == ([11, 23, 24, 25, 31], 32)

    @pytest.mark.parametrize("factor", [1.0, 4.0, 16.0])
    def test_memory_is_converted_at_the_factor_it_was_made_with(self, factor: float, compressor: PCCCompressor) -> None:
        text = "The keeper painted the stairs red every spring, and the lamp green."
        chunk = Chunk("d", text, 0, len(text), 1)
        [span] = compressor.compress([chunk], compression_factor=factor)
        [memory] = compressor.latent.compress([chunk], compression_factor=factor)
        again = compressor.read(memory, chunk)
        assert isinstance(again, type(span))
        assert_same_span(again, span)
        assert compressor.chunk_slots(chunk, factor) == span.num_slots
        assert compressor.latent.chunk_slots(chunk, factor) == memory.num_slots

    def test_factors_of_one_call_are_those_of_single_calls(self, compressor: PCCCompressor) -> None:
        texts, factors = [list(range(9)), list(range(30)), list(range(20))], [2.0, 8.0, None]
        together = compressor.memory(texts, factors)
        assert [len(m) for m in together] == [5, 4, 5]
        for text, factor, slots in zip(texts, factors, together, strict=True):
            torch.testing.assert_close(compressor.memory([text], [factor])[0], slots, atol=1e-5, rtol=0)

    def test_attended_padding_is_refused(self, compressor: PCCCompressor) -> None:
        with pytest.raises(InputError, match="padding='attended' goes with slot_positions='consecutive'"):
            PCCCompressor(compressor.backbone, compressor.encoder, replace(SPREAD, padding="attended"))
