"""References to spans: what resolves, and that nothing else does."""

from __future__ import annotations

import base64
import copy
import pickle
import string
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxcomp_rag.errors import InputError, SpanReferenceError
from ctxcomp_rag.references import REFERENCE, SpanReferences, find_references, has_cut_reference, new_scope, quoted

KEY = bytes(range(32))
CHUNK, OTHER_CHUNK = "0123456789abcdef" * 2, "f" * 32
SCOPE = "tenant-7"
URL_SAFE = string.ascii_letters + string.digits + "-_"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["registry", "mac"])
def references(request: pytest.FixtureRequest, clock: Clock) -> SpanReferences:
    return make(request.param, clock)


def make(mode: str, clock: Clock, index_id: str = "kb", key: bytes = KEY) -> SpanReferences:
    if mode == "mac":
        return SpanReferences(index_id, mode="mac", key=key, seconds=100, clock=clock)
    return SpanReferences(index_id, seconds=100, clock=clock)


def reason(references: SpanReferences, reference: str, scope: str = SCOPE) -> str:
    with pytest.raises(SpanReferenceError, match="reference to a span") as refusal:
        references.resolve(reference, scope)
    return refusal.value.reason


def altered(reference: str) -> Iterator[str]:
    """Every single-character change, over the alphabet of references and what a parser might take for it."""
    for at, old in enumerate(reference):
        for new in URL_SAFE + "[]:= +/\n\x00\u200b\uff1a\u0430":
            if new != old:
                yield reference[:at] + new + reference[at + 1 :]


# -- what a reference is good for


def test_a_reference_resolves_to_its_chunk_as_often_as_asked(references: SpanReferences) -> None:
    first, second = references.mint(CHUNK, SCOPE), references.mint(OTHER_CHUNK, SCOPE)
    assert [references.resolve(r, SCOPE) for r in (first, second, first)] == [CHUNK, OTHER_CHUNK, CHUNK]
    assert not references.rejected


def test_a_reference_names_no_chunk_scope_or_index(references: SpanReferences) -> None:
    reference = references.mint(CHUNK, SCOPE)
    handle, tag = (base64.urlsafe_b64decode(part + "==") for part in REFERENCE.fullmatch(reference).groups())  # type: ignore[union-attr]
    assert len(handle) == len(tag) == 16
    assert bytes.fromhex(CHUNK) not in (handle, tag)
    assert SCOPE.encode() not in handle + tag
    assert not any(hidden in reference for hidden in (CHUNK, SCOPE))


def test_a_reference_is_good_in_its_scope_only(references: SpanReferences) -> None:
    reference = references.mint(CHUNK, SCOPE)
    for scope in ("tenant-8", "tenant-", "tenant-77", "TENANT-7", "", " tenant-7"):
        assert reason(references, reference, scope) == ("scope" if references.mode == "registry" else "unknown")


def test_scopes_are_told_apart_whatever_characters_they_have(references: SpanReferences) -> None:
    names = ["caf\u00e9", "cafe\u0301", "\ud800", "\udfff", "a\x00b", "a"]
    for name, reference in [(name, references.mint(CHUNK, name)) for name in names]:
        assert [other for other in names if resolves(references, reference, other)] == [name]


def resolves(references: SpanReferences, reference: str, scope: str) -> bool:
    try:
        return references.resolve(reference, scope) == CHUNK
    except SpanReferenceError:
        return False


@pytest.mark.parametrize("mode", ["registry", "mac"])
def test_a_reference_to_one_index_is_unknown_to_another(mode: str, clock: Clock) -> None:
    reference = make(mode, clock).mint(CHUNK, SCOPE)
    assert reason(make(mode, clock, index_id="other"), reference) == "unknown"


def test_fields_of_the_tag_do_not_run_into_one_another(clock: Clock) -> None:
    reference = make("mac", clock, index_id="ab").mint(CHUNK, "c")
    assert reason(make("mac", clock, index_id="a"), reference, "bc") == "unknown"


