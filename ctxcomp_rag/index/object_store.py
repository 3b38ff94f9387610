"""A prefix in a bucket: what an index asks of an object store, with its refusals as sentences.

Credentials, region and endpoint come from the usual variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL, ...), read in the same way by Lance, which reads tables, and by
obstore, which moves whole objects and ranges of them: both stand on the same Rust library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from ctxcomp_rag.errors import IndexFolderError, IndexUnreachableError, InputError

_PART: Final = 32 * 2**20  # bytes asked for at a time
_CONNECT, _ANSWER, _RETRY = 5, 30, 30  # seconds: an endpoint that is not there is given up within a minute
_RETRIES = 3


def object_uri(path: str | Path) -> str | None:
    """s3://BUCKET/PREFIX where the path is one, also after `Path` has eaten a slash; else None."""
    found = re.fullmatch(r"s3:/+(.*?)/*", str(path))
    return f"s3://{found[1]}" if found else None


def require_folder(path: str | Path) -> None:
    """Raises InputError where a path to write to is a URI."""
    uri = object_uri(path)
    if uri:
        raise InputError(f"expected a folder of this machine to write an index to, got {uri}. Write it to one, then "
                         f"publish it: ctxcomp push DIR {uri}")


@dataclass(frozen=True)
class StoredObject:
    """size: bytes. e_tag: changes with the bytes."""

    size: int
    e_tag: str


class ObjectFolder:
    """Objects under s3://BUCKET/PREFIX, by their names below it. Safe to use from several threads.

    Every method raises IndexUnreachableError where the store does not answer or does not let us in, and
    IndexFolderError where there is no such bucket.
    """

    def __init__(self, uri: str) -> None:
        """Raises InputError: no bucket is named, or obstore is not installed."""
        found = re.fullmatch(r"s3://([^/]+)(?:/(.+))?", uri)
        if not found:
            raise InputError(f"expected s3://BUCKET/PREFIX, got {uri!r}")
        try:
            from obstore.store import S3Store
        except ImportError:
            raise InputError(f"{uri} needs obstore. Install it: pip install 'ctxcomp-rag[s3]'") from None
        self.uri, self.bucket = uri, found[1]
        plain = any(value.startswith("http://") for name, value in os.environ.items()
                    if name.startswith("AWS_ENDPOINT"))
        with self._sentences():
            self._store: Any = S3Store(
                self.bucket, prefix=found[2],
                client_options={"connect_timeout": timedelta(seconds=_CONNECT), "timeout": timedelta(seconds=_ANSWER),
                                "allow_http": plain},
                retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY)})
        self.lance_options = {"allow_http": str(plain).lower(), "connect_timeout": f"{_CONNECT}s",
                              "timeout": f"{_ANSWER}s", "client_max_retries": str(_RETRIES),
                              "client_retry_timeout": str(_RETRY)}

    def get(self, name: str) -> tuple[bytes, str]:
        """Bytes and e_tag of an object; raises FileNotFoundError."""
        import obstore

        with self._sentences(name):
            found = obstore.get(self._store, name)
            return bytes(found.bytes()), found.meta["e_tag"] or ""

    def e_tag(self, name: str) -> str:
        """Of an object as it is now; raises FileNotFoundError."""
        import obstore

        with self._sentences(name):
            return obstore.head(self._store, name)["e_tag"] or ""

    def get_range(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` in one request; raises FileNotFoundError."""
        import obstore

        if not size:
            return b""
        with self._sentences(name):
            return bytes(obstore.get_range(self._store, name, start=start, length=size))

    def download(self, name: str, size: int, to: Path) -> None:
        """Copy an object of a known size into a file; raises FileNotFoundError."""
        with open(to, "wb") as file:
            for start in range(0, size, _PART):
                file.write(self.get_range(name, start, min(_PART, size - start)))

    def put(self, name: str, data: bytes | Path, *, replacing: str | None = None, new: bool = False) -> str:
        """Write a whole object, or nothing; returns its e_tag.

        Args:
            replacing: the e_tag that the object has to have.
            new: there must be none yet.

        Raises:
            FileExistsError: it is there although `new`, or not the one that was to be replaced.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create" if new else {"e_tag": replacing} if replacing is not None else "overwrite"
        with self._sentences(name):
            try:
                # a store takes conditions for whole objects only, not for uploads in parts
                parts = None if mode == "overwrite" else False
                return obstore.put(self._store, name, data, mode=mode, use_multipart=parts)["e_tag"] or ""
            except (AlreadyExistsError, PreconditionError) as error:
                raise FileExistsError(name) from error

    def list(self) -> dict[str, StoredObject]:
        """Name -> object, of all there are."""
        import obstore

        with self._sentences():
            return {found["path"]: StoredObject(found["size"], found["e_tag"] or "")
                    for page in obstore.list(self._store) for found in page}

    def delete(self, names: Sequence[str]) -> None:
        """Those that are there are gone afterwards."""
        import obstore

        if names:
            with self._sentences():
                obstore.delete(self._store, list(names))

    @contextmanager
    def _sentences(self, name: str = "") -> Iterator[None]:
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except (FileNotFoundError, BaseError, PermissionError) as error:
            text = str(error)
            if "NoSuchBucket" in text:
                raise IndexFolderError(f"expected a bucket {self.bucket!r} for {self.uri}, but there is none. Check "
                                       f"the name, AWS_REGION and AWS_ENDPOINT_URL, or create it.") from error
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{self.uri}/{name} is missing") from error
            if "169.254.169.254" in text or "169.254.170.2" in text:  # where machines of a cloud ask for theirs
                raise IndexUnreachableError(f"expected credentials for {self.uri}, got none. Set AWS_ACCESS_KEY_ID and "
                                            f"AWS_SECRET_ACCESS_KEY.") from error
            if isinstance(error, PermissionError | PermissionDeniedError | UnauthenticatedError):
                raise IndexUnreachableError(f"expected to be let into {self.uri}, but access was denied. Check "
                                            f"AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they are allowed to do."
                                            ) from error
            raise IndexUnreachableError(f"expected an answer from the object store of {self.uri}, got: "
                                        f"{text.splitlines()[0]}. Check AWS_ENDPOINT_URL and the network, then run the "
                                        f"same command again.") from error
