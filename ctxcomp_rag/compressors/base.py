"""What every compressor is: `compress(chunks) -> spans`, a specification, and a folder it can be saved to."""

from __future__ import annotations

import json
import math
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from ctxcomp_rag.backbone import EMBEDDED_MODEL, Backbone, embedded_path
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.errors import IncompatibleSpanError, InputError, ModelLoadError
from ctxcomp_rag.spans import DecoderFingerprint, MemorySpan, PromptLayout, SpanSpec

CONFIG_NAME = "ctxcomp_config.json"


_BUDGET = re.compile(r"(\d+)\s*slots?|(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB)|(\d+(?:\.\d+)?)\s*x", re.ASCII)
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Budget:
    """How large the span of a chunk may be, in one of three ways.

    Attributes:
        slots: at most so many slots, however long the chunk.
        bytes: at most so many bytes of keys and values, however long the chunk.
        factor: source tokens per slot.
    """

    slots: int | None = None
    bytes: int | None = None
    factor: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "256slots", "64KiB" (B, KiB, MiB, GiB) or "4x"; raises InputError for anything else."""
        found = _BUDGET.fullmatch(text.strip())
        if found is None:
            raise InputError(f"expected a budget such as '256slots', '64KiB' or '4x', got {text!r}")
        slots, size, unit, factor = found.groups()
        if slots:
            return cls(slots=int(slots))
        return cls(factor=checked_factor(float(factor))) if factor else cls(bytes=int(float(size) * _UNITS[unit]))


class Compressor(ABC):
    """Turns chunks into memory spans. It sees no question, so it can run offline.

    A new method is one file: subclass, give it a `name`, and add a line to the registry in `compressors/__init__.py`.
    """

    name: ClassVar[str]
    backbone: Backbone

    @property
    @abstractmethod
    def spec(self) -> SpanSpec:
        """Who may read the spans, and how they are laid out."""

    @property
    @abstractmethod
    def max_chunk_tokens(self) -> int:
        """Chunk length (decoder tokens) that this compressor was made for; longer texts are cut into segments."""

    @property
    @abstractmethod
    def compression_factor(self) -> float:
        """Source tokens per slot unless `compress` is told otherwise."""

    @abstractmethod
    def compress(self, chunks: Sequence[Chunk], *, compression_factor: float | None = None) -> list[MemorySpan]:
        """One span for each chunk, in order. Raises InputError for a factor that the compressor cannot make."""

    def num_slots(self, num_tokens: int, compression_factor: float | None = None) -> int:
        """Slots of the span of a text of so many tokens; raises InputError as `compress` would."""
        factor = self.compression_factor if compression_factor is None else checked_factor(compression_factor)
        return math.ceil(num_tokens / factor)

    def chunk_limit(self, max_chunk_tokens: int | None = None) -> int:
        """Longest chunk in tokens; raises InputError for a limit that the compressor was not made for."""
        longest = self.max_chunk_tokens
        if max_chunk_tokens is not None and not 1 <= max_chunk_tokens <= longest:
            raise InputError(f"expected chunks of 1 to {longest} tokens for this compressor, got {max_chunk_tokens}")
        return max_chunk_tokens or longest

    def chunk_slots(self, chunk: Chunk, compression_factor: float | None = None) -> int:
        """Slots of the span that `compress` makes of a chunk; exact also where the decoder does not cut the text."""
        return self.num_slots(len(self.backbone.tokenizer.encode(chunk.text)), compression_factor)

    # -- one encoder, many decoders: only a method whose encoder stands outside the decoder overrides these ----------

    @property
    def latent(self) -> Compressor:
        """This compressor stopped before anything that belongs to a decoder; raises InputError where that is nothing.

        Its spans are latent: one index of them serves every decoder that has a converter for the encoder.
        """
        raise InputError(f"the method {self.name!r} makes spans for one decoder only: it has no encoder of its own "
                         "whose memory could be kept; use a pcc compressor")

    def writer(self, stored: SpanSpec) -> Compressor:
        """The view of this compressor that makes spans of the kind in `stored`."""
        return self if stored.reader else self.latent

    def reading(self, stored: SpanSpec) -> SpanSpec:
        """The specification of what `read` makes of stored spans.

        Raises:
            IncompatibleSpanError: they were made for another decoder, or by another encoder.
        """
        stored.require_decoder(self.backbone.fingerprint)
        return stored

    def read(self, span: MemorySpan, chunk: Chunk) -> MemorySpan:
        """A stored span of a chunk as this decoder takes it: unchanged, unless it is latent."""
        return span

    @abstractmethod
    def save_pretrained(self, path: str | Path) -> None:
        """Write weights and settings to a folder that `from_pretrained` reads."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, path: str | Path, backbone: Backbone) -> Self:
        """Load from a folder; raises IncompatibleSpanError if it was trained for another decoder."""

    @classmethod
    def reader_from_pretrained(cls, path: str | Path, backbone: Backbone) -> Compressor:
        """What it takes of a saved compressor to `read` stored spans: all of it, unless its method needs less."""
        return cls.from_pretrained(path, backbone)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of its spans, as `compress` makes them."""
        return self.backbone.hidden_size * self.backbone.dtype.itemsize

    @classmethod
    def ready_for(cls, backbone: Backbone, budget: Budget | None = None) -> Self:
        """The compressor to use where only the method is named: the trained one that comes with the embedded model.

        A method that needs no training overrides this: it works for any decoder, and for a size that is wished for.
        """
        return cls.shipped(cls.name, backbone, budget)

    @classmethod
    def shipped(cls, name: str, backbone: Backbone, budget: Budget | None = None) -> Self:
        """The trained compressor of this name that comes with the embedded model."""
        if budget is not None:
            raise InputError(f"{name} spans have the size that the compressor was trained for; a budget is for "
                             "methods that need no training. Use --factor")
        if backbone.model_id != EMBEDDED_MODEL:
            raise InputError(f"there is no trained {name} compressor for {backbone.model_id!r} in this package; "
                             f"train one and pass its folder, or use --model {EMBEDDED_MODEL}")
        return cls.from_pretrained(embedded_path(name), backbone)

    def push_to_hub(self, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
        """Upload the saved folder to the Hugging Face hub; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision))