def test_in_the_registry_a_reference_ends_with_its_time(clock: Clock) -> None:
    references = make("registry", clock)
    reference = references.mint(CHUNK, SCOPE)
    clock.now += 99.9
    assert references.resolve(reference, SCOPE) == CHUNK
    clock.now += 0.1
    assert reason(references, reference) == "expired"


def test_sealed_references_are_good_in_their_epoch_and_the_next_one(clock: Clock) -> None:
    references = make("mac", clock)
    clock.now = 5000.0
    reference = references.mint(CHUNK, SCOPE)
    clock.now = 5199.9
    assert references.resolve(reference, SCOPE) == CHUNK
    clock.now = 5200.0
    assert reason(references, reference) == "unknown"


def test_a_clock_that_is_a_little_behind_the_minting_one_still_resolves(clock: Clock) -> None:
    ahead, behind = Clock(), Clock()
    ahead.now, behind.now = 5000.1, 4999.9
    reference = make("mac", ahead).mint(CHUNK, SCOPE)
    assert make("mac", behind).resolve(reference, SCOPE) == CHUNK
    behind.now = 4899.9
    assert reason(make("mac", behind), reference) == "unknown"


def test_sealed_references_repeat_within_a_scope_and_an_epoch_and_never_beyond(clock: Clock) -> None:
    references, elsewhere = make("mac", clock), make("mac", clock)
    first = references.mint(CHUNK, SCOPE)
    clock.now += 99
    assert references.mint(CHUNK, SCOPE) == elsewhere.mint(CHUNK, SCOPE) == first
    others = [references.mint(OTHER_CHUNK, SCOPE), references.mint(CHUNK, "tenant-8")]
    clock.now += 1
    assert len({first, *others, references.mint(CHUNK, SCOPE)}) == 4


def test_registered_references_never_repeat(clock: Clock) -> None:
    references = make("registry", clock)
    assert len({references.mint(CHUNK, SCOPE) for _ in range(100)}) == 100


# -- processes and keys


def test_two_processes_with_one_key_agree(clock: Clock) -> None:
    reference = make("mac", clock).mint(CHUNK, SCOPE)
    program = (
        "import sys; from ctxcomp_rag.references import SpanReferences\n"
        "r = SpanReferences('kb', mode='mac', key=bytes(range(32)), seconds=100, clock=lambda: 1_000_000.0)\n"
        "print(r.resolve(sys.argv[1], 'tenant-7'), r.mint('f' * 32, 'tenant-7'))"
    )
    done = subprocess.run([sys.executable, "-c", program, reference], capture_output=True, text=True, check=True)
    resolved, minted = done.stdout.split()
    assert resolved == CHUNK
    assert make("mac", clock).resolve(minted, SCOPE) == OTHER_CHUNK


def test_another_key_refuses(clock: Clock) -> None:
    assert reason(make("mac", clock, key=bytes(32)), make("mac", clock).mint(CHUNK, SCOPE)) == "unknown"


def test_another_registry_refuses(clock: Clock) -> None:
    assert reason(make("registry", clock), make("registry", clock).mint(CHUNK, SCOPE)) == "unknown"


# -- forgery


@pytest.mark.parametrize("mode", ["registry", "mac"])
@given(text=st.one_of(
    st.text(), st.from_regex(REFERENCE, fullmatch=True),
    st.builds("[[span:{}:{}]]".format, st.text(URL_SAFE, min_size=20, max_size=24),
              st.text(URL_SAFE, min_size=20, max_size=24))))
def test_text_that_nobody_minted_never_resolves(mode: str, text: str) -> None:
    references = make(mode, Clock())
    references.mint(CHUNK, SCOPE)
    assert reason(references, text) in ("malformed", "unknown")


def test_no_single_character_can_be_changed(references: SpanReferences) -> None:
    reference = references.mint(CHUNK, SCOPE)
    variants = list(altered(reference))
    reasons = [reason(references, variant) for variant in variants]
    assert set(reasons) == {"malformed", "unknown"}
    for variant, why in zip(variants, reasons, strict=True):
        assert why == "malformed" or REFERENCE.fullmatch(variant)


