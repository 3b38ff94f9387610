"""How span tensors are stored: exactly, or as fewer bytes at a stated error."""

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index.codecs.base import Codec, Role
from ctxcomp_rag.index.codecs.exact import Exact
from ctxcomp_rag.index.codecs.fp8 import Float8
from ctxcomp_rag.index.codecs.integer import Int4, Int8
from ctxcomp_rag.index.codecs.rotated import Rotated2, Rotated3, Rotated4

CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (Exact(), Int8(), Float8(), Int4(), Rotated4(), Rotated3(), Rotated2())}


def codec_named(name: str) -> Codec:
    """Raises InputError for a name that is no codec."""
    if name not in CODECS:
        raise InputError(f"there is no span codec {name!r}; expected one of {', '.join(CODECS)}")
    return CODECS[name]


__all__ = ["CODECS", "Codec", "Role", "codec_named"]
