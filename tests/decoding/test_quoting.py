"""An answer that quotes is a run of words of its sources, or a refusal, whatever the decoder would have said."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxcomp_rag.decoding import FrozenDecoder, Generation, GenerationSettings, Part, TokenIds
from ctxcomp_rag.decoding.lookup import generate_drafted
from ctxcomp_rag.decoding.quoting import Quoting, cuts, half_a_character, likeliest, narrowed
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.fictional import NOT_STATED
from tests.tiny_models import ARCHITECTURES, tiny_backbone

PROMPT: list[Part] = [TokenIds((5, 9, 200, 31, 77))]
SOURCES = ("The dam at Oril is 48.5 m\n\thigh; it was built by\u00a0Ana Ruiz-Íñigo.",
           "東京の塔は高い。 На реке Оби 1,200 барж")
QUOTED = GenerationSettings(max_new_tokens=24, quote_from=SOURCES)
WHOLE = [" ".join(source.split()) for source in SOURCES]


def decoder(name: str = "llama") -> FrozenDecoder:
    return FrozenDecoder(tiny_backbone(name))


def stands(said: str, *, whole: bool) -> bool:
    """Whether a source has these words: from the beginning of one, and with `whole` to the end of one. Spelt out."""
    for source in WHOLE:
        for begin in range(len(source)):
            end = begin + len(said)
            if source[begin:end] == said and not cuts(source, begin) and not (whole and cuts(source, end)):
                return True
    return False


def check(made: Generation, refusals: tuple[str, ...] = (NOT_STATED,)) -> None:
    said = " ".join(made.text.split())
    if made.finish_reason == "stop":
        assert not said or said in refusals or stands(said, whole=True), made.text
    else:
        assert any(r.startswith(said) for r in refusals) or stands(said, whole=False), made.text
    assert "\ufffd" not in made.text


@pytest.mark.parametrize(("text", "place", "through"), [
    ("Oril dam", 2, True), ("Oril dam", 4, False), ("Oril dam", 5, False), ("Oril", 0, False), ("Oril", 4, False),
    ("48.5 m", 1, True), ("48.5 m", 2, True), ("48.5 m", 3, True), ("1,200", 2, True), ("in 1923.", 7, False),
    ("Ruiz-Ana", 4, False), ("東京", 1, False), ("Оби", 1, True), ("cafe\u0301s", 4, True), ("a, b", 1, False),
])
def test_a_cut_goes_through_a_word_a_number_or_the_marks_of_a_letter(text: str, place: int, through: bool) -> None:
    assert cuts(text, place) is through


@pytest.mark.parametrize(("said", "begins", "ends"), [
    (" Ana Ruiz", True, True), ("Ana Rui", True, False), ("na Ruiz", False, False), ("is 48.5 m high", True, True),
    ("is 48", True, False), ("Oril is 48.5  m ", True, True), ("built by Bo", False, False), ("not sta", True, False),
    ("not stated", True, True), ("", True, False), (" ", True, False), ("京の塔", True, True), ("ana", False, False),
])
def test_what_may_begin_and_end_an_answer(said: str, begins: bool, ends: bool) -> None:
    quoting = Quoting(SOURCES, ("not stated",))
    assert (quoting.may_begin(said), quoting.may_end(said)) == (begins, ends)


@pytest.mark.parametrize(("spelt", "half"), [
    ("a", ""), ("é", ""), ("aé", "c3"), ("東", "e6"), ("東", "e69d"), ("𝕏", "f09d95"), ("京", "e4ba"), ("京a", "")])
def test_the_first_bytes_of_a_character_are_those_of_one_that_follows(spelt: str, half: str) -> None:
    begun = spelt[:-1].encode() + bytes.fromhex(half) if half else spelt.encode()
    assert half_a_character(begun) == bytes.fromhex(half)
    assert half_a_character(b"\xe6" + begun) == b""


def test_half_a_character_is_said_only_where_its_source_goes_on_with_it() -> None:
    quoting = Quoting(SOURCES)
    assert quoting.may_begin("Ana Ruiz-", "Í".encode()[:1])
    assert not quoting.may_begin("Ana Ruiz-", "東".encode()[:1])
    assert quoting.may_begin("", "東".encode()[:2])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_random_decoder_says_nothing_that_its_sources_do_not(name: str, temperature: float) -> None:
    said = []
    for seed in range(6):
        made = decoder(name).generate(PROMPT, replace(QUOTED, temperature=temperature, seed=seed))
        check(made)
        said.append(made.text)
    assert not temperature or len({text for text in said if text.strip()}) > 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=3), st.integers(0, 99))
def test_whatever_the_texts_are(texts: list[str], seed: int) -> None:
    made = decoder().generate(PROMPT, GenerationSettings(12, 1.0, seed=seed, quote_from=tuple(texts), refusals=()))
    said, quoting = " ".join(made.text.split()), Quoting(texts)
    assert not said or quoting.may_begin(said)
    assert not said or made.finish_reason == "length" or quoting.may_end(said)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("start", range(3))
def test_fewer_texts_that_still_state_the_answer_do_not_change_it(name: str, start: int) -> None:
    prompt: list[Part] = [TokenIds((5, 9, 200, start))]
    long = GenerationSettings(40, quote_from=SOURCES)
    made = decoder(name).generate(prompt, long)
    if made.text.strip():
        again = decoder(name).generate(prompt, replace(long, quote_from=(made.text,)))
        assert again.text.strip() == made.text.strip()


def test_a_decoder_that_quotes_by_itself_is_left_alone() -> None:
    plain, quoting = GenerationSettings(3), GenerationSettings(3, quote_from=("§",))
    endless, left_alone = FrozenDecoder(tiny_backbone("llama"), end_ids=[-1]), 0
    tokenizer = endless.backbone.tokenizer
    for start in range(60):
        prompt: list[Part] = [TokenIds((start, 7))]
        free = endless.generate(prompt, plain)
        words = " ".join(free.text.split())
        if free.text.isascii() and free.text == words != "" and not set(free.token_ids) & tokenizer.control_ids:
            quoted = endless.generate(prompt, replace(quoting, quote_from=(f"§{free.text}§",)))
            assert quoted.token_ids == free.token_ids
            left_alone += 1
    assert left_alone


def test_in_a_batch_each_quotes_its_own_as_it_would_alone() -> None:
    prompts: list[list[Part]] = [PROMPT, [TokenIds((8, 8, 4))], [TokenIds((40, 2))], PROMPT]
    own = [replace(QUOTED, quote_from=(SOURCES[0],)), replace(QUOTED, quote_from=(SOURCES[1],), temperature=1.0),
           GenerationSettings(24), replace(QUOTED, refusals="nothing there")]
    together = decoder().batch(prompts, own)
    assert [g.text for g in together] == [decoder().generate(p, s).text for p, s in zip(prompts, own, strict=True)]
    check(together[0])
    assert own[3].refusals == ("nothing there",)


@pytest.mark.parametrize("seed", range(4))
def test_streamed_and_drafted_it_is_the_same(seed: int) -> None:
    sampled = replace(QUOTED, temperature=1.0, seed=seed)
    assert "".join(decoder().stream(PROMPT, sampled)) == decoder().generate(PROMPT, sampled).text
    prompt: list[Part] = [TokenIds((5, 9, 200, seed))]
    drafted = generate_drafted(decoder(), prompt, SOURCES, QUOTED).generation
    assert drafted.token_ids == decoder().generate(prompt, QUOTED).token_ids


def test_a_refusal_may_be_said_in_the_place_of_words() -> None:
    backbone = tiny_backbone("llama")
    refusal = backbone.tokenizer.encode("not stated")
    told = [*PROMPT, TokenIds(tuple(refusal))]
    only = GenerationSettings(12, quote_from=("§",), refusals=("not stated",))
    assert FrozenDecoder(backbone).generate(told, only).text in ("", "§", "not stated")
    assert GenerationSettings().refusals == (NOT_STATED,)


@pytest.mark.parametrize("seed", range(5))
def test_the_token_is_the_likeliest_of_those_that_are_allowed(seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    scores = torch.randn(300, generator=made)
    kept = set(torch.randperm(300, generator=made)[: 3 + 40 * seed].tolist())
    best = max(kept, key=lambda token: float(scores[token]))
    assert likeliest(scores, kept.__contains__) == best
    left = narrowed(scores, kept.__contains__)
    assert left is not None
    assert int(left.argmax()) == best
    shown = {token for token, score in enumerate(left.tolist()) if score > -math.inf}
    assert shown <= kept
    assert all(left[token] == scores[token] for token in shown)
    assert likeliest(scores, set().__contains__) is None
    assert narrowed(scores, set().__contains__) is None


def test_scores_that_are_no_numbers_are_still_refused() -> None:
    backbone = tiny_backbone("llama")
    request = FrozenDecoder(backbone).request(PROMPT, QUOTED)
    with pytest.raises(InputError, match="are not numbers"):
        request.progress.take(torch.full((300,), float("nan")), request.sampler)


def test_wrong_input_is_answered_with_a_sentence() -> None:
    with pytest.raises(InputError, match="expected texts to quote from, got only white space"):
        GenerationSettings(quote_from=(" ", "\n"))
    with pytest.raises(InputError, match="expected settings for each of 2 prompts, got 1"):
        decoder().batch([PROMPT, PROMPT], [QUOTED])
    assert GenerationSettings(quote_from="one text").quote_from == ("one text",)
