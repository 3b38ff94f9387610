"""The importer of official ICAE v2 checkpoints says what is wrong with a file that it cannot take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.errors import InputError, ModelLoadError
from ctxcomp_rag.importers import load_official_v2, save_official_v2
from ctxcomp_rag.importers.layouts import icae_v2_layout
from tests.tiny_models import tiny_backbone

OFFICIAL = ICAEConfig(num_memory_tokens=4, segment_tokens=16, lora_rank=2)
Q_PROJ_A = "icae.base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "icae.safetensors"
    save_official_v2(ICAECompressor(tiny_backbone("llama"), OFFICIAL), path)
    return path


def rewrite(path: Path, *, drop: str | None = None, **changes: torch.Tensor) -> None:
    tensors = load_file(path)
    if drop:
        del tensors[drop]
    save_file({**tensors, **changes}, path)


def test_settings_come_from_the_file(checkpoint: Path) -> None:
    layout = icae_v2_layout(tiny_backbone("llama"))
    assert load_official_v2(checkpoint, tiny_backbone("llama")).config == replace(OFFICIAL, layout=layout)


def test_other_compression_rate_changes_the_segments_only(checkpoint: Path) -> None:
    config = load_official_v2(checkpoint, tiny_backbone("llama"), mean_compression_rate=8).config
    assert (config.num_memory_tokens, config.segment_tokens, config.compression_factor) == (4, 32, 8.0)


@pytest.mark.parametrize(("key", "match"), [
    (Q_PROJ_A, f"it lacks {Q_PROJ_A}"),
    ("memory_token_embed.weight", "it has no memory_token_embed.weight"),
])
def test_missing_key_is_named(checkpoint: Path, key: str, match: str) -> None:
    rewrite(checkpoint, drop=key)
    with pytest.raises(ModelLoadError, match=match):
        load_official_v2(checkpoint, tiny_backbone("llama"))


def test_unknown_key_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, dense_in=torch.zeros(2, 2))
    with pytest.raises(ModelLoadError, match="has unknown keys dense_in"):
        load_official_v2(checkpoint, tiny_backbone("llama"))


def test_layer_that_the_decoder_lacks_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, **{Q_PROJ_A.replace("layers.1", "layers.7"): torch.zeros(2, 32)})
    with pytest.raises(ModelLoadError, match=r"it has besides icae\..*layers\.7\.self_attn\.q_proj"):
        load_official_v2(checkpoint, tiny_backbone("llama"))


def test_lora_of_another_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    rewrite(checkpoint, **{Q_PROJ_A: torch.zeros(2, 48)})
    with pytest.raises(ModelLoadError, match=r"layers\.1.*q_proj\.lora_A\.default\.weight \(2, 48\), \(2, 32\)"):
        load_official_v2(checkpoint, tiny_backbone("llama"))


def test_memory_table_of_another_hidden_size_is_named_with_both_shapes(checkpoint: Path) -> None:
    rewrite(checkpoint, **{"memory_token_embed.weight": torch.zeros(7, 48)})
    with pytest.raises(ModelLoadError, match=r"memory table of shape \(7, 32\).*got \(7, 48\)"):
        load_official_v2(checkpoint, tiny_backbone("llama"))


def test_memory_table_without_memory_tokens_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, **{"memory_token_embed.weight": torch.zeros(3, 32)})
    with pytest.raises(ModelLoadError, match=r"must hold memory tokens.*got shape \(3, 32\)"):
        load_official_v2(checkpoint, tiny_backbone("llama"))


def test_decoder_without_the_targeted_modules_is_named(checkpoint: Path) -> None:
    with pytest.raises(ModelLoadError, match="does not fit the decoder 'tiny-gpt2'"):
        load_official_v2(checkpoint, tiny_backbone("gpt2"))


def test_file_that_is_not_there_or_not_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"there is no file .*absent"):
        load_official_v2(tmp_path / "absent", tiny_backbone("llama"))
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(ModelLoadError, match="is not a safetensors file"):
        load_official_v2(tmp_path / "text", tiny_backbone("llama"))


@pytest.mark.parametrize("changes", [{"slots": "proportional"}, {"lora_alpha": 16}])
def test_settings_that_the_official_code_lacks_are_not_exported(changes: dict[str, object], tmp_path: Path) -> None:
    config = ICAEConfig(**{**OFFICIAL.__dict__, **changes})
    with pytest.raises(InputError, match="knows slots='fixed', slot_positions='consecutive' and lora_alpha=32 only"):
        save_official_v2(ICAECompressor(tiny_backbone("llama"), config), tmp_path / "out.safetensors")
