"""Many requests, one decoder: right answers, a free event loop, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
from li_setup import QUESTIONS, Setup
from llama_index.core.llms import ChatMessage, TextBlock

from ctxcomp_rag import Ticket
from llama_index_ctxcomp import SpanBlock, SpanNode, SpanSynthesizer
from tests.leaks import requests_left

MANY = 32


@pytest.fixture(scope="module")
def expected(setup: Setup) -> dict[str, str]:
    return {question: setup.answer(question) for question in QUESTIONS}


async def test_threads_get_their_own_answers(setup: Setup, expected: dict[str, str]) -> None:
    engine = setup.store_index().as_query_engine(llm=setup.llm(), similarity_top_k=3,
                                                 node_postprocessors=[setup.postprocessor()],
                                                 response_synthesizer=setup.synthesizer())
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(MANY)]
    with ThreadPoolExecutor(MANY) as pool:
        answers = [r.response for r in pool.map(engine.query, questions)]
    assert answers == [expected[q] for q in questions]
    assert await requests_left() == 0


async def test_tasks_get_their_own_answers_and_the_loop_stays_free(setup: Setup, expected: dict[str, str]) -> None:
    nodes = {q: setup.postprocessor().postprocess_nodes(setup.retrieved(q)) for q in QUESTIONS}
    synthesizer = setup.synthesizer()
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(MANY)]
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticker = asyncio.create_task(tick())
    answers = await asyncio.gather(*(synthesizer.asynthesize(q, nodes[q]) for q in questions))
    ticker.cancel()
    assert [a.response for a in answers] == [expected[q] for q in questions]  # type: ignore[union-attr]
    assert ticks > MANY


@pytest.fixture(scope="module")
def messages(setup: Setup) -> list[list[ChatMessage]]:
    """Requests to the model itself: other spans, and as many of them, other questions."""
    made = []
    for i in range(MANY):
        question = QUESTIONS[i % len(QUESTIONS)]
        found = setup.postprocessor().postprocess_nodes(setup.retrieved(question, top_k=1 + i % 3))
        spans = [SpanBlock(n.node.minted) for n in found if isinstance(n.node, SpanNode)]
        made.append([ChatMessage(role="user", blocks=[*spans, TextBlock(text=f" Question: {question} ({i})")])])
    return made


@pytest.fixture(scope="module")
def alone(setup: Setup, messages: list[list[ChatMessage]]) -> list[str | None]:
    """The answers of one request at a time."""
    return [setup.llm().chat(m).message.content for m in messages]


async def test_thirty_two_threads_at_the_model_get_the_answers_of_one_at_a_time(
        setup: Setup, messages: list[list[ChatMessage]], alone: list[str | None]) -> None:
    llm = setup.llm()
    with ThreadPoolExecutor(MANY) as pool:
        assert [r.message.content for r in pool.map(llm.chat, messages)] == alone
        streamed = list(pool.map(lambda m: "".join(r.delta or "" for r in llm.stream_chat(m)), messages))
    assert streamed == alone
    assert len(set(alone)) > 6
    assert await requests_left() == 0


async def test_thirty_two_tasks_at_the_model_get_the_answers_of_one_at_a_time(
        setup: Setup, messages: list[list[ChatMessage]], alone: list[str | None]) -> None:
    llm = setup.llm()
    said = await asyncio.gather(*(llm.achat(m) for m in messages))
    assert [r.message.content for r in said] == alone
    assert [r.raw["ctxcomp"]["spans"] for r in said] == [1 + i % 3 for i in range(MANY)]
    del said

    async def read(request: list[ChatMessage]) -> str:
        return "".join([r.delta or "" async for r in await llm.astream_chat(request)])

    assert await asyncio.gather(*(read(m) for m in messages)) == alone
    assert await requests_left() == 0


async def test_those_who_give_up_leave_and_the_others_are_answered(
        setup: Setup, messages: list[list[ChatMessage]], alone: list[str | None]) -> None:
    llm = setup.llm()
    given_up = [asyncio.create_task(llm.achat(m, max_tokens=1500, temperature=50.0)) for m in messages[:12]]
    waiting = [asyncio.create_task(llm.achat(m)) for m in messages]
    await asyncio.sleep(0.1)
    for task in given_up:
        task.cancel()
    assert [r.message.content for r in await asyncio.gather(*waiting)] == alone
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*given_up, return_exceptions=True))
    del task, given_up, waiting
    assert await requests_left() == 0


async def test_a_cancelled_task_and_a_closed_stream_leave_the_decoder(setup: Setup) -> None:
    llm = setup.llm()
    message = [ChatMessage(role="user", content="Tell me a long story about lighthouses.")]
    task = asyncio.create_task(llm.achat(message, max_tokens=1500, temperature=50.0))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream = await llm.astream_chat(message, max_tokens=1500, temperature=50.0)
    assert (await anext(stream)).delta is not None
    await stream.aclose()
    threaded = llm.stream_chat(message, max_tokens=1500, temperature=50.0)
    assert next(threaded).delta is not None
    threaded.close()
    del task, stream, threaded
    assert await requests_left() == 0


def test_a_stream_that_nobody_reads_costs_no_decoding(setup: Setup) -> None:
    nodes = setup.postprocessor().postprocess_nodes(setup.retrieved(QUESTIONS[0]))
    response = SpanSynthesizer(setup.llm(), streaming=True).synthesize(QUESTIONS[0], nodes)
    assert not any(type(o) is Ticket for o in gc.get_objects())
    del response
