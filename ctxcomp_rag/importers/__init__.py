"""Checkpoints of the official implementations, read and written in their own formats."""

from __future__ import annotations

from pathlib import Path

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.importers.hub import resolve_file, resolve_folder
from ctxcomp_rag.importers.icae import load_official_v1, load_official_v2, save_official_v1, save_official_v2
from ctxcomp_rag.importers.pcc import load_official_pcc, load_patched_decoder, save_official_pcc


def from_official(method: str, source: str | Path, backbone: Backbone, *, revision: str | None = None,
                  segment_tokens: int | None = None, factor: int = 4, patch: str | Path | None = None,
                  encoder_base: str | Path | None = None) -> Compressor:
    """Read the official checkpoint of a method; a `.pt` of ICAE is v1. See the loaders for the options.

    Args:
        method: "icae" or "pcc".
        source: the file (ICAE) or folder (PCC), here or on the Hugging Face hub: "sggetao/icae/mistral_7b_ft_icae
            .safetensors" (owner, repository, file), "BroAlanTaps/Stage2-PCC-Lite-4x" (owner, repository).
        revision: branch, tag or commit of the hub's repository [default: its main branch].

    Raises:
        InputError: options that the method does not have.
        ModelLoadError: nothing of that name here or on the hub, no network, or not such a checkpoint.
    """
    if segment_tokens is not None and segment_tokens < 1:
        raise InputError(f"expected segment_tokens of at least 1, got {segment_tokens}")
    if method not in ("icae", "pcc"):
        raise InputError(f"expected 'icae' or 'pcc', got {method!r}")
    if method == "pcc":
        tokens = segment_tokens or 256
        if factor < 1 or tokens % factor:
            raise InputError(f"expected a factor that divides the {tokens} tokens of a segment, got {factor}")
        folder = resolve_folder(source, revision)
        return load_official_pcc(folder, backbone, patch=patch, encoder_base=encoder_base, segment_tokens=tokens,
                                 slots_per_segment=tokens // factor)
    if patch is not None or encoder_base is not None:
        raise InputError("an ICAE checkpoint has neither a patch nor an encoder of its own; leave both out")
    file = resolve_file(source, revision)
    if file.suffix == ".pt":
        return load_official_v1(file, backbone, segment_tokens=segment_tokens or 512)
    return load_official_v2(file, backbone, segment_tokens=segment_tokens)


__all__ = ["from_official", "load_official_pcc", "load_official_v1", "load_official_v2", "load_patched_decoder",
           "save_official_pcc", "save_official_v1", "save_official_v2"]
