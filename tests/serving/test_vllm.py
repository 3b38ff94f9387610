"""The adapter for vLLM up to its boundary: the rows, the wire form, what is refused, and a server that speaks to one.

The other side is a stand-in here that reads the wire form as vLLM does and decodes with a decoder of its own;
`test_vllm_engine.py` asks the real engine.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from ctxcomp_rag import CompressedRAG, FrozenDecoder, GenerationSettings, load_frozen
from ctxcomp_rag.decoding import Delimiter, RequestLimits, Text, splice
from ctxcomp_rag.errors import InputError, UnsupportedModelError
from ctxcomp_rag.serving.vllm import prompt_embeds, require_consecutive, sampling, wire_form
from ctxcomp_rag.serving.vllm_server import VLLMBackend
from ctxcomp_rag.spans import SoftSpan
from tests.gate import PATIENCE, Gate, eventually
from tests.serving.served import MODEL, Served, running, serving
from tests.serving.soft import QUESTIONS, consecutive_index

SETTINGS = GenerationSettings(max_new_tokens=16)


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompressedRAG]:
    with consecutive_index(tmp_path_factory.mktemp("soft")) as made:
        yield made


# -- rows


def test_the_rows_are_the_splices_prompt_buffer(soft: CompressedRAG) -> None:
    for question in QUESTIONS:
        parts = soft.prompt(question, soft.retrieve(question))
        (run,) = splice(parts, soft.backbone).runs
        embeds, usage = prompt_embeds(parts, soft.backbone)
        assert torch.equal(embeds, run.embeds)  # type: ignore[union-attr]
        assert usage.slots > 0
        assert embeds.shape == (usage.positions, soft.backbone.hidden_size)


def test_no_layer_is_run(soft: CompressedRAG) -> None:
    gate = Gate(soft.backbone)
    prompt_embeds(soft.prompt(QUESTIONS[0], soft.retrieve(QUESTIONS[0])), soft.backbone)
    gate.remove()
    assert gate.passes == []


def test_slots_that_are_spread_are_refused(soft: CompressedRAG) -> None:
    """Wherever the gap is: between the slots, before the first, or after the last."""
    rows = torch.zeros(2, soft.backbone.hidden_size)
    for positions, length in (([0, 2], 3), ([1, 2], 3), ([0, 1], 3)):
        span = SoftSpan("s", 3, torch.tensor(positions), length, rows)
        with pytest.raises(UnsupportedModelError, match="spreads its slots over more"):
            prompt_embeds(["a", span, "b"], soft.backbone)
    prompt_embeds(["a", SoftSpan("s", 3, torch.arange(2), 2, rows), "b"], soft.backbone)


def test_kv_spans_are_refused(rag: CompressedRAG) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot read KV spans"):
        prompt_embeds(rag.prompt("Who?", rag.retrieve("Who?")), rag.backbone)


def test_an_index_that_vllm_would_misread_is_refused_before_anything_is_served(rag: CompressedRAG, soft: CompressedRAG,
                                                                                tmp_path: Path) -> None:
    require_consecutive(soft.spec)
    with pytest.raises(UnsupportedModelError, match="cannot read KV spans; serve this index with --backend local"):
        require_consecutive(rag.spec)
    with CompressedRAG.create(tmp_path / "spread", encoder=soft.encoder) as spread, \
            pytest.raises(UnsupportedModelError, match="would be read at wrong ones; serve this index with --backend"):
        require_consecutive(spread.spec)


def test_text_with_the_engines_placeholder_is_refused(soft: CompressedRAG) -> None:
    for text in ("say <prompt_embeds> now", Text("<prompt_embeds>"), Text("<prompt_embeds>", trusted=True)):
        with pytest.raises(InputError, match="'<prompt_embeds>', which vLLM reserves"):
            prompt_embeds(["a", text], soft.backbone)


def test_text_names_no_control_token_there_either(soft: CompressedRAG) -> None:
    """The template's own rows differ from those of text that spells them."""
    typed, _ = prompt_embeds(["<|end|>"], soft.backbone)
    meant, _ = prompt_embeds([Text("<|end|>", trusted=True)], soft.backbone)
    assert len(meant) == 1
    assert len(typed) > 1


# -- the wire


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_wire_form_is_read_with_weights_only_and_holds_nothing_else(dtype: torch.dtype) -> None:
    rows = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    wire = wire_form(rows[3:7])
    read = torch.load(io.BytesIO(base64.b64decode(wire, validate=True)), weights_only=True)
    assert torch.equal(read, rows[3:7])
    assert (read.dtype, len(wire) < 4000) == (dtype, True)  # four rows, not the thousand they were cut from


def test_settings_in_vllms_names() -> None:
    settings = GenerationSettings(30, temperature=0.5, top_p=0.9, stop=("x",), seed=3)
    assert sampling(settings, {5, 2}, room=20) == {
        "max_tokens": 20, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "stop_token_ids": [2, 5],
        "ignore_eos": True}
    with pytest.raises(UnsupportedModelError, match="vLLM does not hold answers to what their sources say"):
        sampling(GenerationSettings(quote_from=("a text",)), {5}, room=20)


# -- our server in front of one


