"""References to spans: the only thing that travels through a framework in the place of a span.

A reference is an opaque string, `[[span:<handle>:<tag>]]`, both 128 bits in URL-safe base64. It is good for one
*scope* (an invocation, a conversation, a tenant) and for a limited time, and whoever cannot mint one cannot guess or
alter one. It names no path, number or chunk id.

Two modes. `registry`: random bits, remembered by this object; for one process. `mac`: the chunk id is sealed under a
key that several processes share (synthetic-IV construction: the tag authenticates index, scope, epoch and chunk id,
and masks the chunk id), so nothing has to be remembered; within an epoch the same chunk in the same scope has the same
reference, which lets a framework's prompt cache hit. All processes need the same key, `index_id` and `seconds`, and
clocks that are less than an epoch apart.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn

from ctxcomp_rag.errors import InputError, SpanReferenceError

REFERENCE = re.compile(r"\[\[span:([A-Za-z0-9_-]{22}):([A-Za-z0-9_-]{22})\]\]")
_PREFIX = "[[span:"
_CHUNK_ID = re.compile(r"[0-9a-f]{32}")
# What is left of a reference that was cut inside its prefix. (Cut further back, its beginning holds the prefix.)
_BEHEADED = re.compile(r"[A-Za-z0-9_-]{22}:[A-Za-z0-9_-]{22}\]\]")

Reason = Literal["malformed", "unknown", "expired", "scope", "duplicate", "deleted", "cut", "damaged"]


@dataclass(frozen=True)
class _Entry:
    chunk_id: str
    scope: str
    expires: float


class SpanReferences:
    """Mints references and resolves them.

    Args:
        index_id: what the references point into; a reference to one index never resolves in another. Any name, but
            "mac" mode needs one.
        mode: "registry" for one process, "mac" where retriever and decoder run in several.
        key: of the "mac" mode, at least 32 bytes, the same in every process; keep it out of configuration and traces.
        seconds: how long a reference is good. In "mac" mode time goes in epochs of this length, and the epoch before
            the present one is still good (so is the next: another process's clock may be ahead).
        clock: seconds since some start; another one for tests.

    Attributes:
        rejected: how often a reference was refused, by reason.
    """

    def __init__(self, index_id: str = "", *, mode: Literal["registry", "mac"] = "registry", key: bytes | None = None,
                 seconds: float = 900.0, clock: Callable[[], float] = time.time) -> None:
        if mode not in ("registry", "mac"):
            raise InputError(f"there is no mode {mode!r}; expected 'registry' or 'mac'")
        if mode == "mac" and (key is None or len(key) < 32):
            raise InputError("mode 'mac' needs a key of at least 32 bytes shared by all processes, got "
                             f"{'none' if key is None else f'{len(key)} bytes'}; make one with secrets.token_bytes(32)")
        if key is not None and not isinstance(key, bytes):
            raise InputError(f"expected a key of bytes, got {type(key).__name__}; decode what you read from the "
                             "environment, with bytes.fromhex for one")
        if mode == "registry" and key is not None:
            raise InputError("a key belongs to mode 'mac'; leave it out, or pass mode='mac'")
        if mode == "mac" and not index_id:  # processes of two indexes may well share a key
            raise InputError("mode 'mac' needs an index_id, the same in every process and another one for each index; "
                             "the name of the index will do")
        if not seconds > 0:
            raise InputError(f"expected a lifetime of more than 0 seconds, got {seconds}")
        self.index_id, self.mode, self.seconds = index_id, mode, seconds
        self.rejected: Counter[str] = Counter()
        self._key, self._clock = key, clock
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._revoked: dict[tuple[str, str], float] = {}  # (kind, name) -> when the last such reference has expired
        self._sweep_at = 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mode={self.mode!r}, seconds={self.seconds:g})"  # never the key

    def mint(self, chunk_id: str, scope: str) -> str:
        """A reference to a chunk, good in `scope` only."""
        if not _CHUNK_ID.fullmatch(chunk_id):
            raise InputError(f"expected the id of a chunk, 32 hex digits, got {chunk_id!r}")
        if not scope:
            raise InputError("expected a scope, got an empty one; use new_scope() for one invocation")
        if self.mode == "mac":
            return self._sealed(bytes.fromhex(chunk_id), scope, self._epoch())
        reference = _spell(secrets.token_bytes(16), secrets.token_bytes(16))
        with self._lock:
            self._sweep()
            self._entries[reference] = _Entry(chunk_id, scope, self._clock() + self.seconds)
        return reference

    def resolve(self, reference: str, scope: str) -> str:
        """The chunk id behind a reference.

        Raises:
            SpanReferenceError: with `reason` "malformed", "unknown" (forged, revoked, or of another index), "expired"
                or "scope". In "mac" mode the last two are "unknown" as well: a tag that does not fit says no more.
        """
        match = REFERENCE.fullmatch(reference) if isinstance(reference, str) else None  # a client's JSON holds anything
        # the last of 22 characters has bits to spare: only one of its spellings is the reference
        if match is None or reference != _spell(_unspell(match[1]), _unspell(match[2])):
            raise self.refused("malformed", "expected a reference to a span, got something else or a piece of one")
        if self.mode == "mac":
            return self._open(_unspell(match[1]), _unspell(match[2]), scope)
        with self._lock:
            entry = self._entries.get(reference)
        if entry is None:
            raise self.refused("unknown", "a reference to a span is forged, revoked, or of another index")
        if entry.expires <= self._clock():
            raise self.refused("expired", f"a reference to a span is older than {self.seconds:g} s; retrieve again")
        if not hmac.compare_digest(_bytes(entry.scope), _bytes(scope)):
            raise self.refused("scope", "a reference to a span was made in another scope")
        return entry.chunk_id

    def revoke(self, *, scope: str | None = None, chunk_id: str | None = None) -> None:
        """Refuse from now on what was minted in a scope or for a chunk.

        In "mac" mode only this process refuses, and it refuses what is minted again for three epochs too: a reference
        minted later is the same string. Take a new scope instead.
        """
        if (scope is None) == (chunk_id is None):
            raise InputError("expected either a scope or a chunk_id to revoke")
        kind, name = ("scope", scope) if scope is not None else ("chunk", chunk_id or "")
        with self._lock:
            if self.mode == "mac":
                self._revoked[(kind, name)] = self._clock() + 3 * self.seconds  # of a clock that is ahead too
                self._sweep()
            else:  # forgotten at once; what is minted later is good again
                self._entries = {r: e for r, e in self._entries.items()
                                 if name != (e.scope if kind == "scope" else e.chunk_id)}

    def refused(self, reason: Reason, message: str) -> SpanReferenceError:
        """Count a refusal and make its error; for what only shows after `resolve`, a chunk that was deleted say."""
        with self._lock:
            self.rejected[reason] += 1
        return SpanReferenceError(reason, message)

    def __len__(self) -> int:
        """References remembered ("mac" mode remembers none)."""
        with self._lock:
            self._sweep(now=True)
            return len(self._entries)

    def __bool__(self) -> bool:
        return True  # also without entries: `references or SpanReferences()` must not take another one

    def __reduce__(self) -> NoReturn:
        raise TypeError("references cannot be pickled or copied: they hold a key, or what only this process knows; "
                        "make them in each process, with mode='mac'")

    def _epoch(self) -> int:
        return int(self._clock() // self.seconds)

    def _mac(self, what: bytes, *fields: bytes) -> bytes:
        assert self._key is not None
        message = b"".join(len(f).to_bytes(8, "big") + f for f in (what, _bytes(self.index_id), *fields))
        return hmac.new(self._key, message, hashlib.sha256).digest()[:16]

    def _sealed(self, chunk: bytes, scope: str, epoch: int) -> str:
        tag = self._tag(chunk, scope, epoch)
        return _spell(_xor(chunk, self._mac(b"mask", tag)), tag)

    def _tag(self, chunk: bytes, scope: str, epoch: int) -> bytes:
        return self._mac(b"tag", _bytes(scope), str(epoch).encode(), chunk)

    def _open(self, handle: bytes, tag: bytes, scope: str) -> str:
        chunk = _xor(handle, self._mac(b"mask", tag))
        now = self._epoch()
        for epoch in (now, now - 1, now + 1):
            if hmac.compare_digest(self._tag(chunk, scope, epoch), tag) and not self._is_revoked(chunk.hex(), scope):
                return chunk.hex()
        raise self.refused("unknown", "a reference to a span is forged, expired, revoked, or of another scope")

    def _is_revoked(self, chunk_id: str, scope: str) -> bool:
        now = self._clock()
        with self._lock:
            return any(self._revoked.get(n, 0.0) > now for n in (("scope", scope), ("chunk", chunk_id)))

    def _sweep(self, now: bool = False) -> None:
        """Forget what has expired; now and then only, since it walks all entries."""
        time_now = self._clock()
        if not now and time_now < self._sweep_at:
            return
        self._sweep_at = time_now + self.seconds / 4
        self._entries = {r: e for r, e in self._entries.items() if e.expires > time_now}
        self._revoked = {n: until for n, until in self._revoked.items() if until > time_now}


def new_scope() -> str:
    """A scope that nobody can guess, for one invocation."""
    return secrets.token_hex(16)


def find_references(text: str) -> list[str]:
    """`text` cut so that odd items are whole references and even items are what stands between them."""
    pieces: list[str] = []
    end = 0
    for match in REFERENCE.finditer(text):
        pieces += [text[end : match.start()], match[0]]
        end = match.end()
    return [*pieces, text[end:]]


def has_cut_reference(text: str) -> bool:
    """Whether text that is no reference holds a piece of one: a text splitter has cut it.

    Wherever a reference is cut in two, one of the pieces at least is noticed.
    """
    return _PREFIX in text or _BEHEADED.search(text) is not None


def quoted(text: str) -> str:
    """Text that names no reference and looks like no piece of one: blanks are put into what does."""
    return _BEHEADED.sub(lambda found: found[0].replace("]]", "] ]"), text.replace(_PREFIX, _PREFIX.replace("s", " s")))


def _spell(handle: bytes, tag: bytes) -> str:
    return f"{_PREFIX}{_base64(handle)}:{_base64(tag)}]]"


def _bytes(name: str) -> bytes:
    return name.encode(errors="surrogatepass")  # any string is a scope, and no two are the same one


def _base64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def _unspell(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "==")


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


__all__ = ["REFERENCE", "SpanReferences", "find_references", "has_cut_reference", "new_scope", "quoted"]
