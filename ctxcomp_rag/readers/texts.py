"""Files that are one document: plain text, Markdown, HTML, PDF; and standard input."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.readers.sources import Columns, Item, Source, decode, document_or_error
from ctxcomp_rag.readers.tables import json_rows, parse_row


def read_text(source: Source, columns: Columns) -> Iterator[Item]:
    with source.open() as file:
        yield _whole(decode(file.read(), source.place), source)


def read_html(source: Source, columns: Columns) -> Iterator[Item]:
    with source.open() as file:
        page = decode(file.read(), source.place)
    try:
        text = visible_text(page)
    except AssertionError as error:  # the standard library's parser, on declarations it does not know
        raise InputError(f"{source.place} is not readable HTML: {error}") from error
    yield _whole(text, source, "has no visible text")


def read_stdin(source: Source, columns: Columns) -> Iterator[Item]:
    data = source.content
    text = decode(data, source.place)
    # named by its content: another text on standard input is another document and replaces nothing
    source = replace(source, name=f"{source.name}@{hashlib.sha256(data).hexdigest()[:12]}")
    first = next((line for line in text.split("\n") if line.strip()), "")
    if first.lstrip().startswith("{"):
        try:
            parse_row(first)
        except (ValueError, RecursionError):
            pass  # a text that begins with a brace
        else:
            yield from json_rows(data.split(b"\n"), source, columns)
            return
    yield _whole(text, source)


def read_pdf(source: Source, columns: Columns) -> Iterator[Item]:
    try:
        from pypdf import PdfReader
    except ImportError as error:
        raise InputError(f"{source.place}: reading PDF needs pypdf; run pip install 'ctxcomp-rag[pdf]'") from error
    with source.open() as file:
        try:
            reader = PdfReader(file)
            # many files are encrypted with the empty password, only to forbid printing
            if reader.is_encrypted and not reader.decrypt(""):
                raise InputError(f"{source.place} is protected by a password; save it without one")
            pages = [page.extract_text() for page in reader.pages]
        except InputError:
            raise
        except Exception as error:  # broken PDFs raise almost anything out of pypdf, KeyError and RecursionError too
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"{source.place} is not a readable PDF ({reason})") from error
    text = "\n\n".join(page for page in pages if page.strip())
    # Fonts without a proper character map come out as halves of surrogate pairs: join what belongs together,
    # mark the rest, rather than losing the file for one glyph.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    yield _whole(text, source, "has no text (a scan?); make it searchable with an OCR program")


def _whole(text: str, source: Source, empty: str = "is empty; leave it out") -> Item:
    if not text.strip():
        return source.place, InputError(f"{source.place} {empty}")
    return source.place, document_or_error(source.name, text, {"source": source.name})


_UNSEEN = frozenset({"script", "style", "template", "noscript", "noframes", "noembed", "iframe"})
_BLOCKS = frozenset({
    "address", "article", "aside", "blockquote", "body", "details", "dialog", "div", "dl", "fieldset",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "main", "nav",
    "ol", "p", "pre", "section", "summary", "table", "title", "ul",
})
_LINES = frozenset({"caption", "dd", "dt", "legend", "li", "option", "tr"})
_CELLS = frozenset({"td", "th"})
# `hidden` is obeyed only where the end tag may not be left out: an unclosed <p hidden> would hide all that follows.
_MAY_STAY_OPEN = frozenset({
    "area", "base", "body", "br", "caption", "col", "colgroup", "dd", "dt", "embed", "head", "hr", "html",
    "img", "input", "li", "link", "meta", "optgroup", "option", "p", "param", "rp", "rt", "source", "tbody",
    "td", "tfoot", "th", "thead", "tr", "track", "wbr",
})
_INVISIBLE_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_HTML_SPACE = re.compile(r"[ \t\n\r\f]+")  # a no-break space is none of them


def visible_text(page: str) -> str:
    """The text of an HTML page as a reader sees it: title first, an empty line between paragraphs, tabs in tables.

    Scripts, styles, templates and elements hidden by attribute or inline style are left out; style sheets are not read.
    """
    parser = _VisibleText()
    parser.feed(page)
    parser.close()
    return "".join(parser.parts)


class _VisibleText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.gap = ""  # white space owed before the next text: " ", "\t", "\n" or "\n\n"
        self.preformatted = 0
        self.unseen = ""  # the element that hides what is inside it
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.unseen:
            self.depth += tag == self.unseen
            return
        attributes = dict(attrs)
        hidden = "hidden" in attributes or _INVISIBLE_STYLE.search(attributes.get("style") or "")
        if tag in _UNSEEN or (hidden and tag not in _MAY_STAY_OPEN):
            self.unseen, self.depth = tag, 1
            return
        if tag == "br":
            self.gap = "\n\n" if "\n" in self.gap else "\n"
        self._separate(tag)
        self.preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self.unseen:
            self.depth -= tag == self.unseen
            if self.depth == 0:
                self.unseen = ""
            return
        self._separate(tag)
        if tag == "pre":
            self.preformatted = max(0, self.preformatted - 1)

    def handle_data(self, data: str) -> None:
        if self.unseen:
            return
        if self.preformatted:
            self._emit(data.removeprefix("\n") if self.gap == "\n\n" else data)  # as browsers do after <pre>
            return
        data = _HTML_SPACE.sub(" ", data)
        if data.startswith(" "):
            self.gap = self.gap or " "
        if words := data.strip(" "):
            self._emit(words)
            self.gap = " " if data.endswith(" ") else ""

    def _emit(self, text: str) -> None:
        if self.parts:
            self.parts.append(self.gap)
        self.gap = ""
        self.parts.append(text)

    def _separate(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.gap = "\n\n"
        elif tag in _LINES and self.gap != "\n\n":
            self.gap = "\n"
        elif tag in _CELLS and "\n" not in self.gap:
            self.gap = "\t"
