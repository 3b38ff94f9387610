"""The compressors, by name. A new one adds its file and a line here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.compressors.base import Budget, Compressor, possible_factors, read_config
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.spans import DecoderFingerprint

COMPRESSORS = {
    "icae": "ctxcomp_rag.compressors.icae:ICAECompressor",
    "infinipot": "ctxcomp_rag.compressors.infinipot:InfiniPotCompressor",
    "pcc": "ctxcomp_rag.compressors.pcc:PCCCompressor",
}
# Trained compressors of the embedded decoder besides those that stand under their method's name, and their method.
FURTHER = {"icae-nested": "icae"}


def compressor_class(name: str) -> type[Compressor]:
    """The class registered under `name`; raises InputError naming the ones there are."""
    if name not in COMPRESSORS:
        raise InputError(f"there is no compressor {name!r}; expected one of {', '.join(sorted(COMPRESSORS))}")
    module, attribute = COMPRESSORS[name].split(":")
    return cast(type[Compressor], getattr(import_module(module), attribute))


def load_compressor(path: str | Path, backbone: Backbone) -> Compressor:
    """Load a saved compressor of any kind; its settings file names the method."""
    return compressor_class(read_config(Path(path))["method"]).from_pretrained(path, backbone)


def load_trained_compressor(compressor: str | Path, backbone: Backbone, budget: str | None = None) -> Compressor:
    """A saved compressor by folder, or by name one that needs no folder.

    Args:
        compressor: a folder; or a method, for the compressor that `Compressor.ready_for` gives; or one of `FURTHER`.
        budget: size of a span, for methods that need no training.

    Raises:
        InputError: there is no such compressor, it is not for this decoder, or its spans have a size of their own.
    """
    size = Budget.parse(budget) if budget is not None else None
    name = str(compressor)
    if name not in {*COMPRESSORS, *FURTHER} and Path(compressor).is_dir():
        if size is not None:
            raise InputError(f"the settings in {name!r} say how large a span is; leave the budget out, or "
                             "name a method instead of a folder")
        return load_compressor(compressor, backbone)
    # a name that comes with the package wins over a folder of that name
    if name in FURTHER:
        return compressor_class(FURTHER[name]).shipped(name, backbone, size)
    if name not in COMPRESSORS:
        raise InputError(f"there is no compressor {name!r}; expected a folder, or one of "
                         f"{', '.join(sorted({*COMPRESSORS, *FURTHER}))}")
    return compressor_class(name).ready_for(backbone, size)


def load_reader(path: str | Path, backbone: Backbone) -> Compressor:
    """Of a saved compressor of any kind, what reading stored spans takes: for PCC the converter, not the encoder."""
    return compressor_class(read_config(Path(path))["method"]).reader_from_pretrained(path, backbone)


def decoder_of(path: str | Path) -> DecoderFingerprint:
    """The decoder that a saved compressor was trained for."""
    return DecoderFingerprint(**read_config(Path(path))["decoder"])


__all__ = ["COMPRESSORS", "FURTHER", "Budget", "Compressor", "compressor_class", "decoder_of", "load_compressor",
           "load_reader", "load_trained_compressor", "possible_factors"]
