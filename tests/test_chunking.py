"""Splitting documents: nothing lost, nothing twice, never over the bound, and at sentences where possible."""

from __future__ import annotations

import itertools
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxcomp_rag.chunking import Document, split_document
from ctxcomp_rag.errors import InputError
from tests.tiny_models import tiny_backbone

ENCODER = tiny_backbone("llama").tokenizer
LARGEST_CHARACTER = 4  # bytes, so tokens, of one character

# any Unicode but lone surrogates, with white space and sentence ends frequent enough to matter
TEXTS = st.text(st.one_of(st.sampled_from(" \n\t.!?。 ab"), st.characters(exclude_categories=["Cs"])), min_size=1,
                max_size=150).filter(lambda t: t.strip() != "")


class Words:
    """An encoder with one token for each word."""

    def encode(self, text: str) -> list[int]:
        return [0] * len(text.split())


def texts(text: str, **options: int) -> list[str]:
    return [c.text for c in split_document(Document("d", text), Words(), **options)]


@settings(deadline=None, max_examples=150)
@given(TEXTS, st.integers(LARGEST_CHARACTER, 40))
def test_chunks_partition_the_text(text: str, max_tokens: int) -> None:
    chunks = split_document(Document("d", text), ENCODER, max_tokens=max_tokens)
    assert "".join(c.text for c in chunks) == text
    assert [c.start for c in chunks] == [0, *(c.end for c in chunks[:-1])]
    assert all(c.text == text[c.start : c.end] for c in chunks)


@settings(deadline=None, max_examples=150)
@given(TEXTS, st.integers(LARGEST_CHARACTER, 40))
def test_no_chunk_is_over_the_bound(text: str, max_tokens: int) -> None:
    for chunk in split_document(Document("d", text), ENCODER, max_tokens=max_tokens):
        assert 1 <= chunk.num_tokens <= max_tokens
        assert chunk.num_tokens == len(ENCODER.encode(chunk.text))


@settings(deadline=None, max_examples=150)
@given(TEXTS, st.integers(LARGEST_CHARACTER, 40), st.data())
def test_overlapping_chunks_cover_the_text(text: str, max_tokens: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(1, max_tokens - 1))
    chunks = split_document(Document("d", text), ENCODER, max_tokens=max_tokens, overlap_tokens=overlap)
    assert (chunks[0].start, chunks[-1].end) == (0, len(text))
    for before, after in pairwise(chunks):
        assert before.start < after.start <= before.end < after.end
        assert len(ENCODER.encode(text[after.start : before.end])) <= overlap
    assert all(c.num_tokens <= max_tokens for c in chunks)


@settings(deadline=None, max_examples=50)
@given(TEXTS)
def test_same_text_gives_the_same_chunks_and_ids(text: str) -> None:
    first, second = (split_document(Document("d", text), ENCODER, max_tokens=12) for _ in range(2))
    assert first == second
    assert [c.id for c in first] == [c.id for c in second]
    assert len({c.id for c in first}) == len(first)


def test_chunk_ends_with_a_sentence() -> None:
    assert texts("One two three. Four five six. Seven eight.", max_tokens=7) == [
        "One two three. Four five six.", " Seven eight."]


def test_closing_quote_stays_with_its_sentence() -> None:
    assert texts('He said "go now." She went off at once.', max_tokens=6) == ['He said "go now."',
                                                                              " She went off at once."]


def test_chunk_ends_with_a_paragraph_rather_than_with_a_later_sentence() -> None:
    assert texts("One two three four.\n\nFive six. Seven eight nine ten.", max_tokens=7) == [
        "One two three four.", "\n\nFive six. Seven eight nine ten."]


def test_paragraph_that_would_leave_a_chunk_nearly_empty_is_not_taken() -> None:
    assert texts("Title\n\nOne two three. Four five six seven eight nine ten.", max_tokens=6)[0] == (
        "Title\n\nOne two three.")


def test_sentence_that_is_too_long_is_cut_between_words() -> None:
    assert texts("one two three four five six seven", max_tokens=3) == ["one two three", " four five six", " seven"]


def test_text_without_white_space_is_cut_between_characters() -> None:
    chunks = split_document(Document("d", "文" * 10), ENCODER, max_tokens=7)
    assert [c.text for c in chunks] == ["文" * 2] * 5


def test_overlap_begins_at_a_word() -> None:
    assert texts("one two three four five six", max_tokens=3, overlap_tokens=1) == [
        "one two three", " three four five", " five six"]


def test_short_document_is_one_chunk_with_its_metadata() -> None:
    [chunk] = split_document(Document("d", "One two.", {"page": 3}), Words(), max_tokens=5)
    assert (chunk.document_id, chunk.text, chunk.num_tokens, chunk.metadata) == ("d", "One two.", 2, {"page": 3})


def test_chunk_id_depends_on_document_place_and_text() -> None:
    def first_id(document_id: str, text: str) -> str:
        return split_document(Document(document_id, text), Words(), max_tokens=9)[0].id

    assert len({first_id("a", "x y"), first_id("b", "x y"), first_id("a", "x z")}) == 3
    repeated = split_document(Document("a", "x y x y"), Words(), max_tokens=2, overlap_tokens=0)
    assert len({c.id for c in repeated}) == len(repeated)


@pytest.mark.parametrize(("text", "options", "match"), [
    ("", {"max_tokens": 5}, "document 'd' has no text"),
    (" \n ", {"max_tokens": 5}, "document 'd' has no text"),
    ("x", {"max_tokens": 0}, "expected max_tokens >= 1 and 0 <= overlap_tokens < max_tokens, got 0 and 0"),
    ("x", {"max_tokens": 5, "overlap_tokens": 5}, "got 5 and 5"),
    ("x", {"max_tokens": 5, "overlap_tokens": -1}, "got 5 and -1"),
    ("a 😀", {"max_tokens": 3}, "the character '😀' alone needs more than 3 tokens; raise max_tokens"),
])
def test_refusals(text: str, options: dict[str, int], match: str) -> None:
    with pytest.raises(InputError, match=match):
        split_document(Document("d", text), ENCODER, **options)


@pytest.mark.parametrize("overlap", [8, 32, 48, 64, 100, 127])
def test_chunks_make_progress_whatever_the_overlap(overlap: int) -> None:
    """Ends strictly increase: no chunk lies inside its predecessor, and the count stays near the ideal."""
    class Words:
        def encode(self, text: str) -> list[int]:
            return [0] * len(text.split())

    text = "\n\n".join(" ".join(f"word{i}" for i in range(118)) + "." for _ in range(4))
    chunks = split_document(Document("d", text), Words(), max_tokens=128, overlap_tokens=overlap)
    ends = [c.end for c in chunks]
    assert all(a < b for a, b in itertools.pairwise(ends))
    assert all(b.start > a.start for a, b in itertools.pairwise(chunks))
    assert len(chunks) <= 2 * (4 + 4 * 118 // (128 - overlap))


@pytest.mark.parametrize(("fields", "message"), [
    (("", "x"), "non-empty string, got ''"),
    ((7, "x"), "non-empty string, got 7"),
    (("n", None), "document 'n': expected text, got NoneType"),
    (("n", "\ud800"), "its text cannot be stored as UTF-8"),
    (("n\udcff", "x"), "its id cannot be stored as UTF-8"),
    (("n", "x", {"tags": ["a"]}), "expected flat metadata .* got 'tags': list"),
])
def test_documents_that_could_not_be_stored_are_refused_by_name(fields: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Document(*fields)  # type: ignore[arg-type]
