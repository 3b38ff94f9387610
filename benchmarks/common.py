"""How benchmarks write their results: JSON with the command, the commit and the machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result beside what is needed to run it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"command": shlex.join(["python", *sys.argv]), "commit": _commit(), "date": time.strftime("%Y-%m-%d"),
              "machine": {"cpu_count": os.cpu_count(), "processor": _processor(), "python": platform.python_version(),
                          "torch": torch.__version__, "threads": torch.get_num_threads()}}
    path.write_text(json.dumps({**header, **result}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a Markdown table."""
    keys = list(rows[0])
    print("| " + " | ".join(keys) + " |\n|" + "---|" * len(keys))
    for row in rows:
        print("| " + " | ".join("-" if row[k] is None else f"{row[k]}" for k in keys) + " |")


def _commit() -> str:
    made = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return made.stdout.strip()


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
