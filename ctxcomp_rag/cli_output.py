"""What every command prints with, and the options that several commands share."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

_PLAIN: dict[str, bool] = {"highlight": False, "soft_wrap": True, "markup": False, "emoji": False}


class _Safe(Console):
    """Prints text as it is; control characters in documents, answers or names never reach the terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **options)


def printable(text: str) -> str:
    """Text without control characters."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


to_err = _Safe(stderr=True, **_PLAIN)  # type: ignore[arg-type]
to_out = _Safe(**_PLAIN)  # type: ignore[arg-type]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
IndexDir = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the index, or s3://BUCKET/PREFIX "
                                          "where one was pushed.")]
IndexFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the index.")]
Model = Annotated[str, typer.Option(help="Decoder: 'embedded', a folder, or a Hugging Face hub id.")]


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, ensure_ascii=False, default=str))


def quiet() -> None:
    """No progress bar for loading a few weights; called where transformers is loaded anyway."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
