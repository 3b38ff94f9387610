"""What `read_documents` takes, what it makes of it, and what it says when it cannot."""

from __future__ import annotations

import builtins
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxcomp_rag.chunking import Document
from ctxcomp_rag.errors import CtxcompError, InputError
from ctxcomp_rag.readers import SUPPORTED_SUFFIXES, read_documents
from ctxcomp_rag.readers.texts import visible_text


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, content: str | bytes) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(*paths: str, **options: Any) -> dict[str, str]:
    return {d.id: d.text for d in read_documents(paths, **options)}


def skipping(*paths: str, **options: Any) -> tuple[dict[str, str], dict[str, CtxcompError]]:
    """The documents that come through, and the error of each place that does not."""
    skipped: dict[str, CtxcompError] = {}
    documents = texts(*paths, on_error="skip", on_skip=skipped.__setitem__, **options)
    return documents, skipped


class TestTextFiles:
    @pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
    def test_text_is_what_was_in_the_file(self, suffix: str) -> None:
        content = "  # Title\r\n\r\nÄ line\rwith \u2028 odd ends\n\n"
        path = write(f"a{suffix}", content)
        assert list(read_documents([path])) == [Document(path, content, {"source": path})]

    def test_byte_order_mark_is_not_text(self) -> None:
        assert texts(write("a.txt", b"\xef\xbb\xbfwords")) == {"a.txt": "words"}

    @pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
    def test_compressed(self, suffix: str, pack: Callable[[bytes], bytes]) -> None:
        write("a.txt" + suffix, pack(b"words"))
        write("b.jsonl" + suffix, pack(b'{"text": "one"}\n{"text": "two"}\n'))
        write("c.csv" + suffix, pack(b"text\nthree\n"))
        assert texts(f"a.txt{suffix}", f"b.jsonl{suffix}", f"c.csv{suffix}") == {
            f"a.txt{suffix}": "words",
            f"b.jsonl{suffix}#1": "one",
            f"b.jsonl{suffix}#2": "two",
            f"c.csv{suffix}#1": "three",
        }

    def test_one_path_need_not_be_a_list(self) -> None:
        path = write("a.txt", "words")
        assert [d.text for d in read_documents(path)] == ["words"]
        assert [d.text for d in read_documents(Path(path))] == ["words"]


class TestHtml:
    def test_visible_text_with_paragraphs(self) -> None:
        page = """<!doctype html><html><head><title>The Harbour</title><style>p { color: red }</style>
            <script>if (a < b) { alert("no") }</script></head>
            <body><h1>Opening&nbsp;hours</h1><p>Mon&ndash;Fri,
            <b>nine</b> to five.<br>Closed on holidays.</p><ul><li>boats<li>cranes</ul>
            <table><tr><td>pier</td><td>3</td></tr><tr><td>depth</td><td>12 m</td></tr></table>
            <pre>
a  b
  c</pre><noscript>Turn on scripts</noscript><div hidden>secret <div>nested</div></div>
            <p style="display: none">kept: the end tag may be missing</p>
            <span style="display:none">gone</span>after</body>"""
        assert visible_text(page) == (
            "The Harbour\n\nOpening\xa0hours\n\nMon–Fri, nine to five.\nClosed on holidays.\n\nboats\ncranes\n\n"
            "pier\t3\ndepth\t12 m\n\na  b\n  c\n\nkept: the end tag may be missing\n\nafter"
        )

    def test_words_split_by_tags_stay_whole(self) -> None:
        assert visible_text("<p>un<i>believ</i>able <a>link</a>, end</p>") == "unbelievable link, end"

    def test_files(self) -> None:
        assert texts(write("a.html", "<p>one</p><p>two"), write("b.htm", "three")) == {
            "a.html": "one\n\ntwo",
            "b.htm": "three",
        }

    def test_page_without_visible_text(self) -> None:
        path = write("a.html", "<script>var x</script>")
        with pytest.raises(InputError, match=r"a\.html has no visible text"):
            texts(path)


