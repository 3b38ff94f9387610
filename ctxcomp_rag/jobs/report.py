"""What a job did: in numbers while it runs, in a report at the end."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class IndexReport:
    """What one indexing run did.

    Attributes:
        documents: those whose chunks are all in the index now.
        chunks: all chunks of the documents read; added, skipped (there already), removed (outdated): of these.
        compressed: texts that went through the compressor; an added chunk whose text was met before is a copy.
        source_tokens, slots: of all chunks, those that were there already included.
        seconds: from the first document to the last commit.
        compress_seconds, embed_seconds: summed over the workers.
        write_seconds: spent on committing to the index, while the workers go on.
        failures: document or file -> why it is not in the index.
        replaced: ids of documents whose text has changed.
        stopped: whether the job was asked to end before it was done.
    """

    documents: int
    chunks: int
    added: int
    skipped: int
    removed: int
    source_tokens: int
    slots: int
    seconds: float
    failures: Mapping[str, str]
    replaced: tuple[str, ...]
    compressed: int = 0
    compress_seconds: float = 0.0
    embed_seconds: float = 0.0
    write_seconds: float = 0.0
    stopped: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        documents, source_tokens: committed, or found to be there.
        bytes: of the index's folder.
        failures: documents that could not be used.
        seconds: since its begin.
    """

    documents: int = 0
    source_tokens: int = 0
    bytes: int = 0
    failures: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class FailureKind:
    """Failures whose reasons differ in names and numbers only."""

    reason: str
    count: int
    examples: Sequence[str] = field(default_factory=tuple)


_PARTICULARS = re.compile(r"""'[^']*'|"[^"]*"|\b0x[\da-f]+\b|\b\d[\d,.]*\b|\S*\.\.\.\S*""")


def failures_by_reason(failures: Mapping[str, str], examples: int = 5) -> list[FailureKind]:
    """Most frequent first; names and numbers in a reason are left out as "...", as they differ from case to case."""
    kinds: dict[str, list[str]] = {}
    for name, reason in failures.items():
        for spelled in (repr(name), name):
            reason = reason.replace(spelled, "...")
        kinds.setdefault(_PARTICULARS.sub("...", reason), []).append(name)
    found = [FailureKind(reason, len(names), names[:examples]) for reason, names in kinds.items()]
    return sorted(found, key=lambda kind: -kind.count)


def write_report(path: Path, report: Mapping[str, Any], progress: Sequence[Progress]) -> tuple[Path, Path]:
    """Write a job's report as JSON and as one HTML page that needs nothing else.

    Args:
        path: of either file; the other stands beside it.
        report: JSON-ready; "failures" maps names to reasons.
        progress: of the job, in the order of time.

    Returns:
        The paths of the JSON and of the HTML file.
    """
    from jinja2 import Environment

    stem = path.with_suffix("") if path.suffix in (".html", ".json") else path
    kinds = failures_by_reason(report["failures"])
    whole = {**report, "failures_by_reason": [kind.__dict__ for kind in kinds],
             "progress": [state.__dict__ for state in progress]}
    stem.parent.mkdir(parents=True, exist_ok=True)
    as_json, as_html = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".html"))
    as_json.write_text(json.dumps(whole, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    template = Environment(autoescape=True).from_string(
        (files("ctxcomp_rag") / "assets" / "job_report.html").read_text(encoding="utf-8"))
    page = template.render(report=report, kinds=kinds, lines=[_line(progress, "documents", "documents"),
                                                              _line(progress, "source_tokens", "source tokens"),
                                                              _line(progress, "bytes", "bytes of the index")])
    as_html.write_text(page, encoding="utf-8")
    return as_json, as_html


def _line(progress: Sequence[Progress], name: str, label: str) -> dict[str, Any]:
    """A quantity over time as the points of an SVG polyline in a field of 300 x 80."""
    states = [Progress(), *progress]
    width, height = max(states[-1].seconds, 1e-9), max(getattr(states[-1], name), 1)
    points = [f"{300 * s.seconds / width:.1f},{80 - 80 * getattr(s, name) / height:.1f}" for s in states]
    return {"label": label, "points": " ".join(points), "total": getattr(states[-1], name),
            "rate": getattr(states[-1], name) / width}
