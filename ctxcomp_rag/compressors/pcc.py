"""PCC, the pretraining context compressor (Dai et al., ACL 2025, long paper 1394).

An encoder outside the decoder reads `[segment][memory tokens]`; its last hidden states at the memory tokens go
through a converter, RMSNorm -> Linear -> GELU -> Linear, into the embedding space of the decoder. One encoder serves
many decoders: only the converter knows the decoder's hidden size.

In the prompt every segment stands in its own `<mem> slots </mem>` bracket. A specification encloses a whole span, not
its segments, so the outermost brackets are the specification's "before" and "after" and the inner ones are rows of
the span itself:

    before        span.embeds                                    after
    <mem>         s1 ... sk </mem> <mem> s1 ... sk               </mem>

Rows and positions of the decoder are then counted truthfully by `num_slots`, and index and decoder need to know
nothing of brackets.

`PCCCompressor.latent` stops before the converter: latent spans (segments * slots per segment, encoder size) without
brackets, the same for every decoder. `PCCCompressor.read` makes of one exactly the span that `compress` would.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ctxcomp_rag.backbone import EMBEDDED_MODEL, Backbone, embedded_path, weights_digest
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors.base import CONFIG_NAME, Compressor
from ctxcomp_rag.compressors.converting import (
    BRACKETS,
    CONVERTER_FILE,
    Converter,
    Converting,
    PCCConfig,
    PCCReader,
    Segment,
    load_converter,
    read_settings,
)
from ctxcomp_rag.errors import InputError, ModelLoadError
from ctxcomp_rag.spans import DecoderFingerprint, LatentSpan, MemorySpan, SoftSpan, SpanSpec
from ctxcomp_rag.tokenization import TextTokenizer

LARGE_TARGETS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
NUM_MEMORY_TOKENS = 64
"""Memory tokens that the encoder's vocabulary gains; the first `slots_per_segment` of them are used."""

_ENCODER_FOLDER = "encoder"
_MODEL_CARD = """\
---
base_model: {model}
library_name: ctxcomp-rag
tags: [pcc, context-compression]
---
PCC compressor for the decoder `{model}`, encoder {encoder}: {slots} slots for a segment of {tokens} tokens
({factor:g}x), {positions} slot positions. Load it with `ctxcomp_rag.load_compressor(folder, backbone)`.
"""
_BATCH_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder with its tokenizer.

    Attributes:
        model: a Hugging Face encoder or decoder, or a PEFT model over one.
        memory_ids: ids of the memory tokens in its vocabulary.
        padding_id: what an "attended" padding consists of.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: TextTokenizer
    memory_ids: tuple[int, ...]
    padding_id: int
    _digests: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def body(self) -> Any:
        """The model without its head: what gives hidden states."""
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return model.base_model

    @property
    def hidden_size(self) -> int:
        return int(self.body.config.hidden_size)

    @property
    def weights_digest(self) -> str:
        """sha256 over the weights; hashed once for each state of training, which takes seconds for a large encoder."""
        state = tuple(p._version for p in self.model.parameters())
        if self._digests.get("state") != state:
            model: Any = self.model
            self._digests.update(state=state, digest=weights_digest(model))
        return str(self._digests["digest"])


def load_encoder(path: str | Path, *, adapter: str | Path | None = None, tokenizer: str | Path | None = None,
                 large: bool = False, lora_rank: int = 64, lora_alpha: int = 32, lora_dropout: float = 0.1,
                 **hub: Any) -> Encoder:
    """Load any encoder or decoder as an encoder for PCC; memory tokens are added where it has none.

    Args:
        path: folder or hub id of the model; "embedded" is the decoder that comes with the package.
        adapter: PEFT folder over it.
        tokenizer: folder of the tokenizer [default: the adapter's, else the model's].
        large: without an adapter, start a new one on all linear layers, the embeddings and the head.
    """
    if str(path) == EMBEDDED_MODEL:
        path = embedded_path()
    try:
        config = AutoConfig.from_pretrained(path, **hub)
        causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) & set(config.architectures or ())
        kind: Any = AutoModelForCausalLM if causal else AutoModel
        model: Any = kind.from_pretrained(path, dtype=torch.float32, **hub)
        hf = AutoTokenizer.from_pretrained(tokenizer or adapter or path, **hub)
        first = hf.convert_tokens_to_ids("<mem_0>")
        if first is None or first == hf.unk_token_id:
            hf.add_special_tokens({"additional_special_tokens": [f"<mem_{i}>" for i in range(NUM_MEMORY_TOKENS)]})
        # never shrunk: published vocabularies are often padded beyond their tokenizer
        if len(hf) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(hf), mean_resizing=adapter is None)
        with warnings.catch_warnings():
            # the head, tied or not, gives no slots
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            if adapter is not None:
                model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
            elif large:
                lora: Any = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
                                       bias="none", target_modules=list(LARGE_TARGETS), task_type="CAUSAL_LM")
                model = get_peft_model(model, lora)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(f"the encoder in {str(adapter or path)!r} cannot be loaded: {error}") from error
    memory_ids = tuple(int(hf.convert_tokens_to_ids(f"<mem_{i}>")) for i in range(NUM_MEMORY_TOKENS))  # type: ignore[arg-type]
    padding = next(i for i in (hf.pad_token_id, hf.unk_token_id, hf.eos_token_id, 0) if i is not None)
    return Encoder(model.eval(), TextTokenizer(hf), memory_ids, int(padding))


