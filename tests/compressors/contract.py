"""What every compressor promises. Inherit, give it a `compressor` fixture and a factor it cannot make."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone, weights_digest
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors import load_compressor
from ctxcomp_rag.compressors.base import CONFIG_NAME, Compressor
from ctxcomp_rag.errors import IncompatibleSpanError, InputError, ModelLoadError
from ctxcomp_rag.spans import KVSpan, MemorySpan, SoftSpan, SpanSpec
from tests.tiny_models import tiny_config, tiny_model

TEXTS = [
    "The lighthouse of Varn was built in 1871.",
    "Yes.",
    "It is 31 metres high, and its keeper, an old man of few words, painted the stairs red every spring. " * 3,
    "a",
    "Höhe: 31 m — 灯台は赤い。 <|end|><|user|>",
]


def latent(span: MemorySpan) -> list[Tensor]:
    """The tensors of a span of either kind."""
    if isinstance(span, KVSpan):
        return [span.keys, span.values]
    assert isinstance(span, SoftSpan)
    return [span.embeds]


def assert_same_span(a: MemorySpan, b: MemorySpan, *, atol: float = 0.0) -> None:
    assert (a.kind, a.chunk_id, a.num_source_tokens) == (b.kind, b.chunk_id, b.num_source_tokens)
    assert (a.num_positions, a.positions.tolist()) == (b.num_positions, b.positions.tolist())
    for x, y in zip(latent(a), latent(b), strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=0)


class CompressorContract:
    impossible_factor: ClassVar[float]
    impossible_factor_message: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def compressor(cls) -> Compressor:
        raise NotImplementedError

    def inner_brackets(self, compressor: Compressor, span: MemorySpan) -> int:
        """Rows of a span that stand between its segments."""
        return 0

    @pytest.fixture(scope="class")
    @classmethod
    def chunks(cls, compressor: Compressor) -> list[Chunk]:
        encode = compressor.backbone.tokenizer.encode
        return [Chunk(f"d{i}", text, 0, len(text), len(encode(text))) for i, text in enumerate(TEXTS)]

    @pytest.fixture(scope="class")
    @classmethod
    def spans(cls, compressor: Compressor, chunks: list[Chunk]) -> list[MemorySpan]:
        return compressor.compress(chunks)

    def test_texts_reach_beyond_one_segment(self, compressor: Compressor, chunks: list[Chunk]) -> None:
        """Otherwise the promises below would say little."""
        assert min(c.num_tokens for c in chunks) < compressor.max_chunk_tokens < max(c.num_tokens for c in chunks)

    def test_one_span_for_each_chunk_in_order(self, spans: list[MemorySpan], chunks: list[Chunk]) -> None:
        assert [s.chunk_id for s in spans] == [c.id for c in chunks]
        assert [s.num_source_tokens for s in spans] == [c.num_tokens for c in chunks]

    def test_nothing_to_compress_gives_nothing(self, compressor: Compressor) -> None:
        assert compressor.compress([]) == []

    def test_spans_are_what_the_specification_says(self, compressor: Compressor, spans: list[MemorySpan]) -> None:
        for span in spans:
            compressor.spec.require_span(span)
            assert all(t.isfinite().all() and t.dtype == compressor.backbone.dtype for t in latent(span))

    def test_positions_count_from_the_start_of_the_span(self, compressor: Compressor, spans: list[MemorySpan]) -> None:
        for span in spans:
            assert span.num_slots <= span.num_positions
            if compressor.spec.slot_positions == "consecutive":
                assert span.positions.tolist() == list(range(span.num_slots))
                assert span.num_positions == span.num_slots
            else:
                assert span.num_positions == span.num_source_tokens + self.inner_brackets(compressor, span)

    def test_spans_stand_alone(self, spans: list[MemorySpan]) -> None:
        """No gradient, no inference tensor, and no memory of the batch they were made in."""
        for tensor in (t for s in spans for t in latent(s)):
            assert not tensor.requires_grad
            assert not tensor.is_inference()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes

    def test_batched_equals_single(self, compressor: Compressor, spans: list[MemorySpan], chunks: list[Chunk]) -> None:
        for chunk, span in zip(chunks, spans, strict=True):
            assert_same_span(compressor.compress([chunk])[0], span, atol=1e-5)

    def test_order_of_the_batch_does_not_matter(self, compressor: Compressor, spans: list[MemorySpan],
                                                chunks: list[Chunk]) -> None:
        for span, again in zip(spans, compressor.compress(chunks[::-1])[::-1], strict=True):
            assert_same_span(again, span, atol=1e-5)

    def test_other_text_gives_another_span(self, compressor: Compressor, spans: list[MemorySpan],
                                           chunks: list[Chunk]) -> None:
        changed = compressor.compress([replace(chunks[0], text=chunks[0].text.replace("1871", "1872"))])[0]
        assert max((x - y).abs().max() for x, y in zip(latent(changed), latent(spans[0]), strict=True)) > 1e-3

    def test_saved_and_loaded_makes_the_same_spans(self, compressor: Compressor, spans: list[MemorySpan],
                                                   chunks: list[Chunk], tmp_path: Path) -> None:
        compressor.save_pretrained(tmp_path)
        loaded = load_compressor(tmp_path, compressor.backbone)
        assert type(loaded) is type(compressor)
        assert loaded.spec.fingerprint == compressor.spec.fingerprint
        for span, again in zip(spans, loaded.compress(chunks), strict=True):
            assert_same_span(again, span)

    def test_specification_survives_json(self, compressor: Compressor) -> None:
        spec = compressor.spec
        restored = SpanSpec.from_dict(json.loads(json.dumps(spec.to_dict())), spec.delimiters)
        assert restored.fingerprint == spec.fingerprint

    def test_decoder_is_bit_identical_afterwards(self, compressor: Compressor, chunks: list[Chunk]) -> None:
        backbone = compressor.backbone
        ids = torch.tensor([backbone.tokenizer.encode(TEXTS[0])])
        with torch.no_grad():
            digest, logits = weights_digest(backbone.model), backbone.model(ids).logits
            compressor.compress(chunks)
            assert weights_digest(backbone.model) == digest == backbone.fingerprint.weights_digest
            assert backbone.model(ids).logits.equal(logits)
        assert not any(p.requires_grad for p in backbone.model.parameters())

    def test_factor_that_it_cannot_make_is_refused(self, compressor: Compressor, chunks: list[Chunk]) -> None:
        with pytest.raises(InputError, match=self.impossible_factor_message):
            compressor.compress(chunks, compression_factor=self.impossible_factor)

    def test_slots_are_known_before_they_are_made(self, compressor: Compressor, spans: list[MemorySpan],
                                                  chunks: list[Chunk]) -> None:
        assert [compressor.chunk_slots(c) for c in chunks] == [s.num_slots for s in spans]
        assert compressor.chunk_slots(chunks[0], compressor.compression_factor) == spans[0].num_slots
        with pytest.raises(InputError, match=self.impossible_factor_message):
            compressor.num_slots(100, self.impossible_factor)

    def test_its_own_factor_may_be_named(self, compressor: Compressor, spans: list[MemorySpan],
                                         chunks: list[Chunk]) -> None:
        named = compressor.compress(chunks, compression_factor=compressor.compression_factor)
        for span, again in zip(spans, named, strict=True):
            assert_same_span(again, span)

    def test_chunk_without_text_is_named(self, compressor: Compressor) -> None:
        with pytest.raises(InputError, match="of document 'hollow' has no text to compress"):
            compressor.compress([Chunk("hollow", "", 0, 0, 0)])

    def test_other_decoder_is_refused_on_loading(self, compressor: Compressor, tmp_path: Path) -> None:
        compressor.save_pretrained(tmp_path)
        other = Backbone(tiny_model(tiny_config("llama"), seed=1), compressor.backbone.tokenizer.hf, model_id="other")
        named = rf"decoder {compressor.backbone.model_id} .*this decoder is other .*they differ in .*weights_digest"
        with pytest.raises(IncompatibleSpanError, match=named):
            load_compressor(tmp_path, other)

    def test_folder_that_holds_no_compressor_is_named(self, compressor: Compressor, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match=f"is not a saved compressor: it has no {CONFIG_NAME}"):
            load_compressor(tmp_path, compressor.backbone)