def possible_factors(compressor: Compressor, wanted: Sequence[float] = (4, 8, 16)) -> list[float]:
    """Those of the factors that the compressor can make; its own where it can make none of them."""
    possible = []
    for factor in wanted:
        try:
            compressor.num_slots(compressor.max_chunk_tokens, factor)
        except InputError:
            continue
        possible.append(factor)
    return possible or [compressor.compression_factor]


def checked_factor(compression_factor: float) -> float:
    """The factor, if it is one; raises InputError otherwise."""
    if not 1 <= compression_factor < math.inf:
        raise InputError(f"expected a compression factor of at least 1, got {compression_factor:g}")
    return compression_factor


def deciding(config: Any) -> dict[str, Any]:
    """Settings as JSON takes them; one that is None decides nothing, so it leaves no trace in a digest."""
    return {key: value for key, value in asdict(config).items() if value is not None}


def layout_of(settings: dict[str, Any]) -> PromptLayout | None:
    """The prompt layout in saved settings, if there is one."""
    return PromptLayout.from_dict(settings["layout"]) if settings.get("layout") else None


def require_same_decoder(path: Path, trained_for: DecoderFingerprint, decoder: DecoderFingerprint) -> None:
    """Raises IncompatibleSpanError unless the compressor saved in `path` was trained for this decoder."""
    different = decoder_differences(trained_for, decoder)
    if different:
        raise IncompatibleSpanError(
            f"the compressor in {str(path)!r} was trained for the decoder {trained_for}, but this decoder is "
            f"{decoder}; they differ in {', '.join(different)}"
        )


def decoder_differences(saved_for: DecoderFingerprint, decoder: DecoderFingerprint) -> list[str]:
    """Fields in which the decoder of a saved compressor and this one differ, as far as that can be told.

    The same weights in another precision have another digest, so across dtypes neither is compared.
    """
    skip = {"dtype", "weights_digest"} if saved_for.dtype != decoder.dtype else set()
    return [name for name in saved_for.differences(decoder) if name not in skip]


def read_config(path: Path) -> dict[str, Any]:
    """The settings file of a saved compressor; raises ModelLoadError where there is none."""
    file = path / CONFIG_NAME
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{str(path)!r} is not a saved compressor: it has no {CONFIG_NAME}") from error
    except json.JSONDecodeError as error:
        raise ModelLoadError(f"{str(file)!r} is not valid JSON ({error}); save the compressor again") from error
    return config
