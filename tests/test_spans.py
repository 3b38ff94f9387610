"""What a span and its specification promise, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from ctxcomp_rag.errors import IncompatibleSpanError, SpanShapeError
from ctxcomp_rag.spans import DecoderFingerprint, KVSpan, SoftSpan, SpanSpec

DECODER = DecoderFingerprint(
    model_id="org/model", revision="abc", weights_digest="w" * 64, tokenizer_digest="t" * 64, hidden_size=8,
    num_layers=2, num_kv_heads=3, head_dim=4, rope='{"rope_theta": 10000.0}', dtype="float32",
)


def soft(**changes: Any) -> SoftSpan:
    fields = {"chunk_id": "c1", "num_source_tokens": 12, "positions": torch.tensor([3, 7, 11]), "num_positions": 12,
              "embeds": torch.ones(3, 8)}
    return SoftSpan(**{**fields, **changes})


def kv(**changes: Any) -> KVSpan:
    fields = {"chunk_id": "c1", "num_source_tokens": 12, "positions": torch.tensor([0, 1, 2]), "num_positions": 3,
              "keys": torch.ones(2, 3, 3, 4), "values": torch.ones(2, 3, 3, 4)}
    return KVSpan(**{**fields, **changes})


def spec(**changes: Any) -> SpanSpec:
    fields = {"kind": "soft", "decoder": DECODER, "compressor": "icae-1", "delimiters": {"after": torch.ones(1, 8)}}
    return SpanSpec(**{**fields, **changes})


def test_span_counts_slots_and_source_tokens() -> None:
    span = soft()
    assert (span.kind, span.num_slots, span.compression_factor, span.hidden_size) == ("soft", 3, 4.0, 8)
    assert span.nbytes == 3 * 8 * 4
    assert (kv().kind, kv().num_layers, kv().num_kv_heads, kv().nbytes) == ("kv", 2, 3, 2 * 2 * 3 * 3 * 4 * 4)


def test_span_is_immutable_and_detached() -> None:
    span = soft(embeds=torch.ones(3, 8, requires_grad=True))
    assert not span.embeds.requires_grad
    with pytest.raises(FrozenInstanceError):
        span.num_positions = 20  # type: ignore[misc]


def test_positions_become_int64() -> None:
    assert soft(positions=torch.tensor([0, 1, 2], dtype=torch.int32)).positions.dtype == torch.int64


@pytest.mark.parametrize(("changes", "match"), [
    ({"positions": torch.tensor([[0, 1, 2]])}, r"positions must be \(num_slots,\).*got \(1, 3\)"),
    ({"positions": torch.tensor([], dtype=torch.long)}, r"at least one slot, got \(0,\)"),
    ({"positions": torch.tensor([0, 2, 2])}, r"strictly increasing from 0 or more, got \[0, 2, 2\]"),
    ({"positions": torch.tensor([-1, 0, 1])}, r"strictly increasing from 0 or more, got \[-1, 0, 1\]"),
    ({"num_positions": 11}, "num_positions must be greater than the last slot's position 11, got 11"),
    ({"num_source_tokens": 0}, "num_source_tokens must be at least 1, got 0"),
    ({"embeds": torch.ones(2, 8)}, r"embeds must have shape \(3, \*\), got \(2, 8\)"),
    ({"embeds": torch.ones(1, 3, 8)}, r"embeds must have shape \(3, \*\), got \(1, 3, 8\)"),
    ({"embeds": torch.ones(3, 8, dtype=torch.long)}, r"embeds must be a floating point tensor, got torch\.int64"),
])
def test_soft_span_refuses(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(SpanShapeError, match=match):
        soft(**changes)


@pytest.mark.parametrize(("changes", "match"), [
    ({"keys": torch.ones(2, 3, 4, 4)}, r"keys must have shape \(\*, \*, 3, \*\), got \(2, 3, 4, 4\)"),
    ({"keys": torch.ones(3, 3, 4)}, r"keys must have shape \(\*, \*, 3, \*\), got \(3, 3, 4\)"),
    ({"values": torch.ones(2, 2, 3, 4)}, r"values must have shape \(2, 3, 3, \*\), got \(2, 2, 3, 4\)"),
    ({"values": torch.ones(2, 3, 3, 4, dtype=torch.int8)}, "values must be a floating point tensor"),
    ({"kept": torch.zeros(2, 3, 4, dtype=torch.int32)}, r"integers of shape \(2, 3, 3\), got .*\(2, 3, 4\)"),
    ({"kept": torch.arange(3.0).expand(2, 3, 3)}, r"kept must be integers of shape .*got torch\.float32"),
    ({"kept": torch.tensor([0, 2, 1]).expand(2, 3, 3)}, "kept must increase from slot to slot"),
    ({"kept": torch.tensor([0, 1, 12]).expand(2, 3, 3)}, r"name tokens 0 to 11 of the chunk, got 0 to 12"),
    ({"kept": torch.tensor([-1, 1, 2]).expand(2, 3, 3)}, r"name tokens 0 to 11 of the chunk, got -1 to 2"),
])
def test_kv_span_refuses(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(SpanShapeError, match=match):
        kv(**changes)


def test_kept_tokens_become_int32() -> None:
    span = kv(kept=torch.tensor([0, 5, 11]).expand(2, 3, 3))
    assert span.kept is not None
    assert (span.kept.dtype, span.kept[1, 2].tolist()) == (torch.int32, [0, 5, 11])
    assert kv().kept is None


def test_delimiter_has_the_hidden_size_of_the_decoder() -> None:
    with pytest.raises(SpanShapeError, match=r"delimiter 'after' must have shape \(\*, 8\), got \(1, 9\)"):
        spec(delimiters={"after": torch.ones(1, 9)})


def test_specification_survives_json() -> None:
    original = spec(slot_positions="spread")
    restored = SpanSpec.from_dict(json.loads(json.dumps(original.to_dict())), original.delimiters)
    assert restored.to_dict() == original.to_dict()
    assert restored.fingerprint == original.fingerprint
    assert restored.decoder == DECODER


@pytest.mark.parametrize("delimiters", [{}, {"after": torch.ones(2, 8)}, {"before": torch.ones(1, 8)}])
def test_delimiters_must_be_those_that_the_json_names(delimiters: dict[str, torch.Tensor]) -> None:
    with pytest.raises(SpanShapeError, match=r"names the delimiters \{'after': \(1, 8\)\}, the tensor file holds"):
        SpanSpec.from_dict(spec().to_dict(), delimiters)


@pytest.mark.parametrize("other", [
    spec(kind="kv"),
    spec(compressor="icae-2"),
    spec(slot_positions="spread"),
    spec(delimiters={}),
    spec(delimiters={"before": torch.ones(1, 8)}),
    spec(delimiters={"after": torch.full((1, 8), 2.0)}),
    *(spec(decoder=replace(DECODER, **change)) for change in (
        {"weights_digest": "x"}, {"tokenizer_digest": "x"}, {"rope": "x"}, {"dtype": "bfloat16"}, {"num_layers": 3},
        {"num_kv_heads": 1}, {"head_dim": 8})),
])
def test_fingerprint_depends_on_everything_that_decides(other: SpanSpec) -> None:
    assert other.fingerprint != spec().fingerprint


def test_fingerprint_does_not_depend_on_what_the_decoder_is_called() -> None:
    renamed = spec(decoder=replace(DECODER, model_id="/home/me/model", revision=""))
    assert renamed.fingerprint == spec().fingerprint
    spec().require_decoder(renamed.decoder)


def test_fingerprint_does_not_depend_on_the_order_of_delimiters() -> None:
    a, b = torch.ones(1, 8), torch.zeros(2, 8)
    assert spec(delimiters={"a": a, "b": b}).fingerprint == spec(delimiters={"b": b, "a": a}).fingerprint


def test_other_decoder_is_refused_naming_both_and_the_difference() -> None:
    other = replace(DECODER, model_id="org/other", weights_digest="v" * 64, dtype="bfloat16")
    named = r"org/model@abc.*w{12}.*org/other@abc.*v{12}.*weights_digest, dtype"
    with pytest.raises(IncompatibleSpanError, match=named):
        spec().require_decoder(other)


def test_other_compressor_is_refused_naming_both() -> None:
    with pytest.raises(IncompatibleSpanError, match=r"icae-1 \(soft, consecutive\).*pcc-7 \(soft, consecutive\)"):
        spec().require_compressor(spec(compressor="pcc-7"))
    spec().require_compressor(spec())


def test_other_decoder_is_refused_before_the_compressors_are_compared() -> None:
    with pytest.raises(IncompatibleSpanError, match="differ in dtype"):
        spec().require_compressor(spec(decoder=replace(DECODER, dtype="float16"), compressor="pcc-7"))


def test_span_must_be_of_the_specified_kind_and_size() -> None:
    spec().require_span(soft())
    spec(kind="kv").require_span(kv())
    with pytest.raises(SpanShapeError, match="expected a soft span, got the kv span 'c1'"):
        spec().require_span(kv())
    with pytest.raises(SpanShapeError, match=r"embeds of 'c1' must have shape \(3, 8\), got \(3, 6\)"):
        spec().require_span(soft(embeds=torch.ones(3, 6)))
    with pytest.raises(SpanShapeError, match=r"keys of 'c1' must have shape \(2, 3, 3, 4\), got \(4, 3, 3, 4\)"):
        spec(kind="kv").require_span(kv(keys=torch.ones(4, 3, 3, 4), values=torch.ones(4, 3, 3, 4)))