class TestRows:
    def test_jsonl(self) -> None:
        rows = '\ufeff{"text": " a\\n", "k": 1, "ok": true}\n\n{"text": "b\u2028c", "k": null}\n'
        found = list(read_documents([write("a.jsonl", rows)], metadata_columns=["k", "ok"]))
        assert found == [  # ids count lines, so that a#3 is found on line 3
            Document("a.jsonl#1", " a\n", {"source": "a.jsonl", "k": 1, "ok": True}),
            Document("a.jsonl#3", "b\u2028c", {"source": "a.jsonl", "k": None, "ok": None}),
        ]

    def test_csv(self) -> None:
        path = write("a.csv", 'id,body,lang\r\nx,"one, ""two""\r\nthree",de\r\n\r\ny,f\u2028our,\r\n')
        found = list(read_documents([path], text_column="body", id_column="id", metadata_columns=["lang"]))
        assert found == [
            Document("x", 'one, "two"\r\nthree', {"source": "a.csv", "lang": "de"}),
            Document("y", "f\u2028our", {"source": "a.csv", "lang": ""}),
        ]

    def test_csv_fields_may_be_long(self) -> None:
        long = "word " * 100_000
        assert texts(write("a.csv", f"text\n{long}\n")) == {"a.csv#1": long}

    def test_parquet_in_batches(self) -> None:
        n = 3000  # three batches
        table = pa.table({
            "n": list(range(n)), "text": [f"text {i}" for i in range(n)], "day": [date(2024, 2, 29)] * n,
            "ignored": [[1]] * n,
        })  # fmt: skip
        pq.write_table(table, "a.parquet")
        found = list(read_documents(["a.parquet"], id_column="n", metadata_columns=["day"]))
        assert found == [
            Document(str(i), f"text {i}", {"source": "a.parquet", "day": "2024-02-29"}) for i in range(n)
        ]

    @pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
    def test_parquet_kinds_of_text(self, kind: Any) -> None:
        pq.write_table(pa.table({"text": pa.array(["a", "b"]).cast(kind)}), "a.parquet")
        assert texts("a.parquet") == {"a.parquet#1": "a", "a.parquet#2": "b"}

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1))
    def test_any_text_survives_every_table(self, rows: list[str]) -> None:
        rows = [row + "." for row in rows]  # white space alone is no text
        with open("a.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["text"], *([row] for row in rows)])
        write("a.jsonl", "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows))
        pq.write_table(pa.table({"text": rows}), "a.parquet")
        for name in ("a.csv", "a.jsonl", "a.parquet"):
            assert list(texts(name).values()) == rows, name

    def test_documents_come_before_the_file_is_read_to_its_end(self) -> None:
        path = write("a.jsonl", '{"text": "a"}\n{"text": \n')
        documents = read_documents([path])
        assert next(documents).text == "a"
        with pytest.raises(InputError, match=r"a\.jsonl:2"):
            next(documents)


class TestFolders:
    def test_recursive_sorted_known_not_hidden(self) -> None:
        for path in ("kb/b.txt", "kb/a/z.md", "kb/a.txt", "kb/.git/c.txt", "kb/.d.txt", "kb/e.png", "kb/README"):
            write(path, path)
        documents = list(read_documents(["kb"]))
        assert [d.id for d in documents] == ["kb/a/z.md", "kb/a.txt", "kb/b.txt"]
        assert [d.text for d in documents] == [d.metadata["source"] for d in documents] == [d.id for d in documents]

    @pytest.mark.parametrize("given", ["{0}/kb", "./kb", "kb/", "kb/a/..", "kb/../kb"])
    def test_ids_begin_with_the_folder_name_however_it_is_given(self, folder: Path, given: str) -> None:
        write("kb/a/f.txt", "words")
        assert texts(given.format(folder)) == {"kb/a/f.txt": "words"}

    def test_current_folder_has_a_name(self, folder: Path) -> None:
        write("f.txt", "words")
        assert texts(".") == {f"{folder.name}/f.txt": "words"}

    def test_pipes_are_left_alone_and_dead_links_reported(self) -> None:
        write("kb/a.txt", "words")
        os.mkfifo("kb/pipe.txt")
        os.symlink("nowhere", "kb/link.txt")
        documents, skipped = skipping("kb")
        assert documents == {"kb/a.txt": "words"}
        assert "kb/link.txt cannot be read: No such file" in str(skipped["kb/link.txt"])
        assert list(skipped) == ["kb/link.txt"]

    def test_folder_without_documents(self) -> None:
        write("kb/e.png", "")
        with pytest.raises(InputError, match=r"no document found in kb; supported suffixes are \.txt, \.md"):
            texts("kb")


class _Stdin(io.TextIOWrapper):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")


class TestStdin:
    @pytest.mark.parametrize("content", ["two\nlines\r\n", '{"text": "a brace"\n', "{curly} words", '["text"]'])
    def test_text(self, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
        name = "stdin@" + hashlib.sha256(content.encode()).hexdigest()[:12]
        monkeypatch.setattr(sys, "stdin", _Stdin(content.encode()))
        assert list(read_documents(["-"])) == [Document(name, content, {"source": name})]

    def test_json_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = b'\n {"text": "a"}\n{"text": "b"}'
        name = "stdin@" + hashlib.sha256(rows).hexdigest()[:12]
        monkeypatch.setattr(sys, "stdin", _Stdin(rows))
        assert texts("-") == {f"{name}#2": "a", f"{name}#3": "b"}

    def test_a_text_stream_in_its_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("wörds"))
        assert texts("-") == {"stdin@" + hashlib.sha256("wörds".encode()).hexdigest()[:12]: "wörds"}

    def test_empty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", _Stdin(b"\n"))
        with pytest.raises(InputError, match="stdin is empty"):
            texts("-")

    def test_twice(self) -> None:
        with pytest.raises(InputError, match=r'"-" \(standard input\) was given twice'):
            texts("-", "-")


def pdf_bytes(text: str) -> bytes:
    """A one-page PDF, written by hand."""
    stream = f"BT /F1 24 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, places = b"%PDF-1.4\n", []
    for i, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj%s\nendobj\n" % (i, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"xref\n0 6\n0000000000 65535 f \n%strailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        table,
        len(out),
    )


class TestPdf:
    def test_text(self) -> None:
        pytest.importorskip("pypdf", reason="needs pip install 'ctxcomp-rag[pdf]'")
        assert texts(write("a.pdf", pdf_bytes("Harbour depth: 12 m"))) == {"a.pdf": "Harbour depth: 12 m"}

    def test_scan(self) -> None:
        pytest.importorskip("pypdf", reason="needs pip install 'ctxcomp-rag[pdf]'")
        with pytest.raises(InputError, match=r"a\.pdf has no text \(a scan\?\)"):
            texts(write("a.pdf", pdf_bytes("")))

    def test_broken(self) -> None:
        pytest.importorskip("pypdf", reason="needs pip install 'ctxcomp-rag[pdf]'")
        with pytest.raises(InputError, match=r"a\.pdf is not a readable PDF"):
            texts(write("a.pdf", b"%PDF-1.4\nnothing else"))

    def test_password(self) -> None:
        pypdf = pytest.importorskip("pypdf", reason="needs pip install 'ctxcomp-rag[pdf]'")
        writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf_bytes("secret")))
        writer.encrypt("word", algorithm="RC4-128")
        writer.write("a.pdf")
        with pytest.raises(InputError, match=r"a\.pdf is protected by a password"):
            texts("a.pdf")

    def test_without_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def without_pypdf(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.partition(".")[0] == "pypdf":
                raise ImportError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without_pypdf)
        with pytest.raises(InputError, match=r"a\.pdf: reading PDF needs pypdf; run pip install 'ctxcomp-rag\[pdf\]'"):
            texts(write("a.pdf", pdf_bytes("words")))


