"""Official code that is no package: one file of a checkout as a module, and the commit it stands at."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any


def load_code(checkout: str | os.PathLike[str], file: str, repository: str) -> Any:
    """A file of a checkout as a module of its own; its names may be replaced without a change of the checkout.

    Args:
        file: path inside the checkout.
        repository: what the checkout should be a clone of, as GitHub names it (OWNER/NAME).

    Raises:
        FileNotFoundError: the checkout has no such file.
    """
    path = Path(checkout) / file
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkout of https://github.com/{repository}, but there is no {path}")
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return code


def commit_of(checkout: str | os.PathLike[str]) -> str:
    """The commit of a checkout; "" where git does not know."""
    try:
        asked = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True,
                               check=False)
    except OSError:  # no git
        return ""
    return asked.stdout.strip()
