"""`ctxcomp import`, run as a user runs it: exit codes, JSON keys, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.compressors import load_compressor


def ctxcomp(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ctxcomp_rag.cli", "import", *map(str, arguments)], text=True,
                          capture_output=True, check=False, timeout=300,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"})


def test_import_pcc_gives_a_compressor_folder(golden: Path, tmp_path: Path) -> None:
    folder = golden / "pcc_lite"
    inputs = json.loads((folder / "inputs.json").read_text())
    length, slots = inputs["segment_length"], inputs["embed_len"]
    done = ctxcomp("pcc", folder / "compressor_checkpoint", "--out", tmp_path / "pcc", "--model",
                   folder / "decoder_base", "--patch", folder / "special_token_patch.pt", "--segment-tokens",
                   str(length), "--factor", str(length // slots), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    loaded = load_compressor(tmp_path / "pcc", load_frozen(folder / "decoder_base", device="cpu"))
    assert result["compressor"] == loaded.spec.compressor
    assert (result["segment_tokens"], result["compression_factor"]) == (length, length / slots)


def segment_tokens_of(folder: Path) -> int:
    """The length of a segment in the fixture: v1 states it, v2 derives it."""
    inputs = json.loads((folder / "inputs.json").read_text())
    return int(inputs.get("model_max_length") or inputs["mem_size"] * inputs["mean_compression_rate"])


@pytest.mark.parametrize(("fixture", "name"), [("icae_v1", "icae_v1_zeroweight.pt"),
                                               ("icae_v2", "icae_checkpoint.safetensors")])
def test_import_icae_of_both_versions(fixture: str, name: str, golden: Path, tmp_path: Path) -> None:
    folder = golden / fixture
    length = segment_tokens_of(folder)
    done = ctxcomp("icae", folder / name, "--out", tmp_path / "icae", "--model", folder / "base",
                   "--segment-tokens", str(length))
    assert done.returncode == 0, done.stderr
    assert f"imported icae: segments of {length} tokens" in done.stdout
    assert load_compressor(tmp_path / "icae", load_frozen(folder / "base", device="cpu")).max_chunk_tokens == length


def test_wrong_input_exits_with_2_and_a_sentence(golden: Path, tmp_path: Path) -> None:
    absent = ctxcomp("pcc", tmp_path / "absent", "--out", tmp_path / "out")
    assert (absent.returncode, "there is no folder" in absent.stderr) == (2, True)
    other = ctxcomp("icae", golden / "icae_v2" / "icae_checkpoint.safetensors", "--out", tmp_path / "out")
    assert (other.returncode, "embedded" in other.stderr or "memory table of shape" in other.stderr) == (2, True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    full = ctxcomp("icae", tmp_path / "absent", "--out", tmp_path / "full")
    assert (full.returncode, "is not an empty folder" in full.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_help_names_the_options() -> None:
    shown = ctxcomp("--help").stdout
    assert all(word in shown for word in ("SOURCE", "--out", "--patch", "--json"))
