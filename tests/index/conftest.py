"""Small corpora for the tests of the index. Sizes: vectors of 12, soft spans (4, 16), KV spans (2, 2, 3, 8)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.index import AddReport, MemoryIndex
from ctxcomp_rag.spans import DecoderFingerprint, KVSpan, MemorySpan, SoftSpan, SpanSpec
from tests.index.s3 import CREDENTIALS, S3Server

VECTOR_SIZE = 12
DECODER = DecoderFingerprint(
    model_id="tiny/llama", revision="r1", weights_digest="a" * 64, tokenizer_digest="b" * 64, hidden_size=16,
    num_layers=2, num_kv_heads=2, head_dim=8, rope="{}", dtype="float32",
)
OTHER_DECODER = replace(DECODER, model_id="tiny/qwen", weights_digest="c" * 64)
SOFT = SpanSpec("soft", DECODER, "icae-1f0c",
                delimiters={"before": torch.arange(16.0)[None], "after": torch.ones(2, 16)})
KV = SpanSpec("kv", DECODER, "infinipot-77", "spread")


def soft_span(chunk: Chunk, seed: int = 0, dtype: torch.dtype = torch.float32) -> SoftSpan:
    embeds = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return SoftSpan(chunk.id, chunk.num_tokens, torch.arange(4), 4, embeds)


def kv_span(chunk: Chunk, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> KVSpan:
    both = torch.randn(2, 2, 2, 3, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    # the two halves share one storage, as a compressor may well hand them over
    return KVSpan(chunk.id, chunk.num_tokens, torch.tensor([1, 4, 6]), 8, both[0], both[1])


@dataclass
class Corpus:
    chunks: list[Chunk]
    spans: Sequence[MemorySpan]
    vectors: NDArray[np.float32]

    def add_to(self, index: MemoryIndex, part: slice = slice(None), spec: SpanSpec = SOFT) -> AddReport:
        return index.add(self.chunks[part], self.spans[part], self.vectors[part], spec=spec)

    @property
    def ids(self) -> list[str]:
        return [chunk.id for chunk in self.chunks]


def make_corpus(count: int, seed: int = 0, documents: int = 5) -> Corpus:
    """Chunks dealt out to documents d0, d1, ...; metadata: lang en or de, year 2000 + i % 3, and draft at times."""
    rng = np.random.default_rng(seed)
    chunks = []
    for i in range(count):
        metadata: dict[str, Any] = {"lang": "de" if i % 2 else "en", "year": 2000 + i % 3}
        if i % 4 == 0:
            metadata["draft"] = i % 8 == 0
        start = 100 * (i // documents)
        text = f"chunk {i} of corpus {seed}: it's Ähre, 麦, \U0001f33e"
        chunks.append(Chunk(f"d{i % documents}", text, start, start + len(text), 8, metadata))
    vectors = rng.standard_normal((count, VECTOR_SIZE)).astype(np.float32)
    return Corpus(chunks, [soft_span(c, seed * 1000 + i) for i, c in enumerate(chunks)], vectors)


def cosine(queries: NDArray[Any], vectors: NDArray[Any]) -> NDArray[np.float64]:
    """(q, n) cosine similarities by NumPy in float64: the oracle of every search test."""
    a, b = np.asarray(queries, np.float64), np.asarray(vectors, np.float64)
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


def data_files(path: Path) -> list[Path]:
    """Files that hold rows and spans, oldest first."""
    files = [p for p in (path / "spans.lance" / "data").rglob("*") if p.is_file()]
    return sorted(files, key=lambda p: p.stat().st_mtime_ns)


def flip_byte(file: Path, offset: int, bit: int = 6) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << bit
    file.write_bytes(data)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kb"


@pytest.fixture
def index(path: Path) -> Iterator[MemoryIndex]:
    with MemoryIndex.create(path, SOFT, vector_size=VECTOR_SIZE, retrieval_encoder="minilm", codec="exact") as index:
        yield index


# ---- an object store -------------------------------------------------------------------------------------------

_BUCKETS = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server that the environment names, with credentials for it; what is kept locally goes into `tmp_path`."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3_server.endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CTXCOMP_CACHE", str(tmp_path / "cache"))
    s3_server.forget()
    return s3_server


@pytest.fixture
def bucket(s3: S3Server) -> Any:
    """A new bucket; `s3://<its name>/kb` is nowhere yet."""
    return s3.bucket(f"lake-{next(_BUCKETS)}")


@pytest.fixture
def uri(bucket: Any) -> str:
    return f"s3://{bucket.name}/kb"