GOOD = '{"text": "good"}\n'
# file, content, options, what the error says
BROKEN: list[tuple[str, str | bytes, dict[str, Any], str]] = [
    ("a.txt", b"a\0b", {}, r"binary file a\.txt: .*byte 1 is 0x00"),
    ("a.txt", "Ä".encode("latin-1") + b"b", {}, r"binary file a\.txt: .*byte 0 is 0xc4"),
    ("a.md", "words".encode("utf-16"), {}, r"binary file a\.md"),
    ("a.html", b"\xff\xfe", {}, r"binary file a\.html"),
    ("a.jsonl", (GOOD * 100_000).encode() + b"\xff", {}, r"binary file a\.jsonl"),
    ("a.jsonl", GOOD.encode() + b"\0", {}, r"binary file a\.jsonl"),
    ("a.csv", b"text\nwords\n\xe2\x82", {}, r"binary file a\.csv: .*it ends inside a character"),
    ("a.txt", "", {}, r"a\.txt is empty"),
    ("a.txt", " \n\t", {}, r"a\.txt is empty"),
    ("a.jsonl", "", {}, r"a\.jsonl is empty"),
    ("a.jsonl", "\n\n", {}, r"a\.jsonl has no rows"),
    ("a.csv", "", {}, r"a\.csv is empty"),
    ("a.csv", "\n\n", {}, r"a\.csv is empty"),
    ("a.csv", "text\n", {}, r"a\.csv has a header but no rows"),
    ("a.csv", "a,b\n1,2\n", {}, r"a\.csv has no column 'text'; its columns are: a, b"),
    ("a.csv", "text\nx\n", {"id_column": "id"}, r"a\.csv has no column 'id'; its columns are: text"),
    ("a.csv", "text\nx\n", {"metadata_columns": ["k"]}, r"a\.csv has no column 'k'"),
    ("a.csv", "text,text\nx,y\n", {}, r"a\.csv has 2 columns 'text'"),
    ("a.csv", 'text\n"x\n', {}, r"a\.csv: broken CSV before line 3: unexpected end of data"),
    ("a.jsonl", GOOD, {"metadata_columns": ["k"]}, r"a\.jsonl:1 has no column 'k'; its columns are: text"),
    ("a.txt.gz", gzip.compress(b"words" * 1000, mtime=0)[:-9], {}, r"broken compressed file a\.txt\.gz"),
    ("a.txt.gz", b"words", {}, r"a\.txt\.gz cannot be read: Not a gzipped file"),
    ("a.txt.xz", b"words", {}, r"broken compressed file a\.txt\.xz"),
    ("a.parquet", b"words", {}, r"a\.parquet is not a readable Parquet file"),
]
# row 2 of 3 is broken
BROKEN_ROWS: list[tuple[str, str, dict[str, Any], str]] = [
    ("jsonl", '{"text": "a}', {}, r"a\.jsonl:2 is not a line of JSON: Unterminated string starting at column 10"),
    ("jsonl", "[" * 100_000, {}, r"a\.jsonl:2 is not a line of JSON that can be read"),
    ("jsonl", '{"text": "a", "k": NaN}', {}, r"a\.jsonl:2 is not a line of JSON that can be read: NaN is not JSON"),
    ("jsonl", '["text"]', {}, r"a\.jsonl:2: expected a JSON object per line, found list"),
    ("jsonl", '{"body": "a"}', {}, r"a\.jsonl:2 has no column 'text'; its columns are: body"),
    ("jsonl", '{"text": ""}', {}, r"a\.jsonl#2 has no text in column 'text'"),
    ("jsonl", '{"text": null}', {}, r"a\.jsonl#2 has no text"),
    ("jsonl", '{"text": 7}', {}, r"a\.jsonl#2: expected text in column 'text', found int \(7\)"),
    ("jsonl", '{"text": "\\ud800"}', {}, r"a\.jsonl#2 holds half of a surrogate pair"),
    ("jsonl", '{"text": "a", "k": [1]}', {"metadata_columns": ["k"]}, r"a\.jsonl#2: .*in column 'k', found a list"),
    ("jsonl", '{"text": "a", "k": true}', {"id_column": "k"}, r"a\.jsonl#2: .*id in column 'k', found true or false"),
    ("jsonl", '{"text": "a", "k": ""}', {"id_column": "k"}, r"a\.jsonl#2: .*id in column 'k', found an empty string"),
    ("csv", "  ,x", {}, r"a\.csv#2 has no text in column 'text'"),
    ("csv", "a,b,c", {}, r"a\.csv#2 \(line 3\): expected 2 fields as in the header, found 3"),
]


