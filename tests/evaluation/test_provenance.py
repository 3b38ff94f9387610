"""What a result says about the run: the commit of our own files, and what can be checked before a long run."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.provenance import commit_of, measured, require_writable, write_result
from tests.tiny_models import tiny_backbone


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True,
                          check=True).stdout.strip()


def test_the_commit_is_that_of_a_tracked_file_and_says_when_files_of_its_folder_were_changed(tmp_path: Path) -> None:
    ours, installed, result = (tmp_path / name for name in ("package/ours.py", ".venv/theirs.py", "result.json"))
    for path in (ours, installed, result):
        path.parent.mkdir(exist_ok=True)
        path.write_text("1\n")
    assert commit_of(ours) == ""  # no checkout
    git(tmp_path, "init")
    git(tmp_path, "add", "package", "result.json")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "v1")
    head = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert commit_of(ours) == head
    assert commit_of(installed) == ""  # in an environment inside somebody's checkout
    result.write_text("2\n")
    assert commit_of(ours) == head
    ours.write_text("2\n")
    assert commit_of(ours) == f"{head}-dirty"


def test_where_nothing_can_be_written_is_said_before_and_what_is_there_stays(tmp_path: Path) -> None:
    kept, new = tmp_path / "kept.json", tmp_path / "folder" / "new.json"
    kept.write_text("{}")
    require_writable(kept)
    require_writable(new)
    assert kept.read_text() == "{}"
    assert not new.exists()
    write_result(new, {"rows": []})
    assert json.loads(new.read_text())["rows"] == []
    for path in (tmp_path, kept / "x.json"):  # a folder; below a file
        with pytest.raises(InputError, match=r"cannot be written \(.*\); pass another --out"):
            require_writable(path)


def test_digests_are_those_of_the_data_the_decoder_and_the_compressors(tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_bytes(b"{}\n")
    backbone = tiny_backbone("llama")
    compressor = ICAECompressor(backbone, ICAEConfig(num_memory_tokens=1, segment_tokens=64, lora_rank=2))
    assert measured([data], backbone, {"mine": compressor}) == {
        "data_sha256": {str(data): hashlib.sha256(b"{}\n").hexdigest()},
        "decoder_weights_digest": backbone.fingerprint.weights_digest,
        "compressor_digests": {"mine": f"icae-{compressor.digest()[:16]}"}}
