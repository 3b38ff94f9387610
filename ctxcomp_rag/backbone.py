"""Load a Hugging Face causal language model, freeze it, and say exactly which one it is.

The only caller of `from_pretrained` for decoders. A compressor that needs the decoder's weights with adapters on
top asks for `second_tree()`: other modules over the same tensors, so that neither adapters nor hooks of the encoder
can ever touch the decoder, in any thread.
"""

from __future__ import annotations

import copy
import hashlib
import json
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ctxcomp_rag.acceleration import with_grouped_attention, with_int8_linears
from ctxcomp_rag.errors import ModelLoadError, UnsupportedModelError
from ctxcomp_rag.rope import RotaryPositions, rope_fingerprint, rotate_keys
from ctxcomp_rag.spans import DecoderFingerprint
from ctxcomp_rag.tokenization import TextTokenizer

EMBEDDED_MODEL = "embedded"
"""Name of the decoder that comes with the package (trained from scratch by us; see the README)."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Backbone:
    """A frozen decoder, its tokenizer and its fingerprint.

    Attributes:
        model: the causal language model, in eval mode, no parameter requires a gradient.
        tokenizer: None for a decoder that is fed with ids only.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, model_id: str,
                 revision: str = "") -> None:
        self.model = model.requires_grad_(False)
        self.model.train(False)
        self.config = model.config.get_text_config()
        self.model_id, self.revision = model_id, revision
        self._tokenizer = TextTokenizer(tokenizer) if tokenizer is not None else None
        self._same_as: Backbone | None = None

    @property
    def tokenizer(self) -> TextTokenizer:
        if self._tokenizer is None:
            raise ModelLoadError(f"the model {self.model_id!r} was loaded without a tokenizer; pass token ids, "
                                 "or save a tokenizer beside the model")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """False for a decoder that is fed with ids only."""
        return self._tokenizer is not None

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def device(self) -> torch.device:
        embedding: Any = self.model.get_input_embeddings()
        device: torch.device = embedding.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def max_positions(self) -> int:
        """Longest prompt plus answer the model was made for."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2**31)

    @property
    def num_kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.hidden_size // self.config.num_attention_heads)

    @cached_property
    def rope(self) -> RotaryPositions:
        """Rotary frequencies; raises UnsupportedModelError where cached keys cannot be moved, with the reason."""
        rope = RotaryPositions.from_config(self.config)
        error = self._rotation_error(rope)
        # correct rotation: 1e-6 in float32, 1e-2 in bfloat16; a wrong one is off by 0.2 and more
        if not error < 0.05:
            raise UnsupportedModelError(
                f"keys of {self.config.model_type!r} cannot be moved to new positions: rotated by the frequencies of "
                f"its configuration they miss the model's own keys by {error:.0%}, so it lays its rotary embedding out "
                f"in another way or leaves it out in some layers. Use soft spans (ICAE, PCC) with this decoder."
            )
        return rope

    def _rotation_error(self, rope: RotaryPositions, *, offset: int = 7) -> float:
        """Largest relative error, over the layers, of keys moved by `offset` against the model's own keys there.

        A configuration does not say everything (neighbouring pairs instead of halves, layers without positions), and
        keys that are moved wrongly give fluent nonsense; so the model is asked once.
        """
        ids = torch.arange(8, device=self.device)[None] % int(self.config.vocab_size)
        keys: list[list[Tensor]] = []
        for start in (0, offset):
            cache: Any = DynamicCache(config=self.model.config)
            with torch.no_grad():
                self.model(input_ids=ids, position_ids=torch.arange(8, device=self.device)[None] + start,
                           attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
            keys.append([layer.keys.float() for layer in cache.layers])
        return max(float((rotate_keys(here, offset, rope) - there).norm() / there.norm())
                   for here, there in zip(*keys, strict=True))

    def embed(self, ids: Tensor) -> Tensor:
        """Rows (..., hidden_size) as `inputs_embeds` expects them, scaled where the architecture scales (Gemma)."""
        rows: Tensor = self.model.get_input_embeddings()(ids.to(self.device))
        return rows

    def second_tree(self) -> PreTrainedModel:
        """The same model as other modules over the same tensors (no memory but the modules' own).

        A deep copy whose memo maps every parameter and buffer to itself: tied weights stay tied, and buffers that
        no state dict carries (rotary frequencies, embedding scales) are shared too.
        """
        shared: dict[int, Any] = {id(t): t for t in self.model.parameters()}
        shared |= {id(t): t for t in self.model.buffers()}
        tree: PreTrainedModel = copy.deepcopy(self.model, shared)
        return tree

    def accelerated(self, *, attention: bool = True, int8: bool = False) -> Backbone:
        """The same decoder made faster on a CPU (see `ctxcomp_rag.acceleration`); weights but int8 ones are shared.

        It keeps the fingerprint: it reads the same spans, in int8 with different numerics.

        Args:
            attention: attend by `grouped_attention`.
            int8: linear layers in int8; **different numerics**.
        """
        tree = self.second_tree()
        tree = with_grouped_attention(tree) if attention else tree
        tree = with_int8_linears(tree) if int8 else tree
        made = copy.copy(self)
        for name in ("rope", "first_layers", "fingerprint"):
            made.__dict__.pop(name, None)
        made.model, made.config, made._same_as = tree, tree.config.get_text_config(), self
        return made

    def release_layers(self) -> None:
        """Give back the memory of all weights but the embeddings, for good: another engine decodes.

        Fingerprint, tokenizer and `embed` stay; running the model raises RuntimeError or NotImplementedError.
        """
        _ = self.fingerprint  # says what the weights were
        kept = set(self.model.get_input_embeddings().modules())
        for module in self.model.modules():
            if module not in kept:
                for name, weight in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(weight.to("meta"), requires_grad=False))

    @cached_property
    def first_layers(self) -> PreTrainedModel:
        """The embedding and the first two layers as a model of their own, over the same tensors."""
        tree = self.second_tree()
        config = tree.config.get_text_config()
        depth = int(config.num_hidden_layers)
        stacks = [(parent, name, child) for parent in tree.modules() for name, child in parent.named_children()
                  if isinstance(child, nn.ModuleList) and len(child) == depth]
        if len(stacks) != 1:
            raise UnsupportedModelError(f"{self.config.model_type!r} does not keep its {depth} layers in one list, so "
                                        "its first layers cannot be run alone")
        [(parent, name, stack)] = stacks
        setattr(parent, name, stack[:2])
        config.num_hidden_layers = min(2, depth)
        return tree

    @cached_property
    def fingerprint(self) -> DecoderFingerprint:
        if self._same_as is not None:
            return self._same_as.fingerprint
        return DecoderFingerprint(
            model_id=self.model_id,
            revision=self.revision,
            weights_digest=weights_digest(self.model),
            tokenizer_digest=self._tokenizer.digest if self._tokenizer else "",
            hidden_size=self.hidden_size,
            num_layers=int(self.config.num_hidden_layers),
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope=rope_fingerprint(self.config),
            dtype=str(self.dtype).removeprefix("torch."),
        )


def weights_digest(model: PreTrainedModel) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and stored buffers, in name order."""
    digest = hashlib.sha256()
    stored = model.state_dict().keys()
    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in stored}
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def embedded_path(name: str = "decoder") -> Path:
    """Folder of the model that comes with the package."""
    return Path(str(files("ctxcomp_rag"))) / "assets" / name


