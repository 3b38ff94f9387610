"""The importer of official PCC checkpoints says what is wrong with a folder that it cannot take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctxcomp_rag.compressors.pcc import Converter, PCCCompressor, PCCConfig, load_encoder
from ctxcomp_rag.errors import ModelLoadError
from ctxcomp_rag.importers import load_official_pcc, save_official_pcc
from ctxcomp_rag.importers.layouts import pcc_layout
from ctxcomp_rag.importers.pcc import CONVERTER_FILE, SPECIAL_TOKENS, load_patched_decoder, read_patch
from tests.tiny_models import save_tiny, tiny_backbone

CONFIG = PCCConfig(segment_tokens=16, slots_per_segment=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official folder for the tiny llama; only its small files are rewritten, by tests that put them back."""
    encoder = load_encoder(save_tiny("gpt2", tmp_path_factory.mktemp("encoder")))
    folder = tmp_path_factory.mktemp("official")
    save_official_pcc(PCCCompressor(tiny_backbone("llama"), encoder, CONFIG), folder)
    return folder


@pytest.fixture
def converter(checkpoint: Path) -> Any:
    """`memory_converter.bin`, as it was again after the test."""
    file = checkpoint / CONVERTER_FILE
    kept = file.read_bytes()
    yield file
    file.write_bytes(kept)


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    rows = torch.arange(96.0).view(3, 32)
    torch.save({"tokens": list(SPECIAL_TOKENS), "embedding": rows, "lm_head": -rows}, tmp_path / "patch.pt")
    return tmp_path / "patch.pt"


def rewrite(path: Path, *, drop: str | None = None, **changes: Any) -> None:
    content = torch.load(path, weights_only=True)
    if drop:
        del content[drop]
    torch.save({**content, **changes}, path)


def load(checkpoint: Path, patch: Path | None) -> PCCCompressor:
    return load_official_pcc(checkpoint, tiny_backbone("llama"), patch=patch, segment_tokens=16, slots_per_segment=4)


def test_settings_and_rows_come_from_the_files(checkpoint: Path, patch: Path) -> None:
    loaded = load(checkpoint, patch)
    layout = pcc_layout(loaded.backbone, loaded.encoder.tokenizer.hf)
    assert loaded.config == PCCConfig(16, 4, "attended", str(checkpoint), layout)
    assert loaded.special_rows.detach().equal(read_patch(patch)[0])


def test_folder_or_file_that_is_not_there_is_named(checkpoint: Path, converter: Path, patch: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"there is no folder .*absent"):
        load(checkpoint / "absent", patch)
    with pytest.raises(ModelLoadError, match=r"there is no file .*absent\.pt"):
        load(checkpoint, patch.with_name("absent.pt"))
    converter.unlink()
    with pytest.raises(ModelLoadError, match=r"there is no file .*memory_converter\.bin"):
        load(checkpoint, patch)


def test_file_that_is_not_of_tensors_is_named(checkpoint: Path, converter: Path, patch: Path) -> None:
    converter.write_text("not tensors")
    with pytest.raises(ModelLoadError, match=r"memory_converter\.bin' is not a file of plain tensors"):
        load(checkpoint, patch)
    torch.save([torch.zeros(1)], converter)
    with pytest.raises(ModelLoadError, match="must hold a dictionary of tensors, got list"):
        load(checkpoint, patch)


@pytest.mark.parametrize(("drop", "match"), [
    ("dense_out.bias", r"not a PCC converter that fits: it lacks dense_out\.bias$"),
    ("dense_in.weight", r"is not a PCC converter: it has no matrix dense_in\.weight"),
])
def test_missing_key_is_named(drop: str, match: str, checkpoint: Path, converter: Path, patch: Path) -> None:
    rewrite(converter, drop=drop)
    with pytest.raises(ModelLoadError, match=match):
        load(checkpoint, patch)


