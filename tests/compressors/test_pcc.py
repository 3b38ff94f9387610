"""PCC: brackets, segments, padding. The numbers of the official code are in test_golden_pcc.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors.pcc import PCCCompressor, PCCConfig, load_encoder
from ctxcomp_rag.errors import InputError
from tests.compressors.contract import CompressorContract
from tests.tiny_models import save_tiny, tiny_backbone, tiny_tokenizer

CONFIG = PCCConfig(segment_tokens=24, slots_per_segment=6)


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
        config = PCCConfig(config.segment_tokens, config.slots_per_segment, config.padding, str(source))
        return PCCCompressor(tiny_backbone("llama"), encoder, config)


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


class TestBidirectionalEncoder(_Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def compressor(cls, tmp_path_factory: pytest.TempPathFactory) -> PCCCompressor:
        return pcc(save_bert(tmp_path_factory.mktemp("bert")))
