"""What is needed to run a result again: the command, the commit, the machine, and what was measured."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import ctxcomp_rag
from ctxcomp_rag import __version__
from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.compressors import Compressor
from ctxcomp_rag.errors import InputError


def require_writable(path: Path) -> None:
    """Raises InputError where no result can be written; for what takes long to ask before it begins."""
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()  # what is there stays; rights and modes do not tell on every disk
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written ({error}); pass another --out") from error
    if not there:
        path.unlink()


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON beside its provenance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), **result}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def measured(files: Iterable[Path], decoder: Backbone, compressors: Mapping[str, Compressor]) -> dict[str, Any]:
    """Digests of what a result was measured with: of data files, of the decoder's weights, of the compressors."""
    digests = {}
    for path in files:
        with path.open("rb") as file:
            digests[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"data_sha256": digests, "decoder_weights_digest": decoder.fingerprint.weights_digest,
            "compressor_digests": {name: made.spec.compressor for name, made in compressors.items()}}


def provenance() -> dict[str, Any]:
    """Command, commit (see `commit_of`), version, date, machine."""
    program = Path(sys.argv[0])
    command = ["ctxcomp", *sys.argv[1:]] if program.stem in ("ctxcomp", "cli") else ["python", *sys.argv]
    return {"command": shlex.join(command), "commit": commit_of(Path(ctxcomp_rag.__file__)), "version": __version__,
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"cpu_count": os.cpu_count(), "processor": _processor(), "python": platform.python_version(),
                        "torch": torch.__version__, "threads": torch.get_num_threads()}}


def commit_of(file: Path) -> str:
    """The commit of the checkout that a file belongs to, with "-dirty" where tracked files of its folder were changed
    since (not those beside it: results and pages change while one measures); "" where git does not track it, as of a
    package that was installed inside somebody else's checkout."""
    git = ["git", "--no-optional-locks", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        made = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):  # no git, no checkout, or not tracked
        return ""
    return made.stdout.strip() + ("-dirty" if changed.returncode else "")


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