class PCCCompressor(Converting, nn.Module):
    """An encoder and a converter for one frozen decoder.

    Args:
        backbone: the decoder; never changed.
        encoder: see `load_encoder`; trained whole, or its LoRA matrices only.
        special_rows: (3, hidden_size) embeddings of <mem>, <ae>, </mem>; random, to be trained, by default.
    """

    name: ClassVar[str] = "pcc"

    def __init__(self, backbone: Backbone, encoder: Encoder, config: PCCConfig | None = None, *,
                 converter: Converter | None = None, special_rows: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.backbone, self.encoder, self.config = backbone, encoder, config or PCCConfig()
        used, known = self.config.slots_per_segment, len(encoder.memory_ids)
        if not 1 <= used <= known:
            raise InputError(f"expected 1 to {known} slots per segment, as many as the encoder has memory tokens; "
                             f"got {used}")
        room = int(getattr(encoder.body.config, "max_position_embeddings", None) or 2**31)
        if self.config.segment_tokens + used > room:
            raise InputError(f"segments of {self.config.segment_tokens} tokens with {used} memory tokens do not fit "
                             f"the {room} positions of the encoder; use shorter segments")
        if self.config.padding == "attended" and self.config.slot_positions == "spread":
            raise InputError("padding='attended' goes with slot_positions='consecutive': padding would move the slots "
                             "of a text by its neighbours; use padding='masked' to spread them")
        self.encoder_model = encoder.model.to(backbone.device)  # type: ignore[arg-type]
        self.converter = (converter or Converter(encoder.hidden_size, backbone.hidden_size)).to(backbone.device)
        if special_rows is None:
            table = backbone.embed(torch.arange(min(4096, int(backbone.config.vocab_size))))
            special_rows = torch.randn(len(BRACKETS), backbone.hidden_size) * table.float().std().cpu()
        expected = (len(BRACKETS), backbone.hidden_size)
        if tuple(special_rows.shape) != expected:
            raise ModelLoadError(f"expected rows of shape {expected} for <mem>, <ae>, </mem> (hidden size of the "
                                 f"decoder), got {tuple(special_rows.shape)}")
        self.special_rows = nn.Parameter(special_rows.to(backbone.device, torch.float32))
        self._spec: tuple[tuple[int, ...], SpanSpec] | None = None

    # -- what the layers around ask ------------------------------------------------------------------------------

    @property
    def spec(self) -> SpanSpec:
        # hashing the weights takes seconds for a large encoder, so it is done once for each state of training
        state = tuple(p._version for p in self.parameters())
        if self._spec is None or self._spec[0] != state:
            self._spec = (state, self.soft_spec())
        return self._spec[1]

    def chunk_slots(self, chunk: Chunk, compression_factor: float | None = None) -> int:
        return self.num_slots(len(self.encoder.tokenizer.encode(chunk.text)), compression_factor)

    # -- compression -----------------------------------------------------------------------------------------------

    def compress(self, chunks: Sequence[Chunk], *, compression_factor: float | None = None) -> list[SoftSpan]:  # type: ignore[override]
        spans = self.remember(chunks, compression_factor)
        return [self.convert_span(span, chunk) for span, chunk in zip(spans, chunks, strict=True)]

    def remember(self, chunks: Sequence[Chunk], compression_factor: float | None = None) -> list[LatentSpan]:
        """The encoder's memory of each chunk: what `read` converts, for this decoder or another."""
        factor = self.factor(compression_factor)
        texts = [self.encoder.tokenizer.encode(chunk.text) for chunk in chunks]
        for chunk, ids in zip(chunks, texts, strict=True):
            if not ids:
                raise InputError(f"chunk {chunk.id} of document {chunk.document_id!r} has no text to compress")
        with torch.inference_mode():
            # without padding to read, whatever the setting: a span must not depend on its neighbours
            memory = self._hidden([[*self.config.context_ids, *ids] for ids in texts], [factor] * len(texts))
        spans = []
        for chunk, ids, rows in zip(chunks, texts, memory, strict=True):
            places, base = [], 0
            for segment in self.config.segments(len(self.config.context_ids) + len(ids), factor):
                places += [base + p for p in segment.places]
                base += segment.num_positions
            spans.append(LatentSpan(chunk.id, len(ids), torch.tensor(places), base, rows.clone()))
        return spans

    @property
    def memory_spec(self) -> SpanSpec:
        encoder, config = self.encoder, self.config
        made_by = DecoderFingerprint(
            model_id=config.encoder, revision="", weights_digest=encoder.weights_digest,
            tokenizer_digest=encoder.tokenizer.digest, hidden_size=encoder.hidden_size, num_layers=0, num_kv_heads=0,
            head_dim=0, rope="", dtype=str(encoder.body.dtype).removeprefix("torch."),
        )
        # padding is no part: `compress` gives the encoder none to read
        spread = ["spread"] if config.slot_positions == "spread" else []
        deciding = [config.segment_tokens, config.slots_per_segment, *spread, made_by.weights_digest,
                    made_by.tokenizer_digest, *config.context_ids]
        digest = hashlib.sha256(json.dumps(deciding).encode()).hexdigest()
        return SpanSpec("latent", made_by, f"{self.name}-encoder-{digest[:16]}", config.slot_positions)

    @property
    def latent(self) -> PCCLatent:
        return PCCLatent(self)

    def encode(self, texts: Sequence[Sequence[int]], factors: Sequence[float | None] | None = None) -> list[Tensor]:
        """Slots (num_slots, hidden_size), without brackets, of each text of encoder ids, at its factor; differentiable.
        """
        return [self.convert(hidden) for hidden in self.memory(texts, factors)]

    def memory(self, texts: Sequence[Sequence[int]], factors: Sequence[float | None] | None = None) -> list[Tensor]:
        """The encoder's hidden states (num_slots, encoder size) at the memory tokens: what any converter reads."""
        return self._hidden(self.padded(texts), [self.factor(f) for f in factors or [None] * len(texts)])

    def padded(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        """What the encoder reads of texts that are given together: with "attended" padding, all of one length."""
        width = max(map(len, texts), default=0) if self.config.padding == "attended" else 0
        return [[*ids, *[self.encoder.padding_id] * (width - len(ids))] for ids in texts]

    def _hidden(self, texts: Sequence[Sequence[int]], factors: Sequence[float]) -> list[Tensor]:
        segments: list[tuple[list[int], Segment]] = []
        owners: list[int] = []
        for owner, (ids, factor) in enumerate(zip(texts, factors, strict=True)):
            begin = 0
            for segment in self.config.segments(len(ids), factor):
                segments.append((list(ids[begin : begin + segment.num_tokens]), segment))
                owners.append(owner)
                begin += segment.num_tokens
        widths = [len(ids) + len(segment.places) for ids, segment in segments]
        encoded: dict[int, Tensor] = {}
        batch: list[int] = []
        for index in sorted(range(len(segments)), key=widths.__getitem__):
            if batch and (len(batch) + 1) * widths[index] > _BATCH_TOKENS:
                encoded.update(zip(batch, self._encode_batch([segments[i] for i in batch]), strict=True))
                batch = []
            batch.append(index)
        if batch:
            encoded.update(zip(batch, self._encode_batch([segments[i] for i in batch]), strict=True))
        by_text: list[list[Tensor]] = [[] for _ in texts]
        for index, owner in enumerate(owners):
            by_text[owner].append(encoded[index])
        return [torch.cat(parts) for parts in by_text]

    def _encode_batch(self, batch: list[tuple[list[int], Segment]]) -> list[Tensor]:
        known, used = self.encoder.memory_ids, self.config.slots_per_segment
        memory = [[known[j % used] for j in range(len(segment.places))] for _, segment in batch]
        lengths = [len(ids) + len(tokens) for (ids, _), tokens in zip(batch, memory, strict=True)]
        width, device = max(lengths), self.special_rows.device
        rows = torch.tensor([[*ids, *tokens, *[self.encoder.padding_id] * (width - n)]
                             for (ids, _), tokens, n in zip(batch, memory, lengths, strict=True)], device=device)
        mask = (torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]).long()
        positions = {}
        if self.config.slot_positions == "spread":  # else an encoder's own numbering, which may be none
            numbered = [[*range(len(ids)), *segment.places, *[0] * (width - n)]
                        for (ids, segment), n in zip(batch, lengths, strict=True)]
            positions["position_ids"] = torch.tensor(numbered, device=device)
        hidden = self.encoder.body(input_ids=rows, attention_mask=mask, **positions).last_hidden_state
        return [hidden[i, len(ids) : n] for i, ((ids, _), n) in enumerate(zip(batch, lengths, strict=True))]

    # -- saving ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """The encoder's own folder (a PEFT folder with LoRA), the converter and the settings beside it."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.encoder.model
        for adapter in model.peft_config.values() if isinstance(model, PeftModel) else ():
            adapter.base_model_name_or_path = self.config.encoder  # not the folder it was loaded from
        model.save_pretrained(str(folder / _ENCODER_FOLDER))
        (folder / _ENCODER_FOLDER / "README.md").unlink(missing_ok=True)  # PEFT's empty form; the card is ours
        (folder / "README.md").write_text(_MODEL_CARD.format(
            model=self.backbone.model_id, encoder=self.config.encoder or "in `encoder/`",
            factor=self.compression_factor, tokens=self.config.segment_tokens, slots=self.config.slots_per_segment,
            positions=self.config.slot_positions), encoding="utf-8")
        self.encoder.tokenizer.hf.save_pretrained(folder / _ENCODER_FOLDER)
        tensors = {**self.converter.state_dict(), "special_rows": self.special_rows}
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / CONVERTER_FILE)
        settings = {"method": self.name, **asdict(self.config), "decoder": asdict(self.backbone.fingerprint),
                    "memory": self.memory_spec.to_dict()}
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path: str | Path, backbone: Backbone) -> Self:
        folder = Path(path)
        config, _ = read_settings(folder, backbone)
        saved = folder / _ENCODER_FOLDER
        adapted = (saved / "adapter_config.json").exists()
        encoder = load_encoder(config.encoder if adapted else saved, adapter=saved if adapted else None)
        converter, special_rows = load_converter(folder, encoder.hidden_size, backbone.hidden_size)
        return cls(backbone, encoder, config, converter=converter, special_rows=special_rows)

    @classmethod
    def reader_from_pretrained(cls, path: str | Path, backbone: Backbone) -> PCCReader:
        """Converter and special rows only: the encoder is not loaded."""
        return PCCReader.from_pretrained(path, backbone)


