"""Peers of `ctxcomp bench`: a real one answers, absent ones say why, one that gives up costs its own rows only."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from ctxcomp_rag.cli import app
from ctxcomp_rag.decoding import FrozenDecoder
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.bench.clock import Timing
from ctxcomp_rag.evaluation.bench.peer_drivers.llama_cpp import write_gguf
from ctxcomp_rag.evaluation.bench.peer_drivers.pcc import OfficialPCC, official_pcc
from ctxcomp_rag.evaluation.bench.peer_drivers.peer import PrefixCaching
from ctxcomp_rag.evaluation.bench.peers import CHECKOUTS, PeerProcess, PeerRow, PeerSkippedError, start_peers
from ctxcomp_rag.evaluation.bench.report import measure
from ctxcomp_rag.evaluation.bench.rows import LIMIT, RAW, Rows
from ctxcomp_rag.evaluation.bench.run import run_rows
from ctxcomp_rag.evaluation.bench.shapes import load_shape, shape_config
from ctxcomp_rag.evaluation.bench.workload import Workload

WORK = Workload(chunks=3, chunk_tokens=16, question_tokens=4, new_tokens=3)
TINY = shape_config("tiny")


def interpreter(folder: Path, script: str) -> Path:
    """A stand-in for another interpreter: speaks the protocol and computes nothing."""
    made = folder / "python"
    made.write_text(f"#!{sys.executable}\nimport json, sys\ntask = json.loads(sys.stdin.readline())\n{script}")
    made.chmod(0o755)
    return made


READY = "print(json.dumps({'versions': {'peer': '1'}, 'rows': ['peer-a', 'peer-b']}), flush=True)\n"
ANSWER = ("asked = json.loads(sys.stdin.readline())['row']\n"
          "print(json.dumps({'ttft': 1.0, 'total': 2.0, 'ttft_wall': 3.0, 'total_wall': 4.0,\n"
          "                  'positions': len(task['question']) + (asked == 'peer-b')}), flush=True)\n")


def test_a_real_peer_compresses_and_answers_in_a_process_of_its_own() -> None:
    with PeerProcess("llmlingua", Path(sys.executable), TINY, WORK) as peer:
        assert peer.rows == ("llmlingua",)
        assert peer.versions.keys() == {"torch", "transformers", "llmlingua"}
        timing = PeerRow("llmlingua", peer).timed(3)
    assert 0 < timing.ttft < timing.total
    assert 4 < timing.positions < 3 * 16 + 4  # the question and a part of the chunks


def test_peers_that_cannot_run_say_why(tmp_path: Path) -> None:
    bare = tmp_path / "bare"  # an interpreter without site packages
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    given = {"kvpress": Path("/nowhere/python"), "llmlingua": bare, "llama.cpp": bare, "openvino": tmp_path}
    running, skipped = start_peers(given, TINY, WORK)
    assert not running
    assert skipped == {
        "kvpress": "there is no interpreter at /nowhere/python",
        "llmlingua": "ModuleNotFoundError: No module named 'torch'",
        "llama.cpp": "ModuleNotFoundError: No module named 'llama_cpp'",
        "openvino": f"{tmp_path} does not start: Permission denied",
        "vllm": "no interpreter given (--peer vllm=PYTHON)", "icae": "no interpreter given (--peer icae=PYTHON)",
        "pcc": "no interpreter given (--peer pcc=PYTHON)"}


@pytest.mark.parametrize("name", CHECKOUTS)
def test_a_peer_out_of_a_checkout_says_what_is_missing(name: str, tmp_path: Path) -> None:
    given = {name: Path(sys.executable)}
    _, skipped = start_peers(given, TINY, WORK)
    assert skipped[name] == f"no checkout given (--checkout {name}=FOLDER, a clone of {CHECKOUTS[name]})"
    _, skipped = start_peers(given, TINY, WORK, {name: tmp_path})
    assert skipped[name].startswith(f"FileNotFoundError: expected a checkout of {CHECKOUTS[name]}, but there is no "
                                    f"{tmp_path}")


def test_a_factor_that_official_pcc_has_no_memory_tokens_for_is_refused() -> None:
    with pytest.raises(ValueError, match="64 memory tokens for a segment of 256: expected a factor of 4 or more, got"):
        official_pcc("there", None, None, 3)


@pytest.mark.parametrize(("peers", "name"), [({"icae": Path("python")}, "vllm"), ({}, "icae"), ({}, "pcc")])
def test_a_checkout_of_what_is_not_asked_for_is_refused(peers: dict[str, Path], name: str) -> None:
    with pytest.raises(InputError, match=rf"a checkout goes with a peer of icae, pcc and its interpreter .*for {name}"):
        next(run_rows("tiny", ["raw"], WORK, 1, peers=peers, checkouts={name: Path("there")}))


def checkout_of(name: str) -> Path:
    """The clone that CTXCOMP_NAME_CHECKOUT names; skips the test where it names none."""
    variable = f"CTXCOMP_{name.upper()}_CHECKOUT"
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no clone of {CHECKOUTS[name]}")
    return Path(os.environ[variable])


@pytest.mark.parametrize(("name", "positions"), [
    ("icae", 3 * 4 + 1 + 4),  # slots at 4x, [FT], the question
    ("pcc", 1 + (1 + 64 + 1) + 4),  # bos, the slots of one segment in brackets, the question
])
def test_official_code_compresses_and_answers_out_of_its_checkout(name: str, positions: int) -> None:
    with PeerProcess(name, Path(sys.executable), TINY, WORK, checkout=checkout_of(name)) as peer:
        assert peer.rows == (f"{name}-official",)
        timing = PeerRow(f"{name}-official", peer).timed(3)
    assert 0 < timing.ttft < timing.total
    assert timing.positions == positions


def test_the_steps_of_the_official_pcc_code_are_those_of_its_own_loop() -> None:
    work, logits = replace(WORK, chunk_tokens=100), []  # type: tuple[Workload, list[torch.Tensor]]
    task = {"config": TINY, "chunks": work.chunk_ids(1024), "question": work.question_ids(1024), "new_tokens": 3,
            "factor": 4, "checkout": checkout_of("pcc")}
    torch.manual_seed(0)
    with torch.no_grad():  # the driver switches gradients off
        peer = OfficialPCC(task)
        slots = peer.pcc(peer.text, None, get_embedding=True)
        assert slots.shape == (1, 2 * 64, TINY["hidden_size"])  # of 256 and 44 tokens
        assert slots.isfinite().all()
        peer.model.register_forward_hook(lambda model, given, made: logits.append(made.logits[0, -1]))
        assert peer.answer("pcc-official")["positions"] == 1 + 2 * (1 + 64 + 1) + 4
        peer.pcc.generate(peer.text, " ".join(f"w{token}" for token in peer.question), 3)
    torch.testing.assert_close(logits[:3], logits[3:])


def test_each_row_of_a_peer_is_asked_for_by_its_name(tmp_path: Path) -> None:
    with PeerProcess("vllm", interpreter(tmp_path, READY + ANSWER + ANSWER), TINY, WORK) as peer:
        assert peer.versions == {"peer": "1"}
        first, second = (PeerRow(name, peer) for name in peer.rows)
        assert first.timed(3) == Timing(0.0, 1.0, 2.0, 3.0, 4.0, 3, 4)
        assert second.timed(3).positions == 5


def test_a_process_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with PeerProcess("vllm", interpreter(tmp_path, READY + "sys.stderr.write('too little memory\\n\\n')"), TINY,
                     WORK) as peer, pytest.raises(PeerSkippedError, match="its process ended: too little memory"):
        PeerRow("peer-a", peer).timed(3)
    with pytest.raises(PeerSkippedError, match="its process ended without a word"):
        PeerProcess("vllm", interpreter(tmp_path, ""), TINY, WORK)


def test_a_peer_that_gives_up_leaves_the_other_rows(tmp_path: Path) -> None:
    backbone, skipped = load_shape("tiny"), {}  # type: tuple[Any, dict[str, str]]
    makes = Rows(backbone, WORK, tmp_path)
    with PeerProcess("vllm", interpreter(tmp_path, READY + ANSWER), TINY, WORK) as peer:
        rows = [makes.row(RAW), makes.row(LIMIT), PeerRow("peer-a", peer)]
        first, second = measure(rows, FrozenDecoder(backbone), 3, 2, skipped=skipped)
    assert [result.row for result in first] == [RAW, LIMIT, "peer-a"]
    assert (first[2].ttft_s, first[2].positions, first[2].peak_bytes) == (1.0, 4, None)
    assert [result.row for result in second] == [RAW, LIMIT]
    assert skipped == {"peer-a": "its process ended without a word"}


class Recorder(PrefixCaching):
    """An engine that keeps all prompts since `forget` and notes how many tokens of each it had not kept."""

    rows: ClassVar[tuple[str, ...]] = ("raw", "same", "reordered")

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        self.kept: list[list[int]] = []
        self.new: list[int] = []

    def forget(self) -> None:
        self.kept.clear()

    def read(self, ids: list[int]) -> None:
        self.new.append(len(ids) - max((self._common(ids, old) for old in self.kept), default=0))
        self.kept.append(ids)

    @staticmethod
    def _common(ids: list[int], old: list[int]) -> int:
        return next((n for n, (a, b) in enumerate(zip(ids, old, strict=True)) if a != b), len(ids))

    def following(self) -> None:
        """Nothing to do."""


@pytest.mark.parametrize("order", ["raw same reordered", "reordered same raw", "same same raw reordered reordered"])
def test_a_prefix_cache_finds_the_chunks_in_their_order_only_and_never_the_question(order: str) -> None:
    engine = Recorder({"chunks": [[1, 2, 3], [4, 5, 6]], "question": [7, 8, 9, 10], "new_tokens": 1})
    found = []
    for row in order.split():
        engine.answer(row)
        found.append((row, engine.new[-1]))
    assert set(found) <= {("raw", 10), ("same", 4), ("reordered", 10)}


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_gguf_file_holds_the_decoder_of_the_configuration(model_type: str, tmp_path: Path) -> None:
    config = {**TINY, "model_type": model_type, "num_hidden_layers": 2}
    write_gguf(tmp_path / "random.gguf", config)
    found = gguf.GGUFReader(tmp_path / "random.gguf")
    tensors = {t.name: tuple(int(n) for n in t.shape[::-1]) for t in found.tensors}
    classes: Any = AutoModelForCausalLM
    expected = classes.from_config(AutoConfig.for_model(**config))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model_type.upper()], 2)
    assert tensors == {names.get_name(name, (".weight", ".bias")): tuple(value.shape)
                       for name, value in expected.named_parameters()}
    assert found.get_field(f"{model_type}.attention.head_count_kv").contents() == 2


def test_the_command_measures_the_rest_where_a_peer_is_missing() -> None:
    done = CliRunner().invoke(app, ["bench", "--shape", "tiny", "--chunks", "2", "--chunk-tokens", "16", "--new-tokens",
                                    "2", "--repeats", "1", "--rows", "soft-4x", "--peer", "llama.cpp=/nowhere/python"])
    assert done.exit_code == 0, done.output
    assert "| soft-4x |" in done.stdout
    assert "llama.cpp did not run: there is no interpreter at /nowhere/python" in " ".join(done.stderr.split())
