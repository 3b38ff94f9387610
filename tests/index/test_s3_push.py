"""Publishing an index: only what is new is sent, and nobody ever sees half of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ctxcomp_rag.errors import IndexDamagedError, IndexFolderError, InputError
from ctxcomp_rag.index import MemoryIndex
from tests.index.checks import assert_holds, assert_same_span
from tests.index.conftest import SOFT, VECTOR_SIZE, data_files, make_corpus
from tests.index.s3 import Request, S3Server

CORPUS = make_corpus(40)


def push(path: Path, uri: str) -> None:
    with MemoryIndex.open(path) as index:
        index.push(uri)


def names(bucket: Any) -> set[str]:
    return {entry.key for entry in bucket.objects.all()}


def test_the_manifest_follows_the_data_and_index_json_comes_last(index: MemoryIndex, uri: str, s3: S3Server) -> None:
    CORPUS.add_to(index, slice(0, 20))
    CORPUS.add_to(index, slice(20, 40))
    s3.forget()
    progress: list[tuple[int, int]] = []
    report = index.push(uri, progress=lambda *sent: progress.append(sent))
    written = [r.name.removeprefix("kb/") for r in s3.requests if r.method == "PUT"]
    assert written[-1] == "index.json"
    assert written[-2].startswith("spans.lance/_versions/")
    assert sorted(w.split("/")[0] for w in written[:-2]) == ["delimiters.safetensors", f"faiss-{index.version}.bin",
                                                             "spans.lance", "spans.lance"]
    assert (report.version, report.uploaded, report.unchanged, report.removed) == (index.version, 5, 0, 0)
    assert progress[-1][0] == progress[-1][1] < report.uploaded_bytes


def test_pushing_again_sends_nothing_and_after_a_change_what_is_new(index: MemoryIndex, uri: str, s3: S3Server,
                                                                    bucket: Any) -> None:
    CORPUS.add_to(index, slice(0, 20))
    index.push(uri)
    s3.forget()
    assert vars(index.push(uri)) == {"version": 2, "uploaded": 0, "uploaded_bytes": 0, "unchanged": 4, "removed": 0}
    assert not [r for r in s3.requests if r.method == "PUT"]
    CORPUS.add_to(index, slice(20, 40))
    report = index.push(uri)
    # data file, manifest and snapshot are new; the manifest and the snapshot before them go
    assert (report.uploaded, report.unchanged, report.removed) == (3, 2, 2)
    index.delete(chunk_ids=CORPUS.ids[:30])
    index.compact()
    report = index.push(uri)
    assert len([n for n in names(bucket) if "/data/" in n]) == len(data_files(index.path)) == 1
    with MemoryIndex.open(uri) as remote:
        assert_holds(remote, CORPUS, slice(30, 40))


def test_only_objects_of_an_index_are_removed(index: MemoryIndex, uri: str, bucket: Any) -> None:
    bucket.put_object(Key="kb/README.md", Body=b"mine")
    bucket.put_object(Key="kb/spans.lance/data/left-by-a-push-that-died.lance", Body=b"?")
    bucket.put_object(Key="other/index.json", Body=b"{}")
    CORPUS.add_to(index)
    assert index.push(uri).removed == 1
    assert {"kb/README.md", "other/index.json"} <= names(bucket)
    assert not [n for n in names(bucket) if "died" in n]


def push_with(environment: dict[str, str], path: Path, uri: str) -> None:
    os.environ.update(environment)  # the server that forks may have been started before there was an endpoint
    push(path, uri)


@pytest.mark.parametrize("where", ["spans.lance/data/", "spans.lance/_versions/", "index.json"])
def test_a_push_that_is_killed_leaves_the_old_version_and_the_next_one_completes(
        where: str, index: MemoryIndex, uri: str, s3: S3Server, bucket: Any) -> None:
    CORPUS.add_to(index, slice(0, 20))
    index.push(uri)
    CORPUS.add_to(index, slice(20, 40))
    index.delete(chunk_ids=CORPUS.ids[:5])
    index.close()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lance", "obstore", "faiss", "torch", "ctxcomp_rag.index.publish"])
    with s3.silent_to(lambda request: request.method == "PUT" and where in request.name):
        process = context.Process(target=push_with, args=(dict(os.environ), index.path, uri))
        process.start()
        assert s3.stalled.wait(60)
        process.kill()
        process.join()
    with MemoryIndex.open(uri) as remote:
        assert_holds(remote, CORPUS, slice(0, 20))
    push(index.path, uri)
    with MemoryIndex.open(uri) as remote:
        assert_holds(remote, CORPUS, slice(5, 40))


def test_a_copy_that_went_its_own_way_is_refused(index: MemoryIndex, uri: str, tmp_path: Path) -> None:
    CORPUS.add_to(index, slice(0, 20))
    index.close()
    shutil.copytree(index.path, tmp_path / "copy")
    for path, part in ((index.path, slice(20, 30)), (tmp_path / "copy", slice(30, 40))):
        with MemoryIndex.open(path) as one:
            CORPUS.add_to(one, part)
    push(index.path, uri)
    with pytest.raises(IndexFolderError, match=r"another copy of this index has pushed, .* its version 3"):
        push(tmp_path / "copy", uri)
    with MemoryIndex.open(uri) as remote:
        assert_holds(remote, CORPUS, slice(0, 30))


def test_an_older_copy_and_another_index_are_refused(index: MemoryIndex, uri: str, tmp_path: Path) -> None:
    CORPUS.add_to(index)
    index.push(uri)
    with MemoryIndex.create(tmp_path / "empty", SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="minilm",
                            codec="exact") as older, \
            pytest.raises(IndexFolderError, match=r"no newer version than this index, 1, but it holds 2"):
        older.push(uri)
    with MemoryIndex.create(tmp_path / "other", SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="bge") as other, \
            pytest.raises(IndexFolderError, match=r"holds another one \(retrieval_encoder, codec differ\)"):
        other.push(uri)


def test_two_pushes_at_a_time_do_not_overwrite_each_other(index: MemoryIndex, uri: str, s3: S3Server, bucket: Any,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    CORPUS.add_to(index)
    index.push(uri)
    index.delete(chunk_ids=CORPUS.ids[:1])

    def somebody_pushes(request: Request) -> bool:
        if request.method == "PUT" and "_versions" in request.name:
            entry = bucket.Object("kb/index.json")
            entry.put(Body=json.dumps({**json.loads(entry.get()["Body"].read()), "theirs": True}))
        return False

    with s3.silent_to(somebody_pushes), pytest.raises(IndexFolderError, match=r"somebody else pushed .* meanwhile"):
        index.push(uri)
    assert json.loads(bucket.Object("kb/index.json").get()["Body"].read())["theirs"]
    with MemoryIndex.open(uri) as remote:
        assert_same_span(remote.get([CORPUS.ids[0]])[0].span, CORPUS.spans[0])


def test_what_cannot_be_pushed_says_why(index: MemoryIndex, uri: str) -> None:
    CORPUS.add_to(index)
    with pytest.raises(InputError, match=r"expected s3://BUCKET/PREFIX to publish to, got 'gs://lake/kb'"):
        index.push("gs://lake/kb")
    index.close()
    data_files(index.path)[0].write_bytes(b"torn")
    with pytest.warns(UserWarning, match="cannot be read"), MemoryIndex.open(index.path) as damaged, \
            pytest.raises(IndexDamagedError, match=r"See ctxcomp verify .* repair it, then push again"):
        damaged.push(uri)


def test_a_copy_of_the_objects_in_a_folder_is_the_index(index: MemoryIndex, uri: str, bucket: Any, tmp_path: Path
                                                        ) -> None:
    CORPUS.add_to(index)
    index.push(uri)
    for entry in bucket.objects.all():
        file = tmp_path / "copied" / entry.key.removeprefix("kb/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(entry.get()["Body"].read())
    with MemoryIndex.open(tmp_path / "copied") as copied:
        assert_holds(copied, CORPUS)
        copied.delete(chunk_ids=CORPUS.ids[:1])
        copied.push(uri)
    with MemoryIndex.open(uri) as remote:
        assert_holds(remote, CORPUS, slice(1, 40))
