"""Names of the Hugging Face hub: revisions come from its cache, and without network the error says what to do.

The cache is written by hand in the form that the hub's own client writes, so that client finds the files offline.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.errors import InputError, ModelLoadError
from ctxcomp_rag.importers import from_official
from ctxcomp_rag.importers.hub import resolve_file, resolve_folder
from tests.tiny_models import tiny_backbone

MAIN, OTHER = "a" * 40, "b" * 40


def ctxcomp(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    return subprocess.run([sys.executable, "-m", "ctxcomp_rag.cli", "import", *map(str, arguments)], text=True,
                          capture_output=True, check=False, timeout=300, env={**env, "COLUMNS": "200", **environment})


@pytest.fixture
def cached(golden: Path, tmp_path: Path) -> Path:
    """A hub cache with owner/icae at two commits (the branch main and the tag v1) and owner/pcc at one."""
    hub = tmp_path / "hub"
    for commit, file in ((MAIN, "icae_checkpoint.safetensors"), (OTHER, "icae_checkpoint_fp32.safetensors")):
        snapshot = hub / "models--owner--icae" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        shutil.copy(golden / "icae_v2" / file, snapshot / "icae.safetensors")
    shutil.copytree(golden / "pcc_lite" / "compressor_checkpoint",
                    hub / "models--owner--pcc" / "snapshots" / MAIN)
    for name, refs in (("icae", {"main": MAIN, "v1": OTHER}), ("pcc", {"main": MAIN})):
        (hub / f"models--owner--{name}" / "refs").mkdir()
        for ref, commit in refs.items():
            (hub / f"models--owner--{name}" / "refs" / ref).write_text(commit)
    return hub


@pytest.mark.parametrize(("revision", "official"), [(None, "icae_checkpoint.safetensors"),
                                                    ("v1", "icae_checkpoint_fp32.safetensors"),
                                                    (OTHER, "icae_checkpoint_fp32.safetensors")])
def test_a_file_of_the_hub_at_a_revision(revision: str | None, official: str, cached: Path, golden: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cached))
    found = resolve_file("owner/icae/icae.safetensors", revision)
    assert found.read_bytes() == (golden / "icae_v2" / official).read_bytes()
    backbone = load_frozen(golden / "icae_v2" / "base", device="cpu")
    imported = from_official("icae", "owner/icae/icae.safetensors", backbone, revision=revision)
    assert imported.spec.fingerprint == from_official("icae", golden / "icae_v2" / official, backbone).spec.fingerprint


def test_a_file_that_the_repository_lacks_is_named(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cached))
    with pytest.raises(ModelLoadError, match=r"owner/icae on the Hugging Face hub has no file 'b.pt' at revision 'v1'"):
        resolve_file("owner/icae/b.pt", "v1")


def test_a_repository_of_the_hub(cached: Path, golden: Path, tmp_path: Path) -> None:
    folder = golden / "pcc_lite"
    done = ctxcomp("pcc", "owner/pcc", "--out", tmp_path / "pcc", "--model", folder / "decoder_base", "--patch",
                   folder / "special_token_patch.pt", "--segment-tokens", "32", "--revision", "main",
                   HF_HUB_CACHE=str(cached), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pcc" / "converter.safetensors").exists()


@pytest.mark.parametrize(("method", "source", "environment"), [
    ("icae", "owner/absent/icae.safetensors", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
    ("pcc", "owner/absent", {"HF_HUB_OFFLINE": "1"}),
], ids=["every connection refused", "told to stay offline"])
def test_without_network_the_error_says_what_to_do(method: str, source: str, environment: dict[str, str],
                                                   tmp_path: Path) -> None:
    done = ctxcomp(method, source, "--out", tmp_path / "out", "--revision", "v1", HF_HUB_CACHE=str(tmp_path / "hub"),
                   **environment)
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert "'owner/absent' at revision 'v1' is not here and could not be fetched from the Hugging Face hub (" in said
    assert "without network, download it elsewhere and pass its path" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_path_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is here and has no revision 'v1'; leave the revision out"):
        resolve_folder(tmp_path, "v1")


@pytest.mark.parametrize("name", ["icae.safetensors", "owner/name", "/absent/folder/file", "./a/b/c", "~/a/b"])
def test_what_is_no_name_of_a_hub_file_is_a_missing_file(name: str) -> None:
    with pytest.raises(ModelLoadError, match=r"there is no file .*on the Hugging Face hub a file is named OWNER/NAME"):
        resolve_file(name)


@pytest.mark.parametrize("name", ["name", "a/b/c", "/absent", "../a"])
def test_what_is_no_name_of_a_repository_is_a_missing_folder(name: str) -> None:
    with pytest.raises(ModelLoadError, match=r"there is no folder .*on the Hugging Face hub a folder is named OWNER"):
        resolve_folder(name)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match="expected 'icae' or 'pcc', got 'cocom'"):
        from_official("cocom", "owner/name", tiny_backbone("llama"))