class TestErrors:
    @pytest.mark.parametrize(("name", "content", "options", "message"), BROKEN)
    def test_broken_file(self, name: str, content: str | bytes, options: dict[str, Any], message: str) -> None:
        write("kb/z.txt", "whole")
        write(name, content)
        with pytest.raises(InputError, match=message):
            texts(name, "kb", **options)
        # nothing of a broken file comes through, and everything else does
        documents, skipped = skipping(name, "kb", **options)
        assert documents == {"kb/z.txt": "whole"}
        assert list(skipped) == [name]
        with pytest.raises(InputError, match=message):
            raise skipped[name]

    @pytest.mark.parametrize(("kind", "line", "options", "message"), BROKEN_ROWS)
    def test_broken_row(self, kind: str, line: str, options: dict[str, Any], message: str) -> None:
        rows = {"jsonl": ['{"text": "one", "k": "1"}', line, '{"text": "three", "k": 3}'],
                "csv": ["text,k", "one,1", line, "three,3"]}[kind]  # fmt: skip
        path = write(f"a.{kind}", "\n".join(rows))
        with pytest.raises(InputError, match=message):
            texts(path, **options)
        documents, skipped = skipping(path, **options)
        assert list(documents.values()) == ["one", "three"]
        assert list(skipped) == [f"{path}#2"]
        with pytest.raises(InputError, match=message):
            raise skipped[f"{path}#2"]

    def test_parquet_rows_and_columns(self) -> None:
        pq.write_table(pa.table({"text": ["one", None, "three"], "n": [1, 2, 3], "l": [[1]] * 3}), "a.parquet")
        with pytest.raises(InputError, match=r"a\.parquet#2 has no text in column 'text'"):
            texts("a.parquet")
        documents, skipped = skipping("a.parquet")
        assert documents == {"a.parquet#1": "one", "a.parquet#3": "three"}
        assert list(skipped) == ["a.parquet#2"]
        with pytest.raises(InputError, match=r"a\.parquet has no column 'body'; its columns are: text, n, l"):
            texts("a.parquet", text_column="body")
        with pytest.raises(InputError, match=r"a\.parquet: expected text in column 'n', found int64"):
            texts("a.parquet", text_column="n")
        with pytest.raises(InputError, match=r"a\.parquet: expected flat values in column 'l', found list"):
            texts("a.parquet", metadata_columns=["l"])
        with pytest.raises(InputError, match=r"a\.parquet: expected strings or integers as ids in column 'l'"):
            texts("a.parquet", id_column="l")

    def test_parquet_without_rows_or_with_damaged_pages(self) -> None:
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), "a.parquet")
        with pytest.raises(InputError, match=r"a\.parquet has no rows"):
            texts("a.parquet")
        pq.write_table(pa.table({"text": [f"text {i}" for i in range(5000)]}), "b.parquet")
        data = bytearray(Path("b.parquet").read_bytes())
        data[8:400] = b"\xff" * 392
        with pytest.raises(InputError, match=r"b\.parquet is not a readable Parquet file"):
            texts(write("b.parquet", bytes(data)))
        column = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
        pq.write_table(pa.table({"text": column}), "c.parquet")
        with pytest.raises(InputError, match=r"c\.parquet is not a readable Parquet file: .*utf-8"):
            texts("c.parquet")

    def test_unknown_path_with_the_nearest_name(self) -> None:
        write("kb/faq/hours.txt", "words")
        for wrong, right in {"kb/faq/huors.txt": "kb/faq/hours.txt", "kb/fag/hours.txt": "kb/faq/hours.txt",
                             "KB/other": "kb", "kb/faq/hours.md": "kb/faq/hours.txt"}.items():  # fmt: skip
            with pytest.raises(InputError, match=f"there is no file or folder '{wrong}'; did you mean '{right}'?"):
                read_documents([wrong])
        with pytest.raises(InputError, match=r"nothing in 'kb' has a name like 'xyz'"):
            read_documents(["kb/xyz/a.txt"])
        with pytest.raises(InputError, match=r"kb/faq/hours\.txt is not a folder"):
            read_documents(["kb/faq/hours.txt/a.txt"])
        with pytest.raises(InputError, match="there is no file or folder"):
            read_documents(["a\0b.txt"])
        with pytest.raises(InputError, match='there is no file or folder ""'):
            read_documents([""])

    @pytest.mark.parametrize("name", ["a.docx", "README", "a.pdf.gz", "a.gz", ".txt", "a.parquet.xz"])
    def test_unknown_suffix(self, name: str) -> None:
        write(name, "words")
        with pytest.raises(InputError, match=f"cannot read '{name}': supported suffixes are ") as caught:
            read_documents([name])
        assert all(suffix in str(caught.value) for suffix in SUPPORTED_SUFFIXES)

    def test_skip_covers_paths_too(self) -> None:
        documents, skipped = skipping("nowhere.txt", write("a.docx", "x"), write("a.txt", "words"))
        assert documents == {"a.txt": "words"}
        assert list(skipped) == ["nowhere.txt", "a.docx"]

    def test_duplicate_ids_name_both_places(self) -> None:
        write("kb/a.jsonl", '{"id": 1, "text": "first"}\n{"id": "1", "text": "second"}\n')
        with pytest.raises(InputError, match=r"id '1' occurs twice: in kb/a\.jsonl#1 and in kb/a\.jsonl#2"):
            texts("kb", id_column="id")
        documents, skipped = skipping("kb", id_column="id")
        assert documents == {"1": "first"}
        assert list(skipped) == ["kb/a.jsonl#2"]
        write("x/kb/b.txt", "one")
        write("y/kb/b.txt", "two")
        with pytest.raises(InputError, match=r"'kb/b\.txt' occurs twice: in x/kb/b\.txt and in y/kb/b\.txt"):
            texts("x/kb", "y/kb")

    def test_nothing_left(self) -> None:
        with pytest.raises(InputError, match=r"no document found in a\.txt; .* skipped \(1\), .*a\.txt is empty"):
            skipping(write("a.txt", ""))
        with pytest.raises(InputError, match="no document found: no path was given"):
            read_documents([])

    def test_arguments(self) -> None:
        write("a.txt", "words")
        with pytest.raises(InputError, match='expected on_error="stop" or "skip", got \'ignore\''):
            read_documents(["a.txt"], on_error="ignore")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="expected a list of metadata columns, got 'lang'"):
            read_documents(["a.txt"], metadata_columns="lang")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self) -> None:
        os.chmod(write("a.txt", "words"), 0)
        with pytest.raises(InputError, match=r"a\.txt cannot be read: Permission denied"):
            texts("a.txt")

    def test_an_error_of_the_consumer_is_not_taken_for_the_files(self) -> None:
        write("a.txt", "words")

        def consume(documents: Iterator[Document]) -> None:
            for _ in documents:
                raise InputError("mine")

        skipped: list[str] = []
        with pytest.raises(InputError, match="mine"):
            consume(read_documents(["a.txt"], on_error="skip", on_skip=lambda place, _: skipped.append(place)))
        assert skipped == []
