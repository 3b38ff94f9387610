"""Codecs: spans in fewer bytes, at the error that each states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ctxcomp_rag.errors import IndexDamagedError, InputError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.index.codecs import CODECS, Role
from ctxcomp_rag.index.codecs.rotated import rotate, rotate_back
from ctxcomp_rag.index.rows import span_from_bytes, span_to_bytes
from ctxcomp_rag.spans import KVSpan, LatentSpan, SoftSpan
from tests.index.conftest import SOFT, VECTOR_SIZE, make_corpus

# largest relative squared error on normal values
ERROR = {"exact": 0.0, "int8": 1e-4, "fp8": 1e-3, "int4": 1e-2, "rotated4": 1.2e-2, "rotated3": 4e-2, "rotated2": 0.13}
# an element, for float32 spans of 36 slots
BYTES = {"exact": 4.0, "int8": 1.1, "fp8": 1.1, "int4": 0.7, "rotated4": 0.54, "rotated3": 0.42, "rotated2": 0.29}


def soft_span(embeds: Tensor, chunk_id: str = "c" * 32) -> SoftSpan:
    n = embeds.shape[0]
    return SoftSpan(chunk_id, 4 * n, torch.arange(n), n, embeds)


def kv_span(layers: int, heads: int, slots: int, size: int, dtype: torch.dtype = torch.float32) -> KVSpan:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, layers, heads, slots, size, generator=generator).to(dtype)
    return KVSpan("c" * 32, 4 * slots, torch.arange(slots), slots, keys, values)


def relative_error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).square().sum() / x.double().square().sum())


@pytest.fixture
def normal() -> Tensor:
    return torch.randn(36, 192, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("codec", CODECS)
def test_a_soft_span_comes_back_within_the_stated_error_and_size(codec: str, normal: Tensor) -> None:
    span = soft_span(normal)
    data = span_to_bytes(span, codec)
    read = span_from_bytes(data)
    assert isinstance(read, SoftSpan)
    assert relative_error(normal, read.embeds) <= ERROR[codec]
    assert read.embeds.dtype == normal.dtype
    assert len(data) <= BYTES[codec] * normal.numel() + 1000
    assert (read.chunk_id, read.num_source_tokens, read.num_positions) == (span.chunk_id, 144, 36)


@pytest.mark.parametrize("codec", CODECS)
def test_a_latent_span_is_stored_like_a_soft_one(codec: str, normal: Tensor) -> None:
    span = LatentSpan("c" * 32, 144, torch.arange(36), 36, normal)
    read = span_from_bytes(span_to_bytes(span, codec))
    soft = span_from_bytes(span_to_bytes(soft_span(normal), codec))
    assert isinstance(read, LatentSpan)
    assert isinstance(soft, SoftSpan)
    assert read.memory.equal(soft.embeds)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 3, 31, 16), (2, 1, 33, 40)])
def test_a_kv_span_of_any_shape_comes_back(codec: str, shape: tuple[int, int, int, int]) -> None:
    span = kv_span(*shape)
    read = span_from_bytes(span_to_bytes(span, codec))
    assert isinstance(read, KVSpan)
    assert relative_error(span.keys, read.keys) <= ERROR[codec]
    assert relative_error(span.values, read.values) <= ERROR[codec]


@pytest.mark.parametrize("codec", sorted(set(CODECS) - {"exact"}))
def test_bfloat16_spans_stay_bfloat16(codec: str) -> None:
    span = kv_span(1, 2, 12, 16, torch.bfloat16)
    read = span_from_bytes(span_to_bytes(span, codec))
    assert isinstance(read, KVSpan)
    assert read.keys.dtype == read.values.dtype == torch.bfloat16


@pytest.mark.parametrize("codec", sorted(set(CODECS) - {"exact"}))
def test_a_few_huge_channels_do_not_cost_the_others_their_precision(codec: str, normal: Tensor) -> None:
    normal[:, [3, 77, 150]] *= 60
    others = torch.ones(192, dtype=torch.bool)
    others[[3, 77, 150]] = False
    read = span_from_bytes(span_to_bytes(soft_span(normal), codec))
    assert isinstance(read, SoftSpan)
    assert relative_error(normal[:, others], read.embeds[:, others]) <= ERROR[codec]


@pytest.mark.parametrize("codec", sorted(set(CODECS) - {"exact"}))
@pytest.mark.parametrize("role", ["embeds", "keys", "values"])
def test_constant_and_zero_rows_and_channels_come_back_as_they_are(codec: str, role: Role) -> None:
    tensor = torch.zeros(5, 40)
    tensor[:, 7] = 64.0
    tensor[2] = -2.0
    chosen = CODECS[codec]
    read = chosen.decode(chosen.encode(tensor, role), role, (5, 40), torch.float32)
    if codec.startswith("rotated"):  # errors are spread over a row, in proportion to its length
        assert relative_error(tensor, read) <= ERROR[codec]
        assert not read[tensor.abs().amax(-1) == 0].any()
    else:
        assert torch.allclose(read, tensor, atol=0.3, rtol=0.04)
    assert bool(read.isfinite().all())


def test_int4_keeps_an_offset_that_is_large_against_the_range() -> None:
    tensor = 1000 + torch.rand(32, 8, generator=torch.Generator().manual_seed(0))
    read = CODECS["int4"].decode(CODECS["int4"].encode(tensor, "keys"), "keys", (32, 8), torch.float32)
    assert float((read - tensor).abs().max()) <= 1000 / 128 / 15 + 0.07  # the rounding of the offset widens the range


@pytest.mark.parametrize("width", [2, 3, 40, 64, 192, 384])
def test_the_rotation_is_orthogonal_and_spreads_every_channel(width: int) -> None:
    turned = rotate(torch.eye(width))
    assert torch.allclose(turned @ turned.T, torch.eye(width), atol=1e-5)
    assert torch.allclose(rotate_back(turned), torch.eye(width), atol=1e-5)
    assert float(turned.abs().max()) <= 4 / width**0.5


@pytest.mark.parametrize(("codec", "largest"), [("rotated4", 0.0095), ("rotated3", 0.0346), ("rotated2", 0.1176)])
def test_rotated_codes_reach_the_least_error_of_their_bits(codec: str, largest: float) -> None:
    """The distortion of Lloyd and Max for a normal (Max 1960, table I); 2 % more for what the scales are rounded by."""
    tensor = torch.randn(500, 256, generator=torch.Generator().manual_seed(0))
    chosen = CODECS[codec]
    read = chosen.decode(chosen.encode(tensor, "embeds"), "embeds", (500, 256), torch.float32)
    assert relative_error(tensor, read) <= largest * 1.02


def test_keys_share_scales_along_slots_and_values_along_channels() -> None:
    """KIVI: channels of keys differ in size, so a scale for each; values get one for each token."""
    tensor = torch.ones(6, 10)
    pieces = {role: CODECS["int8"].encode(tensor, role)["scale"].shape for role in ("embeds", "keys", "values")}
    assert pieces == {"embeds": (1, 10), "keys": (1, 10), "values": (6, 1)}


def test_a_span_that_is_not_finite_is_refused(normal: Tensor) -> None:
    normal[3, 5] = torch.nan
    with pytest.raises(InputError, match=r"expected finite embeds in the span .* for codec 'int8', got nan or inf"):
        span_to_bytes(soft_span(normal), "int8")


def test_an_unknown_codec_is_refused_with_the_known_ones(normal: Tensor) -> None:
    with pytest.raises(InputError, match=r"no span codec 'zip'; expected one of exact, int8, .*, rotated2"):
        span_to_bytes(soft_span(normal), "zip")


def test_an_index_stores_spans_as_its_codec_says_and_says_so_when_opened(tmp_path: Path) -> None:
    corpus = make_corpus(6)
    with MemoryIndex.create(tmp_path / "kb", SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="test",
                            codec="int8") as made:
        corpus.add_to(made)
    with MemoryIndex.open(tmp_path / "kb") as index:
        assert index.codec == "int8"
        assert index.verify().ok
        for span, stored in zip(corpus.spans, index.get(corpus.ids), strict=True):
            assert isinstance(span, SoftSpan)
            assert isinstance(stored.span, SoftSpan)
            assert 0 < relative_error(span.embeds, stored.span.embeds) <= ERROR["int8"]


def test_an_index_of_an_unknown_codec_is_refused_when_opened(tmp_path: Path) -> None:
    MemoryIndex.create(tmp_path / "kb", SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="test").close()
    manifest = tmp_path / "kb" / "index.json"
    manifest.write_text(manifest.read_text().replace('"exact"', '"zip"'))
    with pytest.raises(IndexDamagedError, match="no span codec 'zip'"):
        MemoryIndex.open(tmp_path / "kb")


def test_a_span_written_before_codecs_were_known_is_still_read(normal: Tensor) -> None:
    """Rows of the first format name no codec: their tensors are the latent itself."""
    about = {"kind": "soft", "chunk_id": "c" * 32, "num_source_tokens": 144, "num_positions": 36}
    tensors = {"positions": torch.arange(36), "embeds": normal}
    data = safetensors.torch.save(tensors, metadata={"span": json.dumps(about)})
    read = span_from_bytes(data)
    assert isinstance(read, SoftSpan)
    assert torch.equal(read.embeds, normal)
