"""An answer that quotes is a run of words of its sources, or a refusal, whatever the decoder would have said."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ctxcomp_rag.decoding import FrozenDecoder, Generation, GenerationSettings, Part, TokenIds
from ctxcomp_rag.decoding.generation import Progress, Sampler
from ctxcomp_rag.decoding.lookup import generate_drafted
from ctxcomp_rag.decoding.quoting import Quoting, cuts, likeliest, narrowed, whole_characters
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.fictional import NOT_STATED
from ctxcomp_rag.tokenization import TextTokenizer
from tests.tiny_models import ARCHITECTURES, tiny_backbone

PROMPT: list[Part] = [TokenIds((5, 9, 200, 31, 77))]
SOURCES = ("The dam at Oril is 48.5 m\n\thigh; it was built by\u00a0Ana Ruiz-Íñigo.",
           "東京の塔は高い。 На реке Оби 1,200 барж")
QUOTED = GenerationSettings(max_new_tokens=24, quote_from=SOURCES)
WHOLE = [" ".join(source.split()) for source in SOURCES]


def decoder(name: str = "llama") -> FrozenDecoder:
    return FrozenDecoder(tiny_backbone(name))


def stands(said: str) -> bool:
    """Whether a source has these words, from the beginning of one to the end of one. Spelt out."""
    return any(source[begin : begin + len(said)] == said and not cuts(source, begin)
               and not cuts(source, begin + len(said)) for source in WHOLE for begin in range(len(source)))


def check(made: Generation) -> None:
    said = " ".join(made.text.split())
    assert said in ("", NOT_STATED) or stands(said), made.text


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


@pytest.mark.parametrize(("spelt", "expected"), [
    (b"a", ("a", b"")), ("aé".encode(), ("aé", b"")), ("aé".encode()[:-1], ("a", b"\xc3")),
    ("東京".encode()[:-1], ("東", "京".encode()[:2])), (b"\xe6\xe6", None), (b"a\xff", None), (b"", ("", b""))])
def test_bytes_are_whole_characters_and_the_beginning_of_one(spelt: bytes, expected: tuple[str, bytes] | None) -> None:
    assert whole_characters(spelt) == expected


def test_half_a_character_is_said_only_where_its_source_or_a_refusal_goes_on_with_it() -> None:
    quoting = Quoting(SOURCES, ["non précisé"])
    assert quoting.may_begin("Ana Ruiz-", "Í".encode()[:1])
    assert not quoting.may_begin("Ana Ruiz-", "東".encode()[:1])
    assert quoting.may_begin("", "東".encode()[:2])
    assert quoting.may_begin("non pr", "é".encode()[:1])


# -- a decoder that wants to say a given text, as far as it is let


def byte_fallback() -> TextTokenizer:
    """A tokenizer as SentencePiece makes them: letters it does not know are spelt in bytes."""
    letters = [chr(c) for c in range(33, 127)]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *letters]
    model = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True,
                                 unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    model.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    model.add_special_tokens(["<s>", "</s>", "<unk>"])
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>",
                                                 unk_token="<unk>"))


TOKENIZERS = {"byte-level": tiny_backbone("llama").tokenizer, "byte fallback": byte_fallback()}


def wanting(wanted: str, settings: GenerationSettings, tokenizer: TextTokenizer) -> Progress:
    """The answer of a decoder that wants this text and then to end; what it streams is a part of it on the way."""
    end, size = tokenizer.hf.eos_token_id, len(tokenizer.hf)
    progress, sampler = Progress(tokenizer, settings, frozenset({end})), Sampler(settings, torch.device("cpu"))
    shown = ""
    for token in [*tokenizer.encode(wanted), *[end] * 60]:
        scores = torch.zeros(size)
        scores[end], scores[token] = 5, 50
        progress.take(scores, sampler)
        assert progress.settled.startswith(shown)
        shown = progress.settled
        if progress.finish_reason:
            break
    assert shown == progress.text
    return progress


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(("source", "wanted"), [
    ("The town Łódź is big", "Łódź"), ("the tower 東京 is", "東京"), ("it has 👩‍👩‍👧 there", "👩‍👩‍👧"),
    ("абв где", "где"),
    ("by José Ruiz.", "José Ruiz"), ("by Jos\ufffd Ruiz.", "Jos\ufffd Ruiz"), ("The town is big", "town is")])
def test_what_a_source_states_is_said_to_the_letter(source: str, wanted: str, tokenizer: str) -> None:
    made = wanting(wanted, GenerationSettings(60, quote_from=(source,)), TOKENIZERS[tokenizer])
    assert (made.text.strip(), made.finish_reason) == (wanted, "stop")


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("refusal", ["not stated", "non précisé", "не указано", "未提及"])
def test_a_refusal_is_said_to_the_letter(refusal: str, tokenizer: str) -> None:
    settings = GenerationSettings(60, quote_from=("It is 31.5 m tall",), refusals=(refusal,))
    assert wanting(refusal, settings, TOKENIZERS[tokenizer]).text.strip() == refusal
    assert GenerationSettings().refusals == (NOT_STATED,)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("tokens", range(1, 12))
def test_an_answer_that_is_cut_short_is_cut_where_a_word_ends(tokens: int, tokenizer: str) -> None:
    settings = GenerationSettings(tokens, quote_from=("The tower 東京 is 31.5 m tall",))
    said = wanting("31.5 m tall", settings, TOKENIZERS[tokenizer]).text.strip()
    assert said in ("", "31.5", "31.5 m", "31.5 m tall")
    stopped = wanting("31.5 m tall", replace(settings, max_new_tokens=60, stop=(".",)), TOKENIZERS[tokenizer])
    assert (stopped.text, stopped.finish_reason) == ("", "stop")


@pytest.mark.parametrize(("source", "part"), [
    ("it was -40 °C", "40 °C"), ("it was \u221212.5 °C", "12.5"), ("at 10:30", "10"), ("1'000 francs", "1"),
    ("3/4 cup", "3"), ("Alex\u00adander", "Alex"), ("1.5.2", "1.5"), ("Ruizs", "Ruiz"),
    ("1e-5 of it", "1e"), ("1e-5 of it", "-5")])
def test_a_part_of_a_number_or_a_word_is_no_answer(source: str, part: str) -> None:
    quoting = Quoting([source])
    assert not (quoting.may_begin(part) and quoting.may_end(part))
    whole = source[source.index(part) - 1 :].strip()
    assert Quoting([f"so {whole}"]).may_end(whole)


def test_a_hyphen_is_no_sign_and_a_genitive_no_part_of_a_name() -> None:
    assert Quoting(["1990-95"]).may_begin("95")
    assert Quoting(["Ana's dog"]).may_end("Ana")


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
    said = " ".join(made.text.split())
    assert any(said in " ".join(text.split()) for text in texts)
    assert not said or Quoting(texts).may_end(said)


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
    assert narrowed(torch.full((5,), -math.inf), {3}.__contains__) is None
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
    with pytest.raises(InputError, match=r"not valid Unicode: character 1 is the lone surrogate '.ud800'"):
        GenerationSettings(quote_from=("a\ud800b",))
    with pytest.raises(InputError, match="expected settings for each of 2 prompts, got 1"):
        decoder().batch([PROMPT, PROMPT], [QUOTED])
    assert GenerationSettings(quote_from="one text").quote_from == ("one text",)