def test_a_piece_of_a_reference_resolves_nowhere(references: SpanReferences) -> None:
    reference = references.mint(CHUNK, SCOPE)
    for at in range(len(reference)):
        assert reason(references, reference[:at]) == "malformed"
        assert reason(references, reference[at + 1 :]) == "malformed"
        assert reason(references, reference[:at] + reference[at + 1 :]) == "malformed"


@pytest.mark.parametrize("disguise", [
    lambda r: f" {r}", lambda r: f"{r} ", lambda r: f"{r}\n", lambda r: f"\ufeff{r}", lambda r: r + r,
    lambda r: r.replace("span", "Span"), lambda r: r.replace("span", "sp\u0430n"), lambda r: r.replace(":", "\uff1a"),
    lambda r: r.replace("[[", "\uff3b\uff3b"), lambda r: r.replace("[[", "[ ["), lambda r: r.replace("]]", "==]]"),
    lambda r: r.replace(":", ":\u200b"), lambda r: r.translate({ord(d): 0x660 + int(d) for d in "0123456789"} |
                                                               {ord(c): ord(c) + 0xFEE0 for c in string.ascii_letters}),
    lambda r: r.swapcase(), lambda r: r.encode(), lambda r: None, lambda r: 7, lambda r: {"reference": r},
])
def test_what_only_looks_like_the_reference_is_refused(references: SpanReferences, disguise: object) -> None:
    disguised = disguise(references.mint(CHUNK, SCOPE))  # type: ignore[operator]
    assert reason(references, disguised) in ("malformed", "unknown")


def test_the_spare_bits_of_the_last_character_give_no_second_spelling(references: SpanReferences) -> None:
    """22 characters hold 132 bits: 15 other last characters decode to the same 16 bytes."""
    reference = references.mint(CHUNK, SCOPE)
    handle, tag = REFERENCE.fullmatch(reference).groups()  # type: ignore[union-attr]

    def twins(part: str) -> list[str]:
        value = base64.urlsafe_b64decode(part + "==")
        return [part[:-1] + c for c in URL_SAFE
                if c != part[-1] and base64.urlsafe_b64decode(part[:-1] + c + "==") == value]

    second = [f"[[span:{h}:{tag}]]" for h in twins(handle)] + [f"[[span:{handle}:{t}]]" for t in twins(tag)]
    assert len(second) == 30
    assert {reason(references, r) for r in second} == {"malformed"}


def test_handle_and_tag_of_two_references_do_not_mix(references: SpanReferences) -> None:
    (handle, tag), (other_handle, other_tag) = (
        REFERENCE.fullmatch(references.mint(c, SCOPE)).groups() for c in (CHUNK, OTHER_CHUNK))  # type: ignore[union-attr]
    for forged in (f"[[span:{handle}:{other_tag}]]", f"[[span:{other_handle}:{tag}]]", f"[[span:{tag}:{handle}]]"):
        assert reason(references, forged) == "unknown"


# -- revoking and forgetting


def test_revoking_a_scope_ends_its_references_and_no_others(references: SpanReferences) -> None:
    gone, stays = references.mint(CHUNK, SCOPE), references.mint(CHUNK, "tenant-8")
    references.revoke(scope=SCOPE)
    assert reason(references, gone) == "unknown"
    assert references.resolve(stays, "tenant-8") == CHUNK


def test_revoking_a_chunk_ends_its_references_in_all_scopes(references: SpanReferences) -> None:
    gone = {scope: references.mint(CHUNK, scope) for scope in (SCOPE, "tenant-8")}
    stays = references.mint(OTHER_CHUNK, SCOPE)
    references.revoke(chunk_id=CHUNK)
    assert [reason(references, r, scope) for scope, r in gone.items()] == ["unknown", "unknown"]
    assert references.resolve(stays, SCOPE) == OTHER_CHUNK


def test_a_scope_with_the_name_of_a_chunk_is_not_revoked_with_it(references: SpanReferences) -> None:
    reference = references.mint(OTHER_CHUNK, CHUNK)
    references.revoke(chunk_id=CHUNK)
    references.revoke(scope=OTHER_CHUNK)
    assert references.resolve(reference, CHUNK) == OTHER_CHUNK


