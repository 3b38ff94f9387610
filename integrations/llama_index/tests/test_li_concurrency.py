"""Many requests, one decoder: right answers, a free event loop, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
from li_setup import QUESTIONS, Setup
from llama_index.core.llms import ChatMessage

from ctxcomp_rag import Ticket
from llama_index_ctxcomp import SpanSynthesizer

MANY = 32


@pytest.fixture(scope="module")
def expected(setup: Setup) -> dict[str, str]:
    return {question: setup.answer(question) for question in QUESTIONS}


async def requests_left() -> int:
    """Requests that anybody still holds, once scheduler, event loop and garbage collector have had time."""
    for _ in range(20):
        await asyncio.sleep(0.3)
        gc.collect()
        left = sum(type(o) is Ticket for o in gc.get_objects())
        if not left:
            break
    return left


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
