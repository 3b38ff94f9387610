"""32 requests at once through the chat model: each gets its own answer, who gives up leaves, and nothing is left."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.prompt_values import PromptValue
from lc_setup import PROMPT, QUESTIONS, Setup, about

from langchain_ctxcomp import SpanPrompt
from tests.leaks import requests_left

MANY = 32


@pytest.fixture(scope="module")
def requests(setup: Setup) -> list[PromptValue]:
    """Other documents, and as many of them, other questions: no two alike."""
    made = []
    for i in range(MANY):
        question = QUESTIONS[i % len(QUESTIONS)]
        found = setup.store.as_retriever(search_kwargs={"k": 1 + i % 3}).invoke(question)
        made.append(SpanPrompt(PROMPT).invoke({"context": found, "question": f"{question} ({i})"}))
    return made


@pytest.fixture(scope="module")
def alone(setup: Setup, requests: list[PromptValue]) -> list[str]:
    """The answers of one request at a time."""
    return [str(setup.model().invoke(r).content) for r in requests]


async def test_thirty_two_threads_get_the_answers_of_one_at_a_time(setup: Setup, requests: list[PromptValue],
                                                                   alone: list[str]) -> None:
    model = setup.model()
    with ThreadPoolExecutor(MANY) as pool:
        said = list(pool.map(model.invoke, requests))
    assert [m.content for m in said] == alone
    assert [about(m)["spans"] for m in said] == [1 + i % 3 for i in range(MANY)]
    assert len(set(alone)) > 8
    del said
    assert await requests_left() == 0


async def test_thirty_two_streaming_threads_get_the_answers_of_one_at_a_time(
        setup: Setup, requests: list[PromptValue], alone: list[str]) -> None:
    model = setup.model()
    with ThreadPoolExecutor(MANY) as pool:
        said = list(pool.map(lambda r: "".join(str(c.content) for c in model.stream(r)), requests))
    assert said == alone
    assert await requests_left() == 0


async def test_thirty_two_tasks_get_the_answers_of_one_at_a_time(setup: Setup, requests: list[PromptValue],
                                                                 alone: list[str]) -> None:
    model = setup.model()
    said = await asyncio.gather(*(model.ainvoke(r) for r in requests))
    assert [m.content for m in said] == alone
    del said
    assert await requests_left() == 0


async def test_thirty_two_streaming_tasks_get_the_answers_of_one_at_a_time(
        setup: Setup, requests: list[PromptValue], alone: list[str]) -> None:
    model = setup.model()

    async def read(request: PromptValue) -> str:
        return "".join([str(chunk.content) async for chunk in model.astream(request)])

    assert await asyncio.gather(*(read(r) for r in requests)) == alone
    assert await requests_left() == 0


async def test_those_who_give_up_leave_and_the_others_are_answered(setup: Setup, requests: list[PromptValue],
                                                                   alone: list[str]) -> None:
    long, model = setup.model(max_tokens=1500, temperature=50.0), setup.model()
    given_up = [asyncio.create_task(long.ainvoke(r)) for r in requests[:12]]  # more than decode together
    closed = long.stream(requests[12])
    next(closed)
    aclosed = long.astream(requests[13])
    await anext(aclosed)
    waiting = [asyncio.create_task(model.ainvoke(r)) for r in requests]
    await asyncio.sleep(0.1)
    for task in given_up:
        task.cancel()
    closed.close()  # type: ignore[attr-defined]
    await aclosed.aclose()  # type: ignore[attr-defined]
    assert [m.content for m in await asyncio.gather(*waiting)] == alone
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*given_up, return_exceptions=True))
    del task, given_up, waiting, closed, aclosed
    assert await requests_left() == 0


def test_a_batch_decodes_together_and_keeps_its_order(setup: Setup, requests: list[PromptValue], alone: list[str]
                                                      ) -> None:
    assert [m.content for m in setup.model().batch(list(requests))] == alone
    failing = setup.model().batch([requests[0], "", requests[1]], return_exceptions=True)
    assert [m.content for m in (failing[0], failing[2])] == alone[:2]
    assert isinstance(failing[1], ValueError)