class PCCLatent(Compressor):
    """A PCC compressor stopped before its converter. Its spans are the encoder's memory, the same for every decoder.

    Decoder and converter of `pcc` take no part in what it makes or in its specification; they only read.
    """

    name: ClassVar[str] = PCCCompressor.name

    def __init__(self, pcc: PCCCompressor) -> None:
        self.pcc, self.backbone = pcc, pcc.backbone

    @property
    def spec(self) -> SpanSpec:
        return self.pcc.memory_spec

    @property
    def max_chunk_tokens(self) -> int:
        return self.pcc.max_chunk_tokens

    @property
    def compression_factor(self) -> float:
        return self.pcc.compression_factor

    def compress(self, chunks: Sequence[Chunk], *, compression_factor: float | None = None) -> list[LatentSpan]:  # type: ignore[override]
        return self.pcc.remember(chunks, compression_factor)

    def num_slots(self, num_tokens: int, compression_factor: float | None = None) -> int:
        """Slots of the segments of a text of so many tokens, without brackets; see `PCCCompressor.num_slots`."""
        config, factor = self.pcc.config, self.pcc.factor(compression_factor)
        return sum(len(s.places) for s in config.segments(num_tokens + len(config.context_ids), factor))

    @property
    def slot_bytes(self) -> int:
        return self.pcc.encoder.hidden_size * int(self.pcc.encoder.body.dtype.itemsize)

    def chunk_slots(self, chunk: Chunk, compression_factor: float | None = None) -> int:
        return self.num_slots(len(self.pcc.encoder.tokenizer.encode(chunk.text)), compression_factor)

    @property
    def latent(self) -> PCCLatent:
        return self

    def reading(self, stored: SpanSpec) -> SpanSpec:
        return self.pcc.reading(stored)

    def read(self, span: MemorySpan, chunk: Chunk) -> MemorySpan:
        return self.pcc.read(span, chunk)

    def save_pretrained(self, path: str | Path) -> None:
        """The whole compressor: without its converter nothing would read what the encoder remembers."""
        self.pcc.save_pretrained(path)

    @classmethod
    def from_pretrained(cls, path: str | Path, backbone: Backbone) -> Self:
        return cls(PCCCompressor.from_pretrained(path, backbone))


__all__ = ["LARGE_TARGETS", "NUM_MEMORY_TOKENS", "Converter", "Encoder", "PCCCompressor", "PCCConfig", "PCCLatent",
           "load_encoder"]
