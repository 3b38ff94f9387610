"""Checkpoints of the official implementations, read and written in their own formats."""

from ctxcomp_rag.importers.icae import load_official_v2, save_official_v2

__all__ = ["load_official_v2", "save_official_v2"]