def test_after_revoking_the_registry_mints_anew(clock: Clock) -> None:
    references = make("registry", clock)
    references.revoke(chunk_id=CHUNK)
    assert references.resolve(references.mint(CHUNK, SCOPE), SCOPE) == CHUNK


def test_a_revoked_seal_never_comes_back_to_life(clock: Clock) -> None:
    """Also one of a process whose clock is an epoch ahead."""
    ahead = Clock()
    ahead.now = clock.now + 100
    references, minted = make("mac", clock), [make("mac", c).mint(CHUNK, SCOPE) for c in (clock, ahead)]
    references.revoke(scope=SCOPE)
    for _ in range(40):
        assert {reason(references, r) for r in minted} == {"unknown"}
        clock.now += 10
    assert references.resolve(references.mint(CHUNK, SCOPE), SCOPE) == CHUNK  # a new epoch, a new reference


@pytest.mark.parametrize("which", [{}, {"scope": "a", "chunk_id": CHUNK}])
def test_revoking_needs_to_know_what(references: SpanReferences, which: dict[str, str]) -> None:
    with pytest.raises(InputError, match="either a scope or a chunk_id"):
        references.revoke(**which)


def test_the_registry_forgets_what_has_expired(clock: Clock) -> None:
    references = make("registry", clock)
    for i in range(2000):
        references.mint(CHUNK, SCOPE)
        clock.now += 1
        assert len(references._entries) <= 126  # 100 s and the quarter between two sweeps, without asking len
        if i % 500 == 0:
            assert len(references) <= 100
    clock.now += 100
    assert len(references) == 0


def test_sealing_remembers_nothing_and_revoking_forgets(clock: Clock) -> None:
    references = make("mac", clock)
    for i in range(1000):
        references.mint(CHUNK, SCOPE)
        references.revoke(scope=f"scope-{i}")
        clock.now += 1
    assert len(references) == 0
    assert len(references._revoked) <= 326


def test_an_object_without_entries_is_still_true(references: SpanReferences) -> None:
    """`references or SpanReferences()` must not exchange the one that was passed."""
    assert len(references) == 0
    assert references


# -- counters, secrets, threads


def test_refusals_are_counted_by_reason(clock: Clock) -> None:
    references = make("registry", clock)
    reference = references.mint(CHUNK, SCOPE)
    references.resolve(reference, SCOPE)
    for wrong in ("", "text", reference[:-1]):
        reason(references, wrong)
    reason(references, make("registry", clock).mint(CHUNK, SCOPE))
    reason(references, reference, "tenant-8")
    clock.now += 100
    reason(references, reference)
    assert references.rejected == {"malformed": 3, "unknown": 1, "scope": 1, "expired": 1}


def test_neither_repr_nor_messages_tell_the_key_a_reference_or_a_scope(references: SpanReferences) -> None:
    reference = references.mint(CHUNK, SCOPE)
    shown = [repr(references), str(references)]
    for wrong, scope in [(reference, "tenant-8"), (reference[:-1], SCOPE), (reference.swapcase(), SCOPE)]:
        with pytest.raises(SpanReferenceError, match="reference to a span") as refusal:
            references.resolve(wrong, scope)
        shown += [str(refusal.value), repr(refusal.value)]
    secret = [KEY.hex(), repr(KEY)[2:20], reference, reference[7:29], CHUNK, SCOPE, "tenant-8"]
    assert [s for s in secret for line in shown if s in line] == []


def test_references_are_not_pickled_or_copied(references: SpanReferences) -> None:
    for how in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match="make them in each process, with mode='mac'"):
            how(references)


def test_threads_mint_resolve_revoke_and_are_refused_at_once(references: SpanReferences) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            scope = f"scope-{number}"
            for _ in range(100):
                reference = references.mint(CHUNK, scope)
                assert references.resolve(reference, scope) == CHUNK
                reason(references, "forged")
            references.revoke(scope=scope)
            assert reason(references, reference, scope) == "unknown"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert references.rejected == {"malformed": 800, "unknown": 8}
    assert len(references) == 0


# -- arguments


