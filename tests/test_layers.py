"""Who may import whom (CONTRIBUTING.md): a module imports from lower layers only; siblings never meet."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ctxcomp_rag"
LAYERS: list[set[str]] = [
    {"codes", "errors", "references"},
    {"chunking", "spans", "rope", "tokenization", "retrieval", "readers", "records", "acceleration", "facts",
     "slot_budget"},
    {"backbone"},
    {"kv"},
    {"compressors", "index", "decoding"},
    {"reading", "retention"},
    {"jobs"},
    {"importers", "pipeline", "repair", "training"},
    {"chat", "evaluation"},
    {"cli_output", "demo", "serving"},
    {"cli_bench", "cli_maintain", "cli_measure", "cli_plan", "cli_precompress", "cli_push", "cli_report",
     "cli_serve", "cli_train"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SIBLINGS = LAYERS[4]
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [])
        names |= {m.split(".")[1] for m in modules if m.startswith("ctxcomp_rag.")}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_to_lower_layers_only(path: Path) -> None:
    mine = part_of(path)
    for other in imported_parts(path) - {mine}:
        assert LEVEL[other] <= LEVEL[mine], f"{path.name} ({mine}) imports {other}"
        assert not (mine in SIBLINGS and other in SIBLINGS), f"the siblings {mine} and {other} must not meet"


def test_the_index_needs_no_model_and_the_core_no_framework() -> None:
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (langchain|llama_index)", source, re.M), path
        if part_of(path) == "index":
            assert not re.search(r"^\s*(from|import) (transformers|peft)", source, re.M), path


def test_a_compressors_name_appears_in_its_own_file_and_the_registry_only() -> None:
    allowed = {"compressors/icae.py", "compressors/__init__.py", "importers/icae.py", "importers/__init__.py"}
    for path in MODULES:
        relative = path.relative_to(PACKAGE).as_posix()
        if relative not in allowed:
            code = ast.parse(path.read_text(encoding="utf-8"))
            names = {n.id for n in ast.walk(code) if isinstance(n, ast.Name)}
            assert "ICAECompressor" not in names or relative.startswith("training/"), relative
