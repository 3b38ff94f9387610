"""Official PCC checkpoints: an encoder folder (Lite) or PEFT folder (Large) with `memory_converter.bin` inside.

    RMSNorm.weight  dense_in.weight  dense_in.bias  dense_out.weight  dense_out.bias

The decoder's three special tokens come as a patch, {"tokens", "embedding", "lm_head"}, or are merged into the decoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone, load_frozen
from ctxcomp_rag.compressors.pcc import Converter, PCCCompressor, PCCConfig, load_encoder
from ctxcomp_rag.errors import ModelLoadError
from ctxcomp_rag.importers.containers import read_tensors
from ctxcomp_rag.importers.layouts import pcc_layout

CONVERTER_FILE = "memory_converter.bin"
SPECIAL_TOKENS = ("<mem>", "<ae>", "</mem>")

_OFFICIAL_NAMES = {"norm.weight": "RMSNorm.weight"}


def load_official_pcc(path: str | Path, backbone: Backbone, *, patch: str | Path | None = None,
                      encoder_base: str | Path | None = None, slots_per_segment: int = 64,
                      segment_tokens: int = 256) -> PCCCompressor:
    """Read an official PCC checkpoint for its decoder.

    Args:
        patch: the three special tokens' file; without it the decoder must have them merged in.
        encoder_base: the model that a Large folder's adapter belongs to [default: the one the adapter names].
        slots_per_segment, segment_tokens: not in the files; 64 of 256 is the 4x checkpoint.

    Raises:
        ModelLoadError: not such a folder, or made for another decoder; the message names keys, shapes or dtypes.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelLoadError(f"there is no folder {str(path)!r}")
    adapted = (folder / "adapter_config.json").exists()
    converter = load_official_converter(folder / CONVERTER_FILE, backbone.hidden_size)
    special_rows = read_patch(patch)[0] if patch is not None else _merged_rows(backbone)
    base = str(encoder_base or _named_base(folder)) if adapted else str(folder)
    encoder = load_encoder(base, adapter=folder if adapted else None)
    found = converter.norm.weight.shape[0]
    if found != encoder.hidden_size:
        raise ModelLoadError(f"{str(folder / CONVERTER_FILE)!r} reads hidden states of {found}, but the encoder "
                             f"gives {encoder.hidden_size}")
    config = PCCConfig(segment_tokens, slots_per_segment, "attended", base,
                       pcc_layout(backbone, encoder.tokenizer.hf))
    return PCCCompressor(backbone, encoder, config, converter=converter, special_rows=special_rows)


def load_official_converter(path: str | Path, hidden_size: int | None = None) -> Converter:
    """Read `memory_converter.bin`; `hidden_size` is the decoder's, checked where it is given."""
    tensors = read_tensors(Path(path))
    weight = tensors.get("dense_in.weight")
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ModelLoadError(f"{str(path)!r} is not a PCC converter: it has no matrix dense_in.weight")
    out_size, in_size = weight.shape
    if hidden_size is not None and out_size != hidden_size:
        raise ModelLoadError(f"{str(path)!r} was made for a decoder of hidden size {out_size}, but this decoder has "
                             f"{hidden_size}")
    converter = Converter(in_size, out_size)
    expected = {_OFFICIAL_NAMES.get(k, k): v for k, v in converter.state_dict().items()}
    problems = [f"lacks {k}" for k in sorted(expected.keys() - tensors.keys())]
    problems += [f"has the unknown key {k}" for k in sorted(tensors.keys() - expected.keys())]
    for key in sorted(expected.keys() & tensors.keys()):
        got = tensors[key]
        if not isinstance(got, Tensor) or not got.is_floating_point():
            problems.append(f"holds no floating point tensor as {key}")
        elif got.shape != expected[key].shape:
            problems.append(f"has {key} of shape {tuple(got.shape)}, expected {tuple(expected[key].shape)}")
    if problems:
        raise ModelLoadError(f"{str(path)!r} is not a PCC converter that fits: it {'; it '.join(problems)}")
    with torch.no_grad():
        for name, parameter in converter.named_parameters():
            parameter.copy_(tensors[_OFFICIAL_NAMES.get(name, name)])
    return converter


def save_official_pcc(compressor: PCCCompressor, path: str | Path) -> None:
    """Write encoder, tokenizer and converter as an official folder."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = compressor.encoder.model
    model.save_pretrained(str(folder))
    compressor.encoder.tokenizer.hf.save_pretrained(folder)
    tensors = {_OFFICIAL_NAMES.get(k, k): v.detach().cpu() for k, v in compressor.converter.state_dict().items()}
    torch.save(tensors, folder / CONVERTER_FILE)


def read_patch(path: str | Path) -> tuple[Tensor, Tensor]:
    """(embedding rows, lm_head rows), each (3, hidden_size), of <mem>, <ae>, </mem>."""
    content = read_tensors(Path(path))
    if tuple(content.get("tokens", ())) != SPECIAL_TOKENS:
        raise ModelLoadError(f"{str(path)!r} is not a patch of special tokens: expected the tokens "
                             f"{list(SPECIAL_TOKENS)}, got {content.get('tokens')}")
    rows = [content.get(name) for name in ("embedding", "lm_head")]
    for name, tensor in zip(("embedding", "lm_head"), rows, strict=True):
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or len(tensor) != 3 or not tensor.is_floating_point():
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ModelLoadError(f"{str(path)!r}: {name} must be floating point rows (3, hidden size), got {got}")
    return rows[0], rows[1]  # type: ignore[return-value]


def load_patched_decoder(model: str | Path, patch: str | Path, **options: Any) -> Backbone:
    """The decoder with the special tokens' rows appended to its input table and its head, frozen."""
    plain = load_frozen(model, **options)
    embedding, head = read_patch(patch)
    if embedding.shape[1] != plain.hidden_size:
        raise ModelLoadError(f"{str(patch)!r} has rows of {embedding.shape[1]}, but the decoder {plain.model_id!r} has "
                             f"the hidden size {plain.hidden_size}")
    network: Any = plain.model
    size = int(plain.config.vocab_size)
    network.resize_token_embeddings(size + len(SPECIAL_TOKENS), mean_resizing=False)
    with torch.no_grad():
        network.get_input_embeddings().weight[size:] = embedding.to(plain.device, plain.dtype)
        network.get_output_embeddings().weight[size:] = head.to(plain.device, plain.dtype)
    hf = plain.tokenizer.hf
    hf.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return Backbone(network, hf, model_id=plain.model_id, revision=plain.revision)


def _merged_rows(backbone: Backbone) -> Tensor:
    hf = backbone.tokenizer.hf
    ids = [hf.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    missing = [t for t, i in zip(SPECIAL_TOKENS, ids, strict=True) if i is None or i == hf.unk_token_id]
    if missing:
        raise ModelLoadError(f"the decoder {backbone.model_id!r} has no token {', '.join(missing)}; pass the patch "
                             "file, or the decoder with the tokens merged in")
    return backbone.embed(torch.tensor(ids)).detach().float().cpu()


def _named_base(folder: Path) -> str:
    from peft import PeftConfig

    try:
        named = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelLoadError(f"the adapter settings in {str(folder)!r} cannot be read: {error}") from error
    if not named:
        raise ModelLoadError(f"the adapter in {str(folder)!r} names no model that it belongs to; pass encoder_base")
    beside = folder / named  # a path in a checkpoint counts from its folder
    return str(beside.resolve()) if beside.is_dir() else named