@pytest.mark.parametrize(("options", "message"), [
    ({"mode": "magic"}, "no mode 'magic'; expected 'registry' or 'mac'"),
    ({"mode": "mac"}, "at least 32 bytes shared by all processes, got none"),
    ({"mode": "mac", "key": b"short"}, "at least 32 bytes shared by all processes, got 5 bytes"),
    ({"mode": "mac", "key": "ab" * 32}, "expected a key of bytes, got str; decode .* bytes.fromhex"),
    ({"key": KEY}, "a key belongs to mode 'mac'"),
    ({"mode": "mac", "key": KEY, "index_id": ""}, "needs an index_id, the same in every process"),
    ({"seconds": 0}, "more than 0 seconds, got 0"),
    ({"seconds": float("nan")}, "more than 0 seconds, got nan"),
])
def test_settings_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        SpanReferences(**{"index_id": "kb", **options})  # type: ignore[arg-type]
    assert "abab" not in str(refusal.value)


@pytest.mark.parametrize("chunk_id", ["", "abc", "F" * 32, CHUNK + "\n", "../" + "a" * 29])
def test_only_chunk_ids_are_minted(references: SpanReferences, chunk_id: str) -> None:
    with pytest.raises(InputError, match="id of a chunk, 32 hex digits"):
        references.mint(chunk_id, SCOPE)


def test_an_empty_scope_is_refused(references: SpanReferences) -> None:
    with pytest.raises(InputError, match=r"got an empty one; use new_scope\(\)"):
        references.mint(CHUNK, "")


def test_a_lifetime_without_end_is_possible(clock: Clock) -> None:
    for references in (SpanReferences("kb", seconds=float("inf"), clock=clock),
                       SpanReferences("kb", mode="mac", key=KEY, seconds=float("inf"), clock=clock)):
        reference = references.mint(CHUNK, SCOPE)
        clock.now += 1e9
        assert references.resolve(reference, SCOPE) == CHUNK


def test_new_scopes_cannot_be_guessed() -> None:
    assert len({new_scope() for _ in range(100)}) == 100
    assert len(bytes.fromhex(new_scope())) == 16


# -- references in text


@given(st.lists(st.one_of(st.text(), st.just("[["), st.just("[[span:"), st.just("]]"))), st.integers(0, 5))
def test_references_are_found_whole_and_in_order_and_nothing_is_lost(texts: list[str], count: int) -> None:
    references = SpanReferences()
    minted = [references.mint(CHUNK, SCOPE) for _ in range(count)]
    between = [*texts, *[""] * (count + 1)][: count + 1]
    text = "".join(t + r for t, r in zip(between, [*minted, ""], strict=True))
    pieces = find_references(text)
    assert "".join(pieces) == text
    assert pieces[1::2] == minted
    assert pieces[::2] == between


def test_wherever_a_reference_is_cut_one_of_the_pieces_shows_it() -> None:
    for _ in range(20):  # whatever the random characters are
        reference = SpanReferences().mint(CHUNK, SCOPE)
        for at in range(1, len(reference)):
            head, tail = f"The tower {reference[:at]}", f"{reference[at:]} is high."
            assert (REFERENCE.search(head), REFERENCE.search(tail)) == (None, None)
            assert has_cut_reference(head) or has_cut_reference(tail)


@pytest.mark.parametrize("text", [
    "", "plain", "[[wiki link]]", "[[Category:American_male_novelist]]", "a[[b]]", "span:x", "[span]",
    "[[File:" + "x" * 22 + "]]", "x" * 64,
])
def test_ordinary_text_holds_no_cut_reference(text: str) -> None:
    assert not has_cut_reference(text)


@given(st.text(max_size=40), st.text(max_size=40))
def test_quoted_text_names_no_reference_and_looks_like_no_piece_of_one(before: str, after: str) -> None:
    reference = SpanReferences("kb").mint("0" * 32, "scope")
    for cut in range(0, len(reference) + 1, 5):
        text = quoted(before + reference[:cut] + after + reference[cut:])
        assert find_references(text)[1::2] == []
        assert not has_cut_reference(text)
    assert quoted("plain [brackets] and [[wiki]] links") == "plain [brackets] and [[wiki]] links"
