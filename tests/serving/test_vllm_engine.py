"""The real vLLM engine, in-process and behind HTTP. Deselected by default; one command:

    make test-vllm

It needs an interpreter with vLLM and our dependencies, named by CTXCOMP_VLLM_PYTHON (docs/serving.md says how).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ctxcomp_rag import CompressedRAG, GenerationSettings
from ctxcomp_rag.backbone import embedded_path
from ctxcomp_rag.serving.vllm_server import VLLMBackend
from tests.gate import Gate, eventually
from tests.serving.served import MODEL, serving
from tests.serving.soft import QUESTIONS, consecutive_index

pytestmark = pytest.mark.vllm
PYTHON = os.environ.get("CTXCOMP_VLLM_PYTHON", "")
ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0",
       "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
STARTUP = 900.0  # seconds, on a busy machine


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompressedRAG]:
    if not PYTHON:
        pytest.skip("CTXCOMP_VLLM_PYTHON names no interpreter with vLLM")
    with consecutive_index(tmp_path_factory.mktemp("soft")) as made:
        yield made


@pytest.fixture(scope="module")
def found(soft: CompressedRAG, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the driver wrote."""
    out = tmp_path_factory.mktemp("out") / "found.json"
    done = subprocess.run([PYTHON, "-m", "tests.serving.vllm_driver", str(embedded_path()), str(soft.memory.path),
                           str(out)], env=ENV, cwd=ROOT, capture_output=True, text=True, check=False, timeout=STARTUP)
    assert done.returncode == 0, done.stderr[-3000:]
    read: dict[str, Any] = json.loads(out.read_text())
    return read


@pytest.mark.parametrize("settings", ["greedy", "stop"])
def test_in_process_greedy_answers_equal_ours_token_for_token(found: dict[str, Any], settings: str) -> None:
    ours, theirs = found[settings]
    assert theirs == ours
    assert len({tuple(answer[1]) for answer in ours}) > 1


def test_the_same_order_hits_the_prefix_cache_and_another_does_not(found: dict[str, Any]) -> None:
    same, total = found["cached"]["same order"]
    reordered, _ = found["cached"]["reordered"]
    assert same > total // 3
    assert reordered < same


def test_over_http_greedy_answers_equal_ours_and_our_decoder_runs_no_layer(soft: CompressedRAG) -> None:
    settings = GenerationSettings(24)
    expected = [soft.decoder.generate(soft.prompt(q, soft.retrieve(q)), settings) for q in QUESTIONS]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = subprocess.Popen(
        [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(embedded_path()), "--dtype", "float32",
         "--enforce-eager", "--enable-prompt-embeds", "--max-model-len", "512", "--port", str(port), "--host",
         "127.0.0.1"], env=ENV, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        assert eventually(lambda: engine.poll() is not None or _healthy(url), STARTUP)
        gate = Gate(soft.backbone)
        with serving(soft, backend=VLLMBackend(soft.decoder, url)) as served:
            for question, made in zip(QUESTIONS, expected, strict=True):
                got = served.client().with_options(timeout=300).chat.completions.create(
                    model=MODEL, max_tokens=24, messages=[{"role": "user", "content": question}])
                assert got.choices[0].message.content == made.text.strip()
                assert got.choices[0].finish_reason == made.finish_reason
                assert got.usage is not None
                assert got.usage.completion_tokens == made.completion_tokens
        gate.remove()
        assert gate.passes == []
    finally:
        engine.terminate()
        engine.wait(60)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
