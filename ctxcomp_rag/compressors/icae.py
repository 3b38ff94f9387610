"""ICAE, the in-context autoencoder (Ge et al., ICLR 2024, arXiv 2307.06945; official v2 code, `ICAE._compress`).

The decoder's own weights with LoRA read `[segment][memory tokens]`; the slots are the final-norm hidden states at
the memory tokens. A text longer than one segment is cut into segments of equal length, compressed independently.
Memory table, rows as in the official checkpoint: memory tokens, then [AE], [LM], [FT].
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors.base import (
    CONFIG_NAME,
    Compressor,
    checked_factor,
    deciding,
    layout_of,
    read_config,
    require_same_decoder,
)
from ctxcomp_rag.compressors.nested import coarse_to_fine
from ctxcomp_rag.compressors.places import spread_places
from ctxcomp_rag.errors import InputError, ModelLoadError
from ctxcomp_rag.spans import DecoderFingerprint, PromptLayout, SlotPositions, SoftSpan, SpanSpec

_SPECIAL_ROWS = ("reconstruct", "continue", "after")  # [AE], [LM], [FT]
_MEMORY_FILE = "memory_tokens.safetensors"
_BATCH_TOKENS = 8192

_MODEL_CARD = """\
---
base_model: {model}
library_name: ctxcomp-rag
tags: [icae, context-compression, lora]
---
ICAE compressor for the decoder `{model}`: {compression_factor:g} source tokens per slot, segments of up to
{segment_tokens} tokens, {slot_positions} slot positions. Load it with `ctxcomp_rag.load_compressor(folder, backbone)`.
"""


@dataclass(frozen=True)
class ICAEConfig:
    """Settings of an ICAE compressor; the defaults are those of the official v2 code.

    Attributes:
        num_memory_tokens: rows of the memory table that stand for slots (`mem_size` of the official code).
        segment_tokens: longest segment (`mem_size * mean_compression_rate` of the official code).
        compression_factor: source tokens per slot.
        slots: "fixed" gives every segment `num_memory_tokens` slots, however short it is (official);
            "proportional" gives ceil(length / factor), repeating the memory tokens as needed, any factor >= 1.
        slot_positions: "consecutive" numbers the slots on after the text (official); "spread" puts each slot
            on the last token of the piece of text it stands for, in the encoder and in the decoder.
        delimiters: the special rows that the decoder's prompt may use, of "reconstruct", "continue", "after".
        layout: the prompt it was trained with; None for the decoder's chat template. Its `context_ids` are read before
            every text that `compress` is given (not before the ids of a training sample).
        nested: the factors at which a span can be read, ascending from `compression_factor`: its slots are made from
            coarse to fine (see `ctxcomp_rag.compressors.nested`), a text in one segment. None for spans that are read
            whole.
    """

    num_memory_tokens: int = 128
    segment_tokens: int = 512
    compression_factor: float = 4.0
    slots: Literal["fixed", "proportional"] = "fixed"
    slot_positions: SlotPositions = "consecutive"
    delimiters: tuple[str, ...] = _SPECIAL_ROWS
    lora_rank: int = 128
    lora_alpha: float = 32
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    layout: PromptLayout | None = None
    nested: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.slots == "fixed" and self.slot_positions == "spread":
            raise InputError("slots='fixed' goes with slot_positions='consecutive': a segment may be shorter than its "
                             "slots; use slots='proportional' to spread them")
        if self.nested is None:
            return
        if self.slots == "fixed" or self.slot_positions == "consecutive":
            raise InputError("nested spans need slots='proportional' and slot_positions='spread': their first slots "
                             "have to cover the whole text")
        if self.nested[:1] != (self.compression_factor,) or list(self.nested) != sorted(set(self.nested)):
            raise InputError(f"expected nested factors that ascend from the compression factor "
                             f"{self.compression_factor:g}, got {self.nested}")

    @property
    def context_ids(self) -> tuple[int, ...]:
        """Ids that `compress` reads before every text."""
        return self.layout.context_ids if self.layout else ()

    def segment_lengths(self, num_tokens: int) -> list[int]:
        """Lengths of the equal segments that a text is cut into (the last may be shorter)."""
        if self.nested and num_tokens > self.segment_tokens:
            raise InputError(f"a nested compressor reads a text in one segment of at most {self.segment_tokens} "
                             f"tokens, got {num_tokens}; cut it into chunks")
        length = math.ceil(num_tokens / math.ceil(num_tokens / self.segment_tokens))
        return [min(length, num_tokens - begin) for begin in range(0, num_tokens, length)]

    def num_slots(self, segment_length: int, factor: float) -> int:
        return self.num_memory_tokens if self.slots == "fixed" else math.ceil(segment_length / factor)

    def slot_places(self, segment_length: int, num_slots: int) -> list[int]:
        """Positions of a segment's slots in the order in which the encoder reads them, from the segment's first token
        (spread) or first slot (consecutive)."""
        if self.slot_positions == "consecutive":
            return list(range(num_slots))
        pieces = math.ceil(segment_length / self.compression_factor) if self.nested else num_slots
        places = spread_places(segment_length, pieces)
        return [places[j] for j in coarse_to_fine(pieces)[:num_slots]] if self.nested else places


def _named(factors: Sequence[float]) -> str:
    return ", ".join(f"{f:g}x" for f in factors)


@dataclass
class _Segment:
    ids: list[int]
    num_slots: int
    places: list[int] = field(default_factory=list)


class ICAECompressor(Compressor, nn.Module):
    """ICAE over a frozen backbone: only the LoRA matrices and the memory table can be trained.

    Args:
        backbone: the decoder; its weights are shared, never changed.
        config: see ICAEConfig.
        encoder: a PEFT model over `backbone.second_tree()`; a new one with zero effect by default.
    """

    name: ClassVar[str] = "icae"

    def __init__(self, backbone: Backbone, config: ICAEConfig | None = None, *, encoder: PeftModel | None = None,
                 memory_tokens: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.backbone = backbone
        self.config = config or ICAEConfig()
        if encoder is None:
            lora = LoraConfig(r=self.config.lora_rank, lora_alpha=self.config.lora_alpha,  # type: ignore[arg-type]
                              target_modules=list(self.config.lora_targets), bias="none", task_type="CAUSAL_LM")
            encoder = get_peft_model(backbone.second_tree(), lora)
        assert encoder is not None
        self.encoder = encoder.eval()
        rows = self.config.num_memory_tokens + len(_SPECIAL_ROWS)
        if memory_tokens is None:
            vocab_size = int(backbone.config.vocab_size)
            some = backbone.embed(torch.arange(0, vocab_size, max(1, vocab_size // 4096)))  # scaled, as rows enter
            memory_tokens = torch.randn(rows, backbone.hidden_size) * some.float().std().cpu()
        if tuple(memory_tokens.shape) != (rows, backbone.hidden_size):
            raise ModelLoadError(f"expected a memory table of shape {(rows, backbone.hidden_size)} "
                                 f"({self.config.num_memory_tokens} memory tokens, [AE], [LM], [FT]; hidden size of "
                                 f"the decoder), got {tuple(memory_tokens.shape)}")
        self.memory_tokens = nn.Parameter(memory_tokens.to(backbone.device, torch.float32))
        self._spec: tuple[tuple[int, ...], SpanSpec] | None = None

    # -- what the layers around ask ------------------------------------------------------------------------------

    @property
    def spec(self) -> SpanSpec:
        # Hashing the weights takes seconds for a large model, so it is done once for each state of training.
        state = tuple(p._version for n, p in self.encoder.named_parameters() if ".lora_" in n)
        state += (self.memory_tokens._version,)
        if self._spec is None or self._spec[0] != state:
            self._spec = (state, self._make_spec())
        return self._spec[1]

    def _make_spec(self) -> SpanSpec:
        rows = self.memory_tokens[self.config.num_memory_tokens :].detach().to(self.backbone.dtype)
        delimiters = {n: rows[i : i + 1].clone() for i, n in enumerate(_SPECIAL_ROWS) if n in self.config.delimiters}
        return SpanSpec("soft", self.backbone.fingerprint, f"{self.name}-{self.digest()[:16]}",
                        self.config.slot_positions, delimiters, self.config.layout, self.config.nested or ())

    @property
    def max_chunk_tokens(self) -> int:
        return self.config.segment_tokens - len(self.config.context_ids)

    @property
    def compression_factor(self) -> float:
        return self.config.compression_factor

    def digest(self) -> str:
        """sha256 over settings and trained weights."""
        digest = hashlib.sha256(json.dumps(deciding(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self._trained().items()):
            digest.update(name.encode() + tensor.detach().cpu().to(torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _trained(self) -> dict[str, Tensor]:
        adapter: dict[str, Tensor] = get_peft_model_state_dict(self.encoder, save_embedding_layers=False)
        return {**adapter, "memory_tokens": self.memory_tokens}

    # -- compression -----------------------------------------------------------------------------------------------

    def compress(self, chunks: Sequence[Chunk], *, compression_factor: float | None = None) -> list[SoftSpan]:  # type: ignore[override]
        texts = [self.backbone.tokenizer.encode(chunk.text) for chunk in chunks]
        for chunk, ids in zip(chunks, texts, strict=True):
            if not ids:
                raise InputError(f"chunk {chunk.id} of document {chunk.document_id!r} has no text to compress")
        before = self.config.context_ids
        with torch.inference_mode():
            slots = self.encode([[*before, *ids] for ids in texts], compression_factor=compression_factor)
        spans = []
        for chunk, ids, rows in zip(chunks, texts, slots, strict=True):
            places, length = self.span_positions(len(before) + len(ids), compression_factor)
            order = None
            if self.config.nested:
                order = torch.tensor(self.config.slot_places(length, len(places))).argsort().argsort()
            spans.append(SoftSpan(chunk.id, len(ids), torch.tensor(places), length, rows.clone(), order))
        return spans

    def span_positions(self, num_tokens: int, compression_factor: float | None = None) -> tuple[list[int], int]:
        """(positions of all slots from the span's start, positions the whole span occupies)."""
        factor = self._factor(compression_factor)
        places: list[int] = []
        base = 0
        for length in self.config.segment_lengths(num_tokens):
            count = self.config.num_slots(length, factor)
            places += [base + p for p in sorted(self.config.slot_places(length, count))]
            base += length if self.config.slot_positions == "spread" else count
        return places, base

    def encode(self, texts: Sequence[Sequence[int]], *, compression_factor: float | None = None,
               batch_tokens: int = _BATCH_TOKENS) -> list[Tensor]:
        """Slots (num_slots, hidden_size) of each text of token ids, in text order; differentiable, length-bucketed,
        masked padding."""
        factor = self._factor(compression_factor)
        segments: list[_Segment] = []
        owners: list[int] = []
        for owner, ids in enumerate(texts):
            begin = 0
            for length in self.config.segment_lengths(len(ids)):
                count = self.config.num_slots(length, factor)
                places = self.config.slot_places(length, count)
                segments.append(_Segment(list(ids[begin : begin + length]), count, places))
                owners.append(owner)
                begin += length
        encoded: dict[int, Tensor] = {}
        batch: list[int] = []
        for index in sorted(range(len(segments)), key=lambda i: len(segments[i].ids) + segments[i].num_slots):
            width = len(segments[index].ids) + segments[index].num_slots
            if batch and (len(batch) + 1) * width > batch_tokens:
                encoded.update(zip(batch, self._encode_batch([segments[i] for i in batch]), strict=True))
                batch = []
            batch.append(index)
        if batch:
            encoded.update(zip(batch, self._encode_batch([segments[i] for i in batch]), strict=True))
        by_text: list[list[Tensor]] = [[] for _ in texts]
        for index, owner in enumerate(owners):
            by_text[owner].append(encoded[index])
        return [torch.cat(parts) for parts in by_text]

    def _encode_batch(self, batch: list[_Segment]) -> list[Tensor]:
        width = max(len(s.ids) + s.num_slots for s in batch)
        memory = self.memory_tokens[: self.config.num_memory_tokens].to(self.backbone.dtype)
        rows, masks, positions = [], [], []
        for s in batch:
            length, pad = len(s.ids), width - len(s.ids) - s.num_slots
            cycle = torch.arange(s.num_slots, device=memory.device) % self.config.num_memory_tokens
            embedded = self.backbone.embed(torch.tensor(s.ids))
            rows.append(torch.cat([embedded, memory[cycle], embedded.new_zeros(pad, embedded.shape[1])]))
            masks.append([1] * (width - pad) + [0] * pad)
            start = 0 if self.config.slot_positions == "spread" else length
            positions.append([*range(length), *(start + p for p in s.places), *[0] * pad])
        device = self.backbone.device
        # the mask is always passed: without one, positions that repeat are taken for packed sequences
        encoder: Any = self.encoder.get_base_model()
        hidden = encoder.get_decoder()(
            inputs_embeds=torch.stack(rows), attention_mask=torch.tensor(masks, device=device),
            position_ids=torch.tensor(positions, device=device), use_cache=False,
        ).last_hidden_state
        slots = [hidden[i, len(s.ids) : len(s.ids) + s.num_slots] for i, s in enumerate(batch)]
        if self.config.nested:
            return [rows[torch.tensor(s.places).argsort()] for rows, s in zip(slots, batch, strict=True)]
        return slots

    def _factor(self, compression_factor: float | None) -> float:
        if compression_factor is None or compression_factor == self.config.compression_factor:
            return self.config.compression_factor
        if self.config.slots == "fixed":
            raise InputError(f"this compressor makes {self.config.num_memory_tokens} slots of every segment "
                             f"({self.config.compression_factor:g}x); it cannot make {compression_factor:g}x")
        if self.config.nested and compression_factor not in self.config.nested:
            raise InputError(f"this compressor is nested and was trained for {_named(self.config.nested)}; it cannot "
                             f"make {compression_factor:g}x")
        return checked_factor(compression_factor)

    def num_slots(self, num_tokens: int, compression_factor: float | None = None) -> int:
        return len(self.span_positions(num_tokens + len(self.config.context_ids), compression_factor)[0])

    # -- saving ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """A PEFT folder (`adapter_config.json`, `adapter_model.safetensors`) with the memory table beside it."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for adapter in self.encoder.peft_config.values():
            adapter.base_model_name_or_path = self.backbone.model_id  # not the folder it was loaded from
        # embeddings are never trained; by default PEFT asks the network whether they were
        self.encoder.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").write_text(_MODEL_CARD.format(model=self.backbone.model_id, **asdict(self.config)),
                                          encoding="utf-8")
        save_file({"memory_tokens": self.memory_tokens.detach().cpu().contiguous()}, folder / _MEMORY_FILE)
        settings = {"method": self.name, **asdict(self.config), "decoder": asdict(self.backbone.fingerprint)}
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path: str | Path, backbone: Backbone) -> Self:
        folder = Path(path)
        settings = read_config(folder)
        try:
            trained_for = DecoderFingerprint(**settings.pop("decoder"))
            settings.pop("method")
            for key in ("delimiters", "lora_targets"):
                settings[key] = tuple(settings[key])
            nested = tuple(settings.pop("nested", None) or ()) or None
            config = ICAEConfig(**{**settings, "layout": layout_of(settings)}, nested=nested)
        except (KeyError, TypeError, InputError) as error:
            raise ModelLoadError(f"the settings of the compressor in {str(folder)!r} are not those of {cls.name}: "
                                 f"{error}") from error
        require_same_decoder(folder, trained_for, backbone.fingerprint)
        if trained_for.dtype != backbone.fingerprint.dtype:
            warnings.warn(f"the compressor in {str(folder)!r} was trained for the decoder in {trained_for.dtype}, this "
                          f"one is loaded in {backbone.fingerprint.dtype}; whether the weights are the same cannot be "
                          "checked", stacklevel=2)
        try:
            encoder = PeftModel.from_pretrained(backbone.second_tree(), str(folder), is_trainable=True)
            memory = load_file(folder / _MEMORY_FILE)["memory_tokens"]
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelLoadError(f"the compressor in {str(folder)!r} cannot be loaded: {error}") from error
        return cls(backbone, config, encoder=encoder, memory_tokens=memory)