@pytest.mark.parametrize(("changes", "match"), [
    ({"dense_mid.weight": torch.zeros(2)}, r"it has the unknown key dense_mid\.weight"),
    ({"dense_out.bias": torch.zeros(33)}, r"it has dense_out\.bias of shape \(33,\), expected \(32,\)"),
    ({"dense_out.bias": torch.zeros(32, dtype=torch.int64)}, r"holds no floating point tensor as dense_out\.bias"),
    ({"RMSNorm.weight": "ones"}, r"it holds no floating point tensor as RMSNorm\.weight"),
    ({"dense_in.weight": torch.zeros(48, 32)}, "for a decoder of hidden size 48, but this decoder has 32"),
    ({"dense_in.weight": torch.zeros(32)}, r"it has no matrix dense_in\.weight"),
])
def test_key_shape_or_dtype_that_does_not_fit_is_named(changes: dict[str, Any], match: str, checkpoint: Path,
                                                       converter: Path, patch: Path) -> None:
    rewrite(converter, **changes)
    with pytest.raises(ModelLoadError, match=match):
        load(checkpoint, patch)


def test_all_that_differs_is_said_at_once(checkpoint: Path, converter: Path, patch: Path) -> None:
    rewrite(converter, drop="dense_out.bias", **{"dense_in.bias": torch.zeros(5), "other": torch.zeros(1)})
    with pytest.raises(ModelLoadError, match=r"lacks dense_out\.bias; it has the unknown key other; it has "
                                             r"dense_in\.bias of shape \(5,\)"):
        load(checkpoint, patch)


def test_converter_of_another_encoder_is_named_with_both_sizes(checkpoint: Path, converter: Path, patch: Path) -> None:
    other = Converter(24, 32).state_dict()
    torch.save({k.replace("norm.", "RMSNorm."): v for k, v in other.items()}, converter)
    with pytest.raises(ModelLoadError, match="reads hidden states of 24, but the encoder gives 32"):
        load(checkpoint, patch)


def test_decoder_without_the_special_tokens_needs_the_patch(checkpoint: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"'tiny-llama' has no token <mem>, <ae>, </mem>; pass the patch"):
        load(checkpoint, None)


@pytest.mark.parametrize(("changes", "match"), [
    ({"tokens": ["<ae>", "<mem>", "</mem>"]}, r"expected the tokens \['<mem>', '<ae>', '</mem>'\], got \['<ae>'"),
    ({"embedding": torch.zeros(2, 32)}, r"embedding must be floating point rows \(3, hidden size\), got .*\(2, 32\)"),
    ({"lm_head": torch.zeros(3, 32, dtype=torch.int8)}, r"lm_head must be floating point rows .*torch\.int8 \(3, 32\)"),
    ({"lm_head": None}, "lm_head must be floating point rows .*got NoneType"),
    ({"embedding": torch.zeros(3, 48)}, r"rows of shape \(3, 32\) for <mem>, <ae>, </mem> .*got \(3, 48\)"),
])
def test_patch_that_does_not_fit_is_named(changes: dict[str, Tensor], match: str, checkpoint: Path, patch: Path
                                          ) -> None:
    rewrite(patch, **changes)
    with pytest.raises(ModelLoadError, match=match):
        load(checkpoint, patch)


def test_decoder_of_another_size_is_not_patched(patch: Path, tmp_path: Path) -> None:
    rewrite(patch, embedding=torch.zeros(3, 48))
    with pytest.raises(ModelLoadError, match=r"has rows of 48, but the decoder .* has the hidden size 32"):
        load_patched_decoder(save_tiny("llama", tmp_path / "decoder"), patch)


@pytest.mark.parametrize(("written", "match"), [
    ("{", "the adapter settings in .* cannot be read"),
    ('{"peft_type": "unknown"}', "the adapter settings in .* cannot be read: 'unknown'"),
    ("{}", "names no model that it belongs to; pass encoder_base"),
])
def test_adapter_whose_settings_cannot_be_used_is_named(written: str, match: str, checkpoint: Path, patch: Path
                                                        ) -> None:
    settings = checkpoint / "adapter_config.json"
    settings.write_text(written)
    try:
        with pytest.raises(ModelLoadError, match=match):
            load(checkpoint, patch)
    finally:
        settings.unlink()