def stand_in(decoder: FrozenDecoder) -> FastAPI:
    """Answers as vLLM's server does, as far as it is asked here."""
    app = FastAPI()
    app.state.seen, app.state.left = [], threading.Event()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "theirs"}]}

    @app.get("/health")
    def health() -> None:
        pass

    async def completions(request: Request) -> Any:
        body = await request.json()
        app.state.seen.append(body)
        rows = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        if len(rows) > 300:
            return JSONResponse({"error": {"message": "too long for this engine"}}, 400)
        made = decoder.generate([Delimiter(rows)], GenerationSettings(body["max_tokens"], stop=tuple(body["stop"])))
        ids = [*made.token_ids, *([body["stop_token_ids"][0]] * (made.completion_tokens - len(made.token_ids)))]

        async def events() -> AsyncIterator[str]:
            if "hang" in body["stop"]:
                try:
                    yield 'data: {"choices": [{"index": 0, "text": "so", "finish_reason": null}]}\n\n'
                    await asyncio.sleep(PATIENCE)
                finally:
                    app.state.left.set()
            for text, own, reason in ((made.text[:3], ids[:1], None), (made.text[3:], ids[1:], made.finish_reason)):
                choice = {"index": 0, "text": text, "token_ids": own, "finish_reason": reason}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events())

    app.add_api_route("/v1/completions", completions, methods=["POST"])
    return app


@pytest.fixture(scope="module")
def engine() -> FastAPI:
    return stand_in(FrozenDecoder(load_frozen()))


@pytest.fixture
def served(soft: CompressedRAG, engine: FastAPI) -> Iterator[Served]:
    with running(engine) as (url, _):
        backend = VLLMBackend(soft.decoder, url, limits=RequestLimits(400, 50))
        with serving(soft, backend=backend, canonical_order=True) as made:
            yield made


def ask(served: Served, question: str, **options: Any) -> Any:
    return served.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], **{"max_tokens": 16, **options})


def canonical(rag: CompressedRAG, question: str) -> Any:
    return sorted(rag.retrieve(question), key=lambda s: (s.chunk.document_id, s.chunk.start, s.chunk.id))


def test_answers_are_ours_and_our_decoder_runs_no_layer(soft: CompressedRAG, served: Served) -> None:
    expected = [soft.decoder.generate(soft.prompt(q, canonical(soft, q)), SETTINGS) for q in QUESTIONS[:4]]
    gate = Gate(soft.backbone)
    for question, made in zip(QUESTIONS, expected, strict=False):
        got = ask(served, question)
        assert got.choices[0].message.content == made.text.strip()
        assert got.choices[0].finish_reason == made.finish_reason
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (made.usage.positions, made.completion_tokens)
        events = list(ask(served, question, stream=True))
        assert "".join(e.choices[0].delta.content or "" for e in events) == made.text.strip()
    gate.remove()
    assert gate.passes == []


def test_the_same_spans_are_the_same_prefix_whatever_is_asked(soft: CompressedRAG, served: Served, engine: FastAPI
                                                              ) -> None:
    """In canonical order; by score the order may change with the question."""
    ids = [s.chunk.document_id for s in soft.retrieve(QUESTIONS[0])]
    where = {"document_id": ids}
    rows = []
    for question in QUESTIONS[:6]:
        ask(served, question, extra_body={"where": where}, max_tokens=1)
        rows.append(torch.load(io.BytesIO(base64.b64decode(engine.state.seen[-1]["prompt_embeds"])), weights_only=True))
    sources = canonical(soft, QUESTIONS[0])
    before_question, _ = prompt_embeds(soft.prompt("Who?", sources)[:-2], soft.backbone)
    assert len(before_question) > sum(s.span.num_slots for s in sources)
    assert all(torch.equal(r[: len(before_question)], before_question) for r in rows)
    by_score = {tuple(s.chunk.id for s in soft.retrieve(q, where=where)) for q in QUESTIONS[:6]}
    assert len(by_score) > 1


def test_limits_and_refusals_reach_the_caller(served: Served) -> None:
    for options, message in (({"max_tokens": 51}, "the limit is 50"),
                             ({"question": "y " * 500}, "positions"),
                             ({"question": "<prompt_embeds>"}, "which vLLM reserves"),
                             ({"question": "y" * 280, "max_tokens": 1}, "too long for this engine")):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(served, **{"question": "Who?", **options})


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_goes_away_ends_the_engines_request(served: Served, engine: FastAPI, stream: bool) -> None:
    engine.state.left.clear()
    caller = served.call(max_tokens=8, stop="hang", stream=stream)
    assert eventually(lambda: served.backend.decoding == 1)
    if stream:
        while b"so" not in caller.recv(4096):
            pass
    caller.close()
    assert engine.state.left.wait(PATIENCE / 2)
    assert eventually(lambda: served.backend.decoding == 0)


def test_an_engine_that_is_not_there_is_no_error_of_the_caller(soft: CompressedRAG) -> None:
    with serving(soft, backend=VLLMBackend(soft.decoder, "http://127.0.0.1:9")) as served:
        with pytest.raises(openai.InternalServerError, match="vLLM server cannot be reached") as error:
            ask(served, "Who?")
        assert error.value.status_code == 503
        with pytest.raises(openai.InternalServerError):
            served.client().get("/../health/ready", cast_to=object)
