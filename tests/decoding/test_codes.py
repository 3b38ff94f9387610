"""Spans in codes: decoded where the decoder reads them, and nowhere before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.codes import ScaledCodes
from ctxcomp_rag.decoding import Blended, FrozenDecoder, Part, TokenIds, splice
from ctxcomp_rag.decoding.batching import prefill
from ctxcomp_rag.errors import IncompatibleSpanError
from ctxcomp_rag.index.codecs import CODECS
from ctxcomp_rag.index.rows import span_from_bytes, span_to_bytes
from ctxcomp_rag.spans import KVSpan, MemorySpan, SoftSpan
from tests.tiny_models import tiny_backbone

CODED = ["int8", "fp8"]
TENSORS = ("embeds", "keys", "values")


def stored(span: MemorySpan, codec: str = "int8") -> MemorySpan:
    return span_from_bytes(span_to_bytes(span, CODECS[codec]))


def soft(backbone: Backbone, slots: int = 6) -> SoftSpan:
    torch.manual_seed(slots)
    return SoftSpan("s" * 32, 4 * slots, torch.arange(slots), slots, torch.randn(slots, backbone.hidden_size))


def kv(backbone: Backbone, slots: int = 5) -> KVSpan:
    torch.manual_seed(slots)
    sizes = (int(backbone.config.num_hidden_layers), backbone.num_kv_heads, slots, backbone.head_dim)
    return KVSpan("k" * 32, 4 * slots, torch.arange(slots), slots, torch.randn(sizes), torch.randn(sizes))


def in_codes(span: MemorySpan) -> bool:
    held = [span.held(name) for name in TENSORS if name in vars(span)]
    return all(isinstance(latent, ScaledCodes) for latent in held)


def with_tensors(span: Any) -> Any:
    """The same span as if it had been decoded when it was read."""
    return replace(span, **{name: getattr(span, name).clone() for name in TENSORS if name in vars(span)})


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("role", ["embeds", "keys", "values"])
def test_decoding_into_a_buffer_is_the_product_rounded_once(codec: str, dtype: torch.dtype, role: Any) -> None:
    tensor = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    pieces = CODECS[codec].encode(tensor, role)
    codes = CODECS[codec].read(pieces, role, (3, 7, 16), dtype)
    assert isinstance(codes, ScaledCodes)
    expected = (pieces["codes"].double() * pieces["scale"].double()).to(dtype)
    buffer = torch.full((3, 9, 16), 5.0, dtype=dtype)
    codes.decode_into(buffer[:, 1:8])
    assert torch.equal(buffer[:, 1:8], expected)
    assert bool((buffer[:, [0, 8]] == 5).all())
    assert torch.equal(codes[2].decoded(), expected[2])
    assert torch.equal(codes.decoded(), expected)
    other = torch.empty(3, 7, 16, dtype=torch.float64)
    codes.decode_into(other)
    assert torch.equal(other, expected.double()), "another dtype gets the tensor as it is in its own"
    assert torch.equal(codes.rows(torch.tensor([1, 4])).decoded(), expected[:, [1, 4]])


def test_codes_lie_over_the_bytes_that_were_read() -> None:
    data = bytearray(span_to_bytes(soft(tiny_backbone("llama")), CODECS["int8"]))
    codes = span_from_bytes(data).held("embeds")  # type: ignore[arg-type]
    assert isinstance(codes, ScaledCodes)
    before = codes.decoded()
    at = codes.codes.data_ptr() - torch.frombuffer(data, dtype=torch.uint8).data_ptr()
    data[at] ^= 1
    assert int((codes.decoded() != before).sum()) == 1


@pytest.mark.parametrize("codec", CODED)
def test_the_prompt_is_the_same_and_the_span_stays_in_codes(codec: str) -> None:
    backbone = tiny_backbone("llama")
    spans = [stored(soft(backbone, n), codec) for n in (6, 3)]
    parts: list[Part] = [TokenIds((1, 7)), *spans, TokenIds((9, 4))]
    (run,) = splice(parts, backbone).runs
    assert all(map(in_codes, spans))
    (expected,) = splice([parts[0], *map(with_tensors, spans), parts[-1]], backbone).runs
    assert torch.equal(run.embeds, expected.embeds)  # type: ignore[union-attr]
    assert not all(map(in_codes, spans)), "asked for the tensor, a span holds it"


def logits(parts: list[Part], backbone: Backbone) -> Tensor:
    return prefill([splice(parts, backbone)], backbone).logits


@pytest.mark.parametrize("codec", CODED)
def test_entries_are_decoded_where_the_cache_keeps_them(codec: str) -> None:
    backbone = tiny_backbone("llama")
    spans = [stored(kv(backbone, n), codec) for n in (5, 2, 4)]
    parts: list[Part] = [*spans[:2], TokenIds((7, 8)), spans[2], TokenIds((9, 4))]
    read = logits(parts, backbone)
    assert all(map(in_codes, spans))
    decoded = [with_tensors(span) for span in spans]
    assert torch.equal(read, logits([*decoded[:2], parts[2], decoded[2], parts[4]], backbone))


def test_a_span_in_codes_is_blended_as_its_tensors_are() -> None:
    backbone = tiny_backbone("llama")
    rows = soft(backbone, 5).embeds
    span = stored(kv(backbone))
    read = logits([TokenIds((1, 2)), Blended(span, rows, 0.4), TokenIds((9, 4))], backbone)
    assert in_codes(span)
    assert torch.equal(read, logits([TokenIds((1, 2)), Blended(with_tensors(span), rows, 0.4), TokenIds((9, 4))],
                                    backbone))


def test_the_first_slots_of_a_nested_span_are_taken_from_its_codes() -> None:
    span = stored(replace(soft(tiny_backbone("llama")), order=torch.tensor([5, 2, 0, 1, 3, 4])))
    assert isinstance(span, SoftSpan)
    first = span.first(3)
    assert in_codes(first)
    assert torch.equal(first.embeds, span.embeds[[0, 2, 5]])


def test_a_span_first_asked_for_in_inference_mode_serves_gradients_later() -> None:
    span: Any = stored(soft(tiny_backbone("llama")))
    with torch.inference_mode():
        assert not span.embeds.is_inference()
    scale = torch.ones((), requires_grad=True)
    (span.embeds * scale).sum().backward()
    torch.testing.assert_close(scale.grad, span.embeds.sum())


def test_a_bounded_cache_reads_codes_as_it_reads_tensors() -> None:
    backbone = tiny_backbone("llama")
    decoder = FrozenDecoder(backbone, cache_budget=64)
    for span in (stored(soft(backbone)), stored(kv(backbone))):
        read = decoder.generate([TokenIds((1, 2)), span, TokenIds((9, 4))])
        tensors = decoder.generate([TokenIds((1, 2)), with_tensors(span), TokenIds((9, 4))])
        assert read.token_ids == tensors.token_ids


def test_values_of_another_size_are_refused_as_keys_are() -> None:
    backbone = tiny_backbone("llama")
    span = kv(backbone)
    narrow = replace(span, values=span.values[..., :1].clone())
    for given in (narrow, stored(narrow)):
        with pytest.raises(IncompatibleSpanError, match=r"holds values of shape .*, 1\), the decoder"):
            splice([given, TokenIds((9, 4))], backbone)


def test_sizes_are_those_of_the_tensors() -> None:
    backbone = tiny_backbone("llama")
    for span in (soft(backbone), kv(backbone)):
        read = stored(span)
        assert read.nbytes == span.nbytes
        assert in_codes(read)


def test_codes_that_are_not_of_the_span_are_refused_when_it_is_read() -> None:
    span, other = soft(tiny_backbone("llama")), soft(tiny_backbone("llama"), 7)
    assert isinstance(span, SoftSpan)
    pieces = CODECS["int8"].encode(other.embeds, "embeds")
    with pytest.raises(ValueError, match=r"codes of shape \(7, \d+\) stand for a tensor of shape \(6, \d+\)"):
        CODECS["int8"].read(pieces, "embeds", tuple(span.embeds.shape), torch.float32)
    for codes, scale in ((pieces["codes"].int(), pieces["scale"]), (pieces["codes"], pieces["scale"].int())):
        with pytest.raises(ValueError, match=r"expected codes of one byte and a floating point scale, got torch\.int"):
            ScaledCodes(codes, scale, torch.float32)
    with pytest.raises(ValueError, match=r"a scale of shape \(1, 4\) does not fit codes of shape \(7, \d+\)"):
        ScaledCodes(pieces["codes"], torch.ones(1, 4), torch.float32)
