"""How span tensors are stored: exactly, or as fewer bytes at a stated error."""

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.index.codecs.base import Codec, Role, Tables, as_rows
from ctxcomp_rag.index.codecs.exact import Exact
from ctxcomp_rag.index.codecs.fp8 import Float8
from ctxcomp_rag.index.codecs.integer import Int4, Int8
from ctxcomp_rag.index.codecs.pca import PCA
from ctxcomp_rag.index.codecs.pq import PQ1, PQ2, PQ4
from ctxcomp_rag.index.codecs.rotated import Rotated2, Rotated3, Rotated4

CODECS: dict[str, Codec] = {codec.name: codec for codec in (
    Exact(), Int8(), Float8(), Int4(), Rotated4(), Rotated3(), Rotated2(), PQ4(), PQ2(), PQ1())}
"""By name. Beside them "pca" with any rank, such as "pca96"."""

DEFAULT_CODEC = "int8"
"""How a new index stores its spans unless it is told otherwise (measured: docs/codecs.md)."""


def codec_named(name: str) -> Codec:
    """Raises InputError for a name that is no codec."""
    codec = CODECS.get(name) or PCA.named(name)
    if codec is None:
        raise InputError(f"there is no span codec {name!r}; expected one of {', '.join(CODECS)}, or pca with a rank, "
                         "such as pca96")
    return codec


__all__ = ["CODECS", "DEFAULT_CODEC", "PCA", "Codec", "Role", "Tables", "as_rows", "codec_named"]
