"""The server, asked by the real openai client: the answers of `CompressedRAG`, to whoever has a right to them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from ctxcomp_rag import CompressedRAG, GenerationSettings, SpanReferences, with_references
from ctxcomp_rag.chat import ChatTurn
from ctxcomp_rag.decoding import FrozenDecoder, Message
from ctxcomp_rag.decoding.generation import RequestLimits
from ctxcomp_rag.serving.gate import GateLimits
from tests.serving.served import MODEL, PATIENCE, Served, serving

QUESTION = "When does the ferry to Osk sail again?"
QUESTIONS = [QUESTION, "How high is the lighthouse?", "What does the market of Brel sell?", "Who are you?"]


@pytest.fixture
def client(served: Served) -> OpenAI:
    return served.client()


def ask(client: OpenAI, content: Any = QUESTION, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}], **options)


def streamed(client: OpenAI, **options: Any) -> list[Any]:
    return list(ask(client, stream=True, stream_options={"include_usage": True}, **options))


def text_of(events: list[Any]) -> str:
    return "".join(e.choices[0].delta.content or "" for e in events if e.choices)


# -- the right answers


@pytest.mark.parametrize("settings", [
    {"max_tokens": 12},
    {"max_completion_tokens": 5},
    {"max_tokens": 12, "temperature": 1.3, "top_p": 0.9, "seed": 7},
])
def test_an_answer_is_that_of_compressed_rag_whole_and_streamed(rag: CompressedRAG, client: OpenAI,
                                                                settings: dict[str, Any]) -> None:
    generation = GenerationSettings(settings.get("max_tokens") or settings["max_completion_tokens"],
                                    settings.get("temperature", 0.0), settings.get("top_p", 1.0), (),
                                    settings.get("seed", 0))
    for question in QUESTIONS:
        expected = rag.answer(question, settings=generation)
        got = ask(client, question, **settings)
        assert got.choices[0].message.content == expected.text
        assert got.choices[0].finish_reason == expected.finish_reason
        assert got.usage.completion_tokens == expected.completion_tokens
        events = streamed(client, **settings) if question == QUESTION else []
        if events:
            assert text_of(events) == expected.text
            assert events[-1].usage == got.usage
            assert [e.choices[0].finish_reason for e in events[:-1]] == [None] * (len(events) - 2) + [
                expected.finish_reason]


def test_usage_counts_positions_slots_and_what_they_stand_for(rag: CompressedRAG, client: OpenAI) -> None:
    usage, expected = ask(client, max_tokens=4).usage, rag.answer(QUESTION, settings=GenerationSettings(4)).usage
    assert usage.prompt_tokens == expected.positions
    assert usage.total_tokens == expected.positions + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == expected.cached == expected.slots
    assert usage.ctxcomp == expected.__dict__


def test_sources_are_those_that_were_retrieved(rag: CompressedRAG, client: OpenAI) -> None:
    got = ask(client, max_tokens=1, extra_body={"top_k": 2})
    assert [s["id"] for s in got.sources] == [s.chunk.id for s in rag.retrieve(QUESTION, top_k=2)]
    only = ask(client, max_tokens=1, extra_body={"where": {"document_id": "brel"}})
    assert [s["document_id"] for s in only.sources] == ["brel"]


@pytest.mark.parametrize("mode", ["text", "truncated", "none"])
def test_other_modes_are_those_of_compressed_rag(rag: CompressedRAG, client: OpenAI, mode: Any) -> None:
    expected = rag.answer(QUESTION, mode=mode, settings=GenerationSettings(8))
    got = ask(client, max_tokens=8, extra_body={"mode": mode})
    assert (got.choices[0].message.content, got.usage.prompt_tokens) == (expected.text, expected.usage.positions)


def test_a_conversation_is_read_before_the_question_and_its_spans(rag: CompressedRAG, client: OpenAI) -> None:
    said = [("system", "Answer in one word."), ("user", "Where is Varn?"), ("assistant", "By the sea.")]
    sources = rag.retrieve(QUESTION)
    parts = rag.prompt(QUESTION, sources, history=[Message(role, (text,)) for role, text in said])
    expected = rag.decoder.generate(parts, GenerationSettings(10))
    got = client.chat.completions.create(
        model=MODEL, max_tokens=10,
        messages=[*({"role": r, "content": t} for r, t in said), {"role": "user", "content": QUESTION}])  # type: ignore[misc,list-item]
    assert got.choices[0].message.content == expected.text.strip()
    assert got.usage is not None
    assert got.usage.prompt_tokens == expected.usage.positions


def test_it_stops_at_a_stop_string(rag: CompressedRAG, client: OpenAI) -> None:
    whole = rag.answer(QUESTION, settings=GenerationSettings(24)).text
    stop = whole[6:8]
    expected = rag.answer(QUESTION, settings=GenerationSettings(24, stop=(stop,)))
    for asked in (stop, [stop, "never said"]):
        got = ask(client, max_tokens=24, stop=asked)
        assert (got.choices[0].message.content, got.choices[0].finish_reason) == (expected.text, "stop")
        assert text_of(streamed(client, max_tokens=24, stop=asked)) == expected.text


def test_many_callers_at_once_get_each_their_own_answer(rag: CompressedRAG, client: OpenAI) -> None:
    asked = [f"{QUESTIONS[n % 4]} {'x' * n}" for n in range(16)]
    expected = [rag.answer(q, settings=GenerationSettings(10)).text for q in asked]
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda q: ask(client, q, max_tokens=10).choices[0].message.content, asked))
    assert got == expected


# -- references


def retrieved(client: OpenAI, **body: Any) -> list[dict[str, Any]]:
    answer: Any = client.post("/retrieve", body={"query": QUESTION, **body}, cast_to=object)
    return list(answer["data"])


def test_retrieve_returns_text_score_and_a_reference_for_each_chunk(rag: CompressedRAG, client: OpenAI) -> None:
    expected = rag.retrieve(QUESTION, top_k=2)
    got = retrieved(client, top_k=2)
    assert [(g["id"], g["text"], g["num_slots"]) for g in got] == [
        (s.chunk.id, s.chunk.text, s.span.num_slots) for s in expected]
    assert [g["score"] for g in got] == pytest.approx([s.score for s in expected], abs=1e-6)
    assert all(with_references(g["reference"]) != (g["reference"],) for g in got)


def test_messages_that_refer_to_spans_are_answered_from_them(rag: CompressedRAG, client: OpenAI) -> None:
    """As parts and as text; nothing else is retrieved. The prompt is that of retrieval inside, so is the answer."""
    expected = rag.answer(QUESTION, settings=GenerationSettings(12))
    found = retrieved(client)
    parts: list[dict[str, Any]] = []
    for chunk in found:
        parts += [{"type": "span", "ref": chunk["reference"], "text": chunk["text"]}, {"type": "text", "text": "\n\n"}]
    as_parts = [*parts[:-1], {"type": "text", "text": f"\n\nQuestion: {QUESTION}"}]
    as_text = "\n\n".join(chunk["reference"] for chunk in found) + f"\n\nQuestion: {QUESTION}"
    for content in (as_parts, as_text):
        got = ask(client, content, max_tokens=12)
        assert got.choices[0].message.content == expected.text
        assert (got.usage.prompt_tokens, got.sources) == (expected.usage.positions, [])


def refused(client: OpenAI, content: Any) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, content)
    assert error.value.code == "invalid_reference"
    return error.value


def test_a_forged_reference_is_refused_and_counted(served: Served, client: OpenAI) -> None:
    before = served.metric('ctxcomp_references_refused_total{reason="unknown"}')
    forged = SpanReferences().mint("0" * 32, "tenant:acme")
    for content in ([{"type": "span", "ref": forged}], f"{forged} What is this?"):
        assert "forged" in refused(client, content).message
    assert served.metric('ctxcomp_references_refused_total{reason="unknown"}') == before + 2


def test_a_reference_is_good_for_the_tenant_it_was_minted_for_only(served: Served) -> None:
    reference = retrieved(served.client("other"))[0]["reference"]
    content = [{"type": "span", "ref": reference}, {"type": "text", "text": "?"}]
    assert ask(served.client("other"), content, max_tokens=1).usage.ctxcomp["slots"] > 0
    assert "another scope" in refused(served.client("acme"), content).message


def test_what_was_said_before_refers_to_nothing(served: Served, client: OpenAI) -> None:
    reference = retrieved(client)[0]["reference"]
    said = [{"role": "user", "content": reference}, {"role": "assistant", "content": reference}]
    got = client.chat.completions.create(model=MODEL, max_tokens=1,
                                         messages=[*said, {"role": "user", "content": QUESTION}])  # type: ignore[list-item]
    assert len(got.sources) == 3  # type: ignore[attr-defined]  # it was retrieved for
    with pytest.raises(openai.BadRequestError, match="got one in an answer"):
        client.chat.completions.create(model=MODEL, messages=[
            {"role": "assistant", "content": [{"type": "span", "ref": reference}]},  # type: ignore[list-item]
            {"role": "user", "content": "?"}])


def test_a_prompt_of_references_is_the_chats_prompt(served: Served, client: OpenAI) -> None:
    found = retrieved(client, top_k=1)[0]
    turns = [ChatTurn("system", ("Be brief.",)), ChatTurn("user", with_references(f"{found['reference']} What?"))]
    parts = served.service.chat.prompt(turns, "tenant:acme").parts
    expected = FrozenDecoder(served.service.rag.backbone).generate(parts, GenerationSettings(8))
    got = client.chat.completions.create(model=MODEL, max_tokens=8, messages=[
        {"role": "developer", "content": "Be brief."}, {"role": "user", "content": f"{found['reference']} What?"}])
    assert got.choices[0].message.content == expected.text.strip()


# -- who may call, and how much


@pytest.mark.parametrize("key", ["wrong", "ctx-", "ctx-" + "A" * 43])
def test_a_wrong_key_is_refused(served: Served, key: str) -> None:
    for call in (lambda c: ask(c), lambda c: c.models.list(), retrieved):
        with pytest.raises(openai.AuthenticationError) as error:
            call(served.client(key))
        assert error.value.code == "invalid_api_key"


def test_no_key_is_refused_before_the_body_is_read(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=b"{not json")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize(("options", "param", "message"), [
    ({"n": 2}, "n", "n=2 is not supported; leave n out"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "is not supported"),
    ({"logprobs": True}, "logprobs", "is not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty", "is not supported"),
    ({"extra_body": {"beam_width": 4}}, "beam_width", "Extra inputs are not permitted"),
    ({"extra_body": {"top_k": 0}}, "top_k", "greater than or equal to 1"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4 stop strings, got 5"),
    ({"extra_body": {"where": {"document_id": {"a": 1}}}}, None, ""),
])
def test_what_cannot_be_done_is_refused_in_openais_form(client: OpenAI, options: dict[str, Any], param: str | None,
                                                        message: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, **options)
    assert error.value.type == "invalid_request_error"
    assert error.value.param == param
    assert message in error.value.message


def test_what_changes_nothing_is_taken(client: OpenAI) -> None:
    ask(client, max_tokens=1, n=1, presence_penalty=0, user="somebody", logprobs=False, tool_choice="none")


@pytest.mark.parametrize("messages", [
    [], [{"role": "tool", "content": "x"}], [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    [{"role": "assistant", "content": "x"}], [{"role": "user", "content": " "}],
])
def test_messages_that_ask_nothing_are_refused(client: OpenAI, messages: Any) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=messages)


def test_another_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=f"expected '{MODEL}'") as error:
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "?"}])
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_the_model_is_listed(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_too_much_is_refused(rag: CompressedRAG) -> None:
    """Bytes, messages, positions and tokens; what is just within the limits is answered."""
    gate, limits = GateLimits(max_body_bytes=4000, max_messages=3), RequestLimits(200, 20)
    with serving(rag, gate=gate, limits=limits) as served:
        client = served.client()
        for body in (b"x" * 4001, iter([b"x" * 2000, b"x" * 2001])):  # with and without a declared length
            sent = httpx.post(f"{served.url}/v1/retrieve", content=body,
                              headers={"Authorization": f"Bearer {served.keys['acme']}",
                                       "Content-Type": "application/json"})
            assert (sent.status_code, sent.json()["error"]["code"]) == (413, "request_too_large")
        with pytest.raises(openai.BadRequestError, match="at most 3 messages, got 4"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "?"}] * 4)
        for options in ({"max_tokens": 21}, {"extra_body": {"mode": "none"}, "content": "y" * 300}):
            with pytest.raises(openai.BadRequestError) as error:
                ask(client, **options)
            assert error.value.code == "context_length_exceeded"
        assert ask(client, max_tokens=20, extra_body={"mode": "none"}).usage.completion_tokens <= 20


def test_a_prompt_beyond_the_window_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="was made for 512") as error:
        ask(client, "x" * 600)
    assert error.value.code == "context_length_exceeded"


# -- health and metrics


def test_health_needs_no_key(served: Served) -> None:
    for path in ("/health", "/health/ready", "/health/live"):
        assert httpx.get(f"{served.url}{path}", timeout=PATIENCE).status_code == 200


def test_metrics_count_requests_tokens_and_slots(served: Served, client: OpenAI) -> None:
    names = ['ctxcomp_requests_total{path="/v1/chat/completions",status="200"}',
             'ctxcomp_requests_total{path="/v1/chat/completions",status="400"}',
             'ctxcomp_prompt_positions_total{kind="text"}', 'ctxcomp_prompt_positions_total{kind="slot"}',
             "ctxcomp_source_tokens_total", "ctxcomp_completion_tokens_total", "ctxcomp_first_piece_seconds_count",
             'ctxcomp_request_seconds_count{path="/v1/chat/completions"}']
    before = [served.metric(name) for name in names]
    usage = ask(client, max_tokens=6).usage
    with pytest.raises(openai.BadRequestError):
        ask(client, n=3)
    streamed(client, max_tokens=6)
    once = usage.ctxcomp
    assert [served.metric(name) - b for name, b in zip(names, before, strict=True)] == [
        2, 1, 2 * once["text_tokens"], 2 * once["slots"], 2 * once["source_tokens"], 2 * usage.completion_tokens, 2, 3]
    assert served.metric("ctxcomp_requests_waiting") == 0
    text = httpx.get(f"{served.url}/metrics").text
    assert "# TYPE ctxcomp_request_seconds histogram" in text
    assert "acme" not in text