def load_frozen(model: str | Path = EMBEDDED_MODEL, *, revision: str | None = None,
                dtype: torch.dtype | str | None = None, device: str | torch.device | None = None,
                trust_remote_code: bool = False) -> Backbone:
    """Load a decoder-only language model by name or folder and freeze it.

    Args:
        model: "embedded" (the default model of the package), a folder, or a Hugging Face hub id.
        dtype: default is the checkpoint's on a GPU and float32 on a CPU, where bfloat16 is slow or emulated.
        trust_remote_code: run code that comes with the checkpoint; off unless you turn it on.

    Raises:
        ModelLoadError: no such folder or hub id, no network, or not a causal language model.
    """
    name = str(model)
    path = embedded_path() if name == EMBEDDED_MODEL else Path(name)
    source = str(path) if path.exists() else name
    target = torch.device(device) if device is not None else _default_device()
    chosen = dtype if dtype is not None else ("auto" if target.type == "cuda" else torch.float32)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        result: Any = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=chosen,
                                                           output_loading_info=True, **options)
        loaded, info = result
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelLoadError(_advice(name, error)) from error
    if info["missing_keys"]:  # transformers would go on with random numbers in their place
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelLoadError(_advice(name, ValueError(f"its weights lack {missing}")))
    return Backbone(loaded.to(target), _load_tokenizer(source, options), model_id=name,
                    revision=revision or str(getattr(config, "_commit_hash", None) or ""))


def _load_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    if Path(source).is_dir() and not any((Path(source) / n).exists() for n in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"the tokenizer of {source!r} cannot be loaded: {error}") from error
    return tokenizer


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _advice(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if name == EMBEDDED_MODEL:
        return f"the embedded model is missing or damaged ({first}); reinstall ctxcomp-rag"
    if Path(name).is_dir():
        return f"the folder {name!r} does not hold a causal language model that can be loaded: {first}"
    return (
        f"the model {name!r} is neither a folder here nor a model that could be fetched from the Hugging Face hub "
        f"({first}). Check the spelling; without network, download the model elsewhere and pass its folder, "
        f"or use --model {EMBEDDED_MODEL}"
    )
