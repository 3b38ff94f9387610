"""API keys and the tenants they belong to. Only hashes of keys are kept, in files and in memory."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from ctxcomp_rag.errors import InputError

LOCAL_TENANT = "local"
_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+sha256:([0-9a-f]{64})")


class Tenants:
    """Who may call. Without keys everybody is the one local tenant.

    Keys are 256 random bits, so a plain SHA-256 of one says nothing about it.

    Args:
        lines: "NAME sha256:HEX" each; blank ones and those that begin with # are skipped. A tenant may have several
            keys.
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._digests: list[tuple[bytes, str]] = []
        for number, line in enumerate(lines, 1):
            stripped = line.strip()
            if not stripped or stripped.startswith("#"):
                continue
            match = _LINE.fullmatch(stripped)
            if match is None:  # the line is not repeated: somebody may have put a key there
                raise InputError(f"expected 'NAME sha256:64 hex digits' in line {number} of the API keys; make one "
                                 "with ctxcomp api-key NAME")
            self._digests.append((bytes.fromhex(match[2]), match[1]))

    @classmethod
    def from_file(cls, path: str | Path) -> Tenants:
        """Read a keys file; raises InputError where it cannot be read or holds no key."""
        try:
            made = cls(Path(path).read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the API keys in {str(path)!r} cannot be read: {error}") from error
        if not made.needs_key:
            raise InputError(f"the file {str(path)!r} holds no API key; add one with ctxcomp api-key NAME >> FILE")
        return made

    @property
    def needs_key(self) -> bool:
        """Whether a call has to bring a key."""
        return bool(self._digests)

    def tenant_of(self, authorization: str | None) -> str | None:
        """The tenant of an `Authorization` header; None where it names no known key. In constant time."""
        if not self._digests:
            return LOCAL_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        presented = hashlib.sha256(key.strip().encode()).digest()
        found: str | None = None
        for digest, tenant in self._digests:  # all of them: the time tells nobody which one it was
            if hmac.compare_digest(digest, presented):
                found = tenant
        return found if scheme.lower() == "bearer" else None


def new_key(tenant: str) -> tuple[str, str]:
    """A fresh API key, and the line that makes it known; raises InputError for a name that is none."""
    key = f"ctx-{secrets.token_urlsafe(32)}"
    line = f"{tenant} sha256:{hashlib.sha256(key.encode()).hexdigest()}"
    if not _LINE.fullmatch(line):
        raise InputError(f"expected a tenant's name of letters, digits, '.', '_' and '-', got {tenant!r}")
    return key, line
