"""What is needed to run a result again: the command, the commit, the machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ctxcomp_rag import __version__


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON beside its provenance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), **result}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def provenance() -> dict[str, Any]:
    """Command, commit (empty outside a checkout), version, date, machine."""
    program = Path(sys.argv[0])
    command = ["ctxcomp", *sys.argv[1:]] if program.stem in ("ctxcomp", "cli") else ["python", *sys.argv]
    return {"command": shlex.join(command), "commit": _commit(), "version": __version__,
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"cpu_count": os.cpu_count(), "processor": _processor(), "python": platform.python_version(),
                        "torch": torch.__version__, "threads": torch.get_num_threads()}}


def _commit() -> str:
    try:
        made = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
                              capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return made.stdout.strip()


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
