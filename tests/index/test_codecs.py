"""Codecs: spans in fewer bytes, at the error that each states."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ctxcomp_rag.errors import IndexDamagedError, InputError
from ctxcomp_rag.index import MemoryIndex
from ctxcomp_rag.index.codecs import CODECS, Codec, Role, codec_named
from ctxcomp_rag.index.codecs.rotated import rotate, rotate_back
from ctxcomp_rag.index.rows import codec_for, span_from_bytes, span_to_bytes
from ctxcomp_rag.spans import KVSpan, LatentSpan, MemorySpan, SoftSpan
from tests.index.conftest import SOFT, VECTOR_SIZE, flip_byte, make_corpus

# largest relative squared error on normal values
ERROR = {"exact": 0.0, "int8": 1e-4, "fp8": 1e-3, "int4": 1e-2, "rotated4": 1.2e-2, "rotated3": 4e-2, "rotated2": 0.13,
         "pq4": 2e-2, "pq2": 0.2, "pq1": 0.45}
# an element, for float32 spans of 36 slots
BYTES = {"exact": 4.0, "int8": 1.1, "fp8": 1.1, "int4": 0.7, "rotated4": 0.54, "rotated3": 0.42, "rotated2": 0.29,
         "pq4": 0.5, "pq2": 0.25, "pq1": 0.125}
LEARNING = ["pq4", "pq2", "pq1"]
FIXED = sorted(set(CODECS) - {"exact", *LEARNING})


def soft_span(embeds: Tensor, chunk_id: str = "c" * 32) -> SoftSpan:
    n = embeds.shape[0]
    return SoftSpan(chunk_id, 4 * n, torch.arange(n), n, embeds)


def kv_span(layers: int, heads: int, slots: int, size: int, dtype: torch.dtype = torch.float32) -> KVSpan:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, layers, heads, slots, size, generator=generator).to(dtype)
    return KVSpan("c" * 32, 4 * slots, torch.arange(slots), slots, keys, values)


def relative_error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).square().sum() / x.double().square().sum())


@cache
def learned(name: str, *channels: int, outliers: tuple[int, ...] = ()) -> Codec:
    """A codec ready for tensors of (slots, *channels), of normals with a few channels 60 times as large."""
    rows = torch.randn(1024, math.prod(channels), generator=torch.Generator().manual_seed(5))
    rows[:, list(outliers)] *= 60
    codec = codec_named(name).learn({"embeds": rows})
    roles = ("embeds", "memory", "keys", "values")
    return codec.with_tables({n.replace("embeds", role): t for n, t in codec.tables.items() for role in roles})


def read_back(span: MemorySpan, codec: Codec) -> MemorySpan:
    return span_from_bytes(span_to_bytes(span, codec), lambda _: codec.tables)


def low_rank_span(rank: int, seed: int = 0, outliers: tuple[int, ...] = ()) -> SoftSpan:
    """Slots in a space of `rank` directions, the same for every seed."""
    directions = torch.randn(rank, 48, generator=torch.Generator().manual_seed(9))
    slots = torch.randn(30, rank, generator=torch.Generator().manual_seed(seed)) @ directions + 3
    slots[:, list(outliers)] *= 60
    return soft_span(slots, f"{seed:032x}")


@pytest.fixture
def normal() -> Tensor:
    return torch.randn(36, 192, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("codec", CODECS)
def test_a_soft_span_comes_back_within_the_stated_error_and_size(codec: str, normal: Tensor) -> None:
    span, chosen = soft_span(normal), learned(codec, 192)
    data = span_to_bytes(span, chosen)
    read = span_from_bytes(data, lambda _: chosen.tables)
    assert isinstance(read, SoftSpan)
    assert relative_error(normal, read.embeds) <= ERROR[codec]
    assert read.embeds.dtype == normal.dtype
    assert len(data) <= BYTES[codec] * normal.numel() + 1000
    assert (read.chunk_id, read.num_source_tokens, read.num_positions) == (span.chunk_id, 144, 36)


@pytest.mark.parametrize("codec", CODECS)
def test_a_latent_span_is_stored_like_a_soft_one(codec: str, normal: Tensor) -> None:
    span = LatentSpan("c" * 32, 144, torch.arange(36), 36, normal)
    chosen = learned(codec, 192)
    read, soft = read_back(span, chosen), read_back(soft_span(normal), chosen)
    assert isinstance(read, LatentSpan)
    assert isinstance(soft, SoftSpan)
    assert read.memory.equal(soft.embeds)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1, 1, 3, 8), (2, 3, 31, 16), (2, 1, 33, 42)])
def test_a_kv_span_of_any_shape_comes_back(codec: str, shape: tuple[int, int, int, int]) -> None:
    span = kv_span(*shape)
    read = read_back(span, learned(codec, shape[0], shape[1], shape[3]))
    assert isinstance(read, KVSpan)
    assert relative_error(span.keys, read.keys) <= ERROR[codec]
    assert relative_error(span.values, read.values) <= ERROR[codec]


@pytest.mark.parametrize("codec", [*FIXED, *LEARNING])
def test_bfloat16_spans_stay_bfloat16(codec: str) -> None:
    span = kv_span(1, 2, 12, 16, torch.bfloat16)
    read = read_back(span, learned(codec, 1, 2, 16))
    assert isinstance(read, KVSpan)
    assert read.keys.dtype == read.values.dtype == torch.bfloat16


@pytest.mark.parametrize("codec", [*FIXED, *LEARNING])
def test_a_few_huge_channels_do_not_cost_the_others_their_precision(codec: str, normal: Tensor) -> None:
    normal[:, [3, 77, 150]] *= 60
    others = torch.ones(192, dtype=torch.bool)
    others[[3, 77, 150]] = False
    read = read_back(soft_span(normal), learned(codec, 192, outliers=(3, 77, 150)))
    assert isinstance(read, SoftSpan)
    assert relative_error(normal[:, others], read.embeds[:, others]) <= ERROR[codec]


@pytest.mark.parametrize("codec", FIXED)
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
        span_to_bytes(soft_span(normal), CODECS["int8"])


@pytest.mark.parametrize("name", ["zip", "pca", "pca0", "pca-3"])
def test_an_unknown_codec_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=rf"no span codec '{name}'; expected one of exact, int8, .*, pq1, or pca with"):
        codec_named(name)


def test_a_product_quantiser_gives_the_nearest_of_its_points() -> None:
    codec = learned("pq2", 12)
    rows = torch.randn(7, 12, generator=torch.Generator().manual_seed(3))
    read = codec.decode(codec.encode(rows, "embeds"), "embeds", (7, 12), torch.float32)
    mean, size, points = (codec.tables[f"embeds.{name}"] for name in ("mean", "size", "points"))
    for row, found in zip((rows - mean) / size, (read - mean) / size, strict=True):
        for group in range(3):
            part = row[4 * group : 4 * group + 4]
            nearest = min(points[group], key=lambda p, part=part: float((p - part).square().sum()))  # type: ignore[misc]
            assert torch.allclose(found[4 * group : 4 * group + 4], nearest, atol=1e-5)


def test_one_bit_an_element_costs_less_where_channels_hang_together() -> None:
    spans = [low_rank_span(6, seed) for seed in range(40)]
    codec = codec_for(codec_named("pq1"), spans)
    new = low_rank_span(6, 99)
    read = read_back(new, codec)
    assert isinstance(read, SoftSpan)
    assert relative_error(new.embeds - 3, read.embeds - 3) < 0.2 < ERROR["pq1"]


@pytest.mark.parametrize("outliers", [(), (3, 17)])
def test_pca_keeps_all_of_spans_that_lie_in_its_directions(outliers: tuple[int, ...]) -> None:
    codec = codec_for(codec_named("pca6"), [low_rank_span(6, seed, outliers) for seed in range(4)])
    new = low_rank_span(6, 99, outliers)
    read = read_back(new, codec)
    assert isinstance(read, SoftSpan)
    others = [c for c in range(48) if c not in outliers]
    assert relative_error(new.embeds[:, others], read.embeds[:, others]) < 2e-4
    assert len(span_to_bytes(new, codec)) <= 30 * 6 + 6 * 2 + 30 * 8 + 700  # codes, scales, positions, header


def test_pca_loses_what_lies_outside_its_directions() -> None:
    """The error is the share of the variance that the directions left out hold: the definition of the components."""
    spans = [low_rank_span(6, seed) for seed in range(40)]
    codec = codec_for(codec_named("pca3"), spans)
    rows = torch.cat([span.embeds for span in spans])
    standard = (rows - rows.mean(0)) / rows.std(0, correction=0)
    variances = torch.linalg.svdvals(standard).square()
    read = torch.cat([read_back(span, codec).embeds for span in spans])  # type: ignore[attr-defined]
    lost = ((rows - read) / rows.std(0, correction=0)).square().sum() / standard.square().sum()
    assert float(lost) == pytest.approx(float(variances[3:].sum() / variances.sum()), rel=1e-2)


def test_what_cannot_be_learned_is_refused() -> None:
    with pytest.raises(InputError, match=r"'pq2' learns .* needs 1024 slots for it, got 60; begin with more documents"):
        codec_for(codec_named("pq2"), [low_rank_span(6, 0), low_rank_span(6, 1)])
    with pytest.raises(InputError, match=r"expected fewer directions than the 48 channels of a slot, got 'pca48'"):
        codec_for(codec_named("pca48"), [low_rank_span(6)])
    with pytest.raises(InputError, match=r"'pca2' is for soft and latent spans, .* store KV spans with int8"):
        codec_for(codec_named("pca2"), [kv_span(1, 2, 12, 16)])


def learning_index(path: Path) -> MemoryIndex:
    return MemoryIndex.create(path, SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="test", codec="pca5")


def test_an_index_learns_from_its_first_spans_and_reads_with_what_it_learned(tmp_path: Path) -> None:
    corpus = make_corpus(12)
    with learning_index(tmp_path / "kb") as made:
        corpus.add_to(made, slice(0, 6))
    expected = codec_for(codec_named("pca5"), corpus.spans[:6])
    with MemoryIndex.open(tmp_path / "kb") as again:
        corpus.add_to(again, slice(6, 12))
        assert again.verify().ok
        for span, stored in zip(corpus.spans, again.get(corpus.ids), strict=True):
            wanted = read_back(span, expected)
            assert isinstance(wanted, SoftSpan)
            assert isinstance(stored.span, SoftSpan)
            assert torch.equal(wanted.embeds, stored.span.embeds)
    assert len(list((tmp_path / "kb").glob("codec-*.safetensors"))) == 1


def test_chunks_that_are_replaced_or_copied_are_stored_with_what_the_index_learned(tmp_path: Path) -> None:
    corpus, other = make_corpus(8), make_corpus(8, seed=5)
    copies = [replace(chunk, document_id="copy") for chunk in corpus.chunks[:2]]
    with learning_index(tmp_path / "kb") as index:
        corpus.add_to(index)
        anew = [replace(s, chunk_id=c) for s, c in zip(other.spans[:2], corpus.ids[:2], strict=True)]
        index.replace(corpus.chunks[:2], anew, corpus.vectors[:2], spec=SOFT)
        index.add_copies(copies, corpus.ids[:2])
        assert index.verify().ok
        expected = codec_for(codec_named("pca5"), corpus.spans)
        for ids in (corpus.ids[:2], [c.id for c in copies]):
            for span, stored in zip(anew, index.get(ids), strict=True):
                wanted = read_back(span, expected)
                assert isinstance(wanted, SoftSpan)
                assert isinstance(stored.span, SoftSpan)
                assert torch.equal(wanted.embeds, stored.span.embeds)
    assert len(list((tmp_path / "kb").glob("codec-*.safetensors"))) == 1


@pytest.mark.parametrize("lost", [False, True])
def test_damaged_tables_are_named_and_wrong_spans_never_returned(tmp_path: Path, lost: bool) -> None:
    corpus = make_corpus(6)
    with learning_index(tmp_path / "kb") as made:
        corpus.add_to(made)
    (file,) = (tmp_path / "kb").glob("codec-*.safetensors")
    if lost:
        file.unlink()
    else:
        flip_byte(file, file.stat().st_size - 3)
    with MemoryIndex.open(tmp_path / "kb") as index:
        with pytest.raises(IndexDamagedError, match=rf"{file.name} cannot be read .* Restore it from a copy"):
            index.get(corpus.ids[:1])
        assert [chunk.text for chunk in index.chunks()] == [c.text for c in corpus.chunks]
        assert len(index.verify().damaged) == 6
        with pytest.raises(IndexDamagedError, match=file.name):
            make_corpus(1, seed=8).add_to(index)
        index.delete(chunk_ids=corpus.ids)
        corpus.add_to(index)  # an index without spans learns again
        assert index.verify().ok


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
    MemoryIndex.create(tmp_path / "kb", SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="test", codec="fp8").close()
    manifest = tmp_path / "kb" / "index.json"
    manifest.write_text(manifest.read_text().replace('"fp8"', '"zip"'))
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
