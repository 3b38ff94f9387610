"""Continuous batching: every caller gets the answer of a decoder of its own, and nobody waits for nothing."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding import (
    FrozenDecoder,
    GenerationSettings,
    Part,
    RequestLimits,
    RequestScheduler,
    Ticket,
    TokenIds,
)
from ctxcomp_rag.decoding.batching import merge, prefill
from ctxcomp_rag.decoding.loop import DecodingLoop
from ctxcomp_rag.errors import InputError, PromptTooLongError, SchedulerFullError
from ctxcomp_rag.spans import KVSpan, SoftSpan
from tests.gate import PATIENCE, Gate, eventually
from tests.tiny_models import tiny_backbone, tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture
def decoder() -> FrozenDecoder:
    made = FrozenDecoder(tiny_backbone("llama"))
    made.end_ids = frozenset({-1})  # answers are as long as they may be
    return made


@pytest.fixture
def scheduler(decoder: FrozenDecoder) -> Iterator[RequestScheduler]:
    with RequestScheduler(decoder, max_batch=4) as made:
        yield made


@pytest.fixture
def gate(decoder: FrozenDecoder, scheduler: RequestScheduler) -> Iterator[Gate]:
    made = Gate(decoder.backbone)
    yield made
    made.remove()


def ids(seed: int, length: int) -> TokenIds:
    return TokenIds(tuple(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()))


def kv_span(backbone: Backbone, seed: int, length: int) -> KVSpan:
    cache = DynamicCache(config=backbone.model.config)
    with torch.inference_mode():
        backbone.model(torch.tensor([ids(seed, length).ids]), past_key_values=cache)
    keys, values = (torch.stack([getattr(layer, n)[0] for layer in cache.layers]) for n in ("keys", "values"))
    return KVSpan(f"kv{seed}", length, torch.arange(length), length, keys, values)


def soft_span(backbone: Backbone, seed: int, length: int) -> SoftSpan:
    return SoftSpan(f"soft{seed}", 2 * length, torch.arange(length) * 2, 2 * length,
                    backbone.embed(torch.tensor(ids(seed, length).ids)))


def mixed_prompt(backbone: Backbone, number: int) -> list[Part]:
    """Text, text around soft spans, text around KV spans, in turn."""
    middle: list[list[Part]] = [[], [soft_span(backbone, number, 3 + number % 4)],
                                [kv_span(backbone, number, 4 + number % 5)]]
    return [ids(number, 2 + number % 7), *middle[number % 3], ids(100 + number, 3)]


def settings(number: int) -> GenerationSettings:
    """Greedy and sampled, short and long, in turn."""
    return GenerationSettings(3 + 5 * (number % 4), temperature=float(number % 2), top_p=0.9, seed=number)


def decoder_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "ctxcomp-decoder"]


@pytest.fixture(autouse=True)
def _no_thread_of_another_test() -> None:
    assert eventually(lambda: decoder_threads() == [])


# -- the right answers


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_answers_of_many_callers_are_those_of_one_at_a_time(decoder: FrozenDecoder, max_batch: int) -> None:
    """Text, soft spans and KV spans, greedy and sampled, of different lengths, in one batch."""
    prompts = [mixed_prompt(decoder.backbone, n) for n in range(12)]
    expected = [decoder.generate(p, settings(n)) for n, p in enumerate(prompts)]
    with RequestScheduler(decoder, max_batch=max_batch) as scheduler, ThreadPoolExecutor(12) as pool:
        got = list(pool.map(lambda n: scheduler.submit(prompts[n], settings(n)).result(PATIENCE), range(12)))
    assert got == expected
    assert len({g.token_ids for g in got}) == 12


def test_streamed_pieces_are_those_of_the_decoder(decoder: FrozenDecoder, scheduler: RequestScheduler) -> None:
    prompts = [mixed_prompt(decoder.backbone, n) for n in range(6)]
    expected = [list(decoder.stream(p, settings(n))) for n, p in enumerate(prompts)]
    tickets = [scheduler.submit(p, settings(n)) for n, p in enumerate(prompts)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda t: list(t.pieces()), tickets)) == expected
    assert list(tickets[0].pieces()) == expected[0]  # once more, when all is over
    assert ["".join(pieces) for pieces in expected] == [t.result().text for t in tickets]


def test_an_event_loop_awaits_and_streams_many_at_once(decoder: FrozenDecoder, scheduler: RequestScheduler) -> None:
    prompts = [mixed_prompt(decoder.backbone, n) for n in range(8)]
    expected = [decoder.generate(p, settings(n)) for n, p in enumerate(prompts)]

    async def streamed(number: int) -> str:
        return "".join([piece async for piece in scheduler.submit(prompts[number], settings(number)).apieces()])

    async def main() -> tuple[list[Any], list[str]]:
        whole = asyncio.gather(*(scheduler.submit(p, settings(n)).aresult() for n, p in enumerate(prompts)))
        return await whole, await asyncio.gather(*map(streamed, range(8)))

    whole, pieces = asyncio.run(main())
    assert whole == expected
    assert pieces == [e.text for e in expected]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "window-mistral"])
def test_rows_of_a_sliding_window_start_together_and_answer_right(name: str) -> None:
    """Their cache cannot be padded afterwards; prompts and answers here reach over the window of 16."""
    backbone = tiny_backbone(name) if name != "window-mistral" else Backbone(
        tiny_model(tiny_config("mistral", sliding_window=16)), tiny_tokenizer(), model_id=name)
    decoder = FrozenDecoder(backbone)
    decoder.end_ids = frozenset({-1})
    prompts: list[list[Part]] = [[ids(n, 3 + 9 * (n % 3)), soft_span(backbone, n, 3), ids(n, 2)] for n in range(7)]
    expected = [decoder.generate(p, settings(n)) for n, p in enumerate(prompts)]
    gate = Gate(backbone)
    try:
        with RequestScheduler(decoder, max_batch=3) as scheduler:
            gate.hold()
            tickets = [scheduler.submit(p, settings(n)) for n, p in enumerate(prompts)]
            gate.open.set()
            assert [t.result(PATIENCE) for t in tickets] == expected
    finally:
        gate.remove()
    prefills = [number for number, (_, length) in enumerate(gate.passes) if length > 1]
    between = [gate.passes[a + 1 : b] for a, b in zip(prefills, [*prefills[1:], len(gate.passes)], strict=True)]
    assert all(rows <= started for a, steps in zip(prefills, between, strict=True)
               for rows, _ in steps for started in [gate.passes[a][0]])  # nobody joined on the way


# -- joining, leaving, order


def test_a_late_request_joins_between_steps_and_ends_before_a_long_one(scheduler: RequestScheduler, gate: Gate) -> None:
    gate.hold(after=11)
    long = scheduler.submit([ids(1, 5)], GenerationSettings(60))
    gate.held()
    late = scheduler.submit([ids(2, 4)], GenerationSettings(3))
    gate.open.set()
    late.result(PATIENCE)
    long.result(PATIENCE)
    # a prefill and eleven steps; the late one's prefill, two steps for its three tokens; the long one again
    assert gate.passes == [(1, 5), *[(1, 1)] * 11, (1, 4), (2, 1), (2, 1), *[(1, 1)] * 46]


def test_with_one_row_requests_are_served_in_the_order_they_came(decoder: FrozenDecoder) -> None:
    gate = Gate(decoder.backbone)
    try:
        with RequestScheduler(decoder, max_batch=1) as scheduler:
            gate.hold()
            lengths = [5, 9, 2, 7, 3, 8]
            tickets = [scheduler.submit([ids(n, n)], GenerationSettings(1 + n % 3)) for n in lengths]
            gate.open.set()
            for ticket in tickets:
                ticket.result(PATIENCE)
    finally:
        gate.remove()
    assert [length for _, length in gate.passes if length > 1] == lengths
    assert {rows for rows, _ in gate.passes} == {1}


def test_a_batch_is_never_larger_than_allowed_and_is_filled_up(scheduler: RequestScheduler, gate: Gate) -> None:
    gate.hold()
    first = scheduler.submit([ids(0, 3)], GenerationSettings(4))
    gate.held()
    tickets = [first, *(scheduler.submit([ids(n, 3)], GenerationSettings(4)) for n in range(1, 9))]
    gate.open.set()
    for ticket in tickets:
        ticket.result(PATIENCE)
    assert max(rows for rows, _ in gate.passes) == 4
    assert sum(rows for rows, length in gate.passes if length == 1) == 9 * 3


def test_a_request_of_one_token_costs_no_step(scheduler: RequestScheduler, gate: Gate) -> None:
    assert scheduler.submit([ids(1, 5)], GenerationSettings(1)).result(PATIENCE).completion_tokens == 1
    assert gate.passes == [(1, 5)]


# -- cancelling


def cancel(ticket: Ticket) -> None:
    ticket.cancel()


def close_started(ticket: Ticket) -> None:
    pieces = ticket.pieces()
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert list(pieces) == []


def close_unstarted(ticket: Ticket) -> None:
    ticket.pieces().close()  # type: ignore[attr-defined]


def drop_pieces(ticket: Ticket) -> None:
    for _ in ticket.pieces():
        break
    gc.collect()


def cancel_task(ticket: Ticket) -> None:
    async def main() -> None:
        task = asyncio.create_task(ticket.aresult())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def cancel_streaming_task(ticket: Ticket) -> None:
    async def main() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in ticket.apieces():
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def aclose_pieces(ticket: Ticket) -> None:
    async def main() -> None:
        pieces = ticket.apieces()
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]
        assert [p async for p in pieces] == []

    asyncio.run(main())


def break_off_async(ticket: Ticket) -> None:
    async def main() -> None:
        async for _ in ticket.apieces():
            break

    asyncio.run(main())
    gc.collect()


def close_the_event_loop(ticket: Ticket) -> None:
    loop = asyncio.new_event_loop()
    pieces = ticket.apieces()
    loop.run_until_complete(anext(pieces))  # type: ignore[arg-type]
    loop.close()
    kept.append(pieces)  # not dropped: what is delivered to a closed loop is what cancels


kept: list[object] = []
WAYS = [cancel, close_started, close_unstarted, drop_pieces, cancel_task, cancel_streaming_task, aclose_pieces,
        break_off_async, close_the_event_loop]


@pytest.mark.parametrize("give_up", WAYS)
def test_who_gives_up_frees_the_row_and_disturbs_nobody(decoder: FrozenDecoder, scheduler: RequestScheduler,
                                                        give_up: Callable[[Ticket], None]) -> None:
    prompts = [mixed_prompt(decoder.backbone, n) for n in range(3)]
    expected = [decoder.generate(p, GenerationSettings(40)) for p in prompts]
    gate = Gate(decoder.backbone)
    try:
        gate.hold(after=70)  # enough for a first piece, not for the whole
        beside = [scheduler.submit(p, GenerationSettings(40)) for p in prompts]
        ticket = scheduler.submit([ids(9, 4)], GenerationSettings(450))
        give_up(ticket)
        gate.open.set()
        with pytest.raises(CancelledError):
            ticket.result(PATIENCE)
        assert [other.result(PATIENCE) for other in beside] == expected
    finally:
        gate.remove()
    assert ticket.request.progress.num_generated < 100
    kept.clear()


def test_a_request_that_waits_is_cancelled_without_being_read(scheduler: RequestScheduler, gate: Gate) -> None:
    gate.hold()
    running = [scheduler.submit([ids(n, 3)], GenerationSettings(5)) for n in range(4)]
    gate.held()
    waiting = scheduler.submit([ids(9, 11)], GenerationSettings(5))
    waiting.cancel()
    gate.open.set()
    with pytest.raises(CancelledError):
        waiting.result(PATIENCE)
    for ticket in running:
        ticket.result(PATIENCE)
    assert 11 not in [length for _, length in gate.passes]


def test_every_reader_of_a_cancelled_request_is_told(scheduler: RequestScheduler, gate: Gate) -> None:
    """Also those on an event loop, when the task of only one of them was cancelled."""
    gate.hold(after=30)
    ticket = scheduler.submit([ids(1, 4)], GenerationSettings(400))
    gate.held()  # after the first pieces
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: list(ticket.pieces()))
        told = cancel_one_of_three(ticket, gate)
        with pytest.raises(CancelledError):
            reading.result(PATIENCE)
    assert told == [asyncio.CancelledError] * 3
    with pytest.raises(CancelledError):
        ticket.result(PATIENCE)


def cancel_one_of_three(ticket: Ticket, gate: Gate) -> list[type]:
    async def main() -> list[BaseException | Any]:
        tasks = [asyncio.create_task(ticket.aresult()) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        gate.open.set()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE)

    return [type(e) for e in asyncio.run(main())]


def test_cancelling_what_has_ended_changes_nothing(scheduler: RequestScheduler) -> None:
    ticket = scheduler.submit([ids(1, 4)], GenerationSettings(5))
    made = ticket.result(PATIENCE)
    ticket.cancel()
    list(ticket.pieces())
    assert ticket.result() == made
    assert asyncio.run(ticket.aresult()) == made


def test_many_that_come_and_go_at_random_leave_no_one_waiting(decoder: FrozenDecoder) -> None:
    """Every request ends, in an answer or in being cancelled, and the answers are right."""
    expected = [decoder.generate([ids(n, 3)], GenerationSettings(12)) for n in range(4)]

    def work(number: int) -> str:
        ticket = scheduler.submit([ids(number % 4, 3)], GenerationSettings(12))
        if number % 3 == 0:
            ticket.cancel()
        elif number % 3 == 1:
            close_unstarted(ticket)
        try:
            assert ticket.result(PATIENCE) == expected[number % 4]
            return "answered"
        except CancelledError:
            return "cancelled"

    with RequestScheduler(decoder, max_batch=5) as scheduler, ThreadPoolExecutor(16) as pool:
        ends = list(pool.map(work, range(120)))
    assert all(end == "answered" for end in ends[2::3])
    assert "cancelled" in ends


# -- errors


def test_a_prompt_that_cannot_be_spliced_raises_where_it_is_submitted(scheduler: RequestScheduler) -> None:
    with pytest.raises(InputError, match="must end with text"):
        scheduler.submit([])
    assert decoder_threads() == []


def test_an_error_in_one_prompt_reaches_its_caller_only(decoder: FrozenDecoder, scheduler: RequestScheduler, gate: Gate
                                                        ) -> None:
    gate.hold()
    running = scheduler.submit([ids(0, 3)], GenerationSettings(9))
    gate.held()
    lengths = (5, 13, 6)
    tickets = [scheduler.submit([ids(n, n)], GenerationSettings(9)) for n in lengths]
    gate.failure = lambda rows, length: MemoryError("no room") if length == 13 else None
    gate.open.set()
    with pytest.raises(MemoryError, match="no room"):
        tickets[1].result(PATIENCE)
    with pytest.raises(MemoryError, match="no room"):
        list(tickets[1].pieces())
    with pytest.raises(MemoryError, match="no room"):
        asyncio.run(tickets[1].aresult())
    good = [running, tickets[0], tickets[2]]
    got = [t.result(PATIENCE) for t in good]
    gate.failure = lambda rows, length: None
    assert got == [decoder.generate([ids(n, n or 3)], GenerationSettings(9)) for n in (0, 5, 6)]


def test_an_error_in_one_prompt_reaches_its_caller_only_where_rows_start_together() -> None:
    decoder = FrozenDecoder(tiny_backbone("gemma2"))
    decoder.end_ids = frozenset({-1})
    lengths = (5, 23, 19)
    expected = [decoder.generate([ids(n, n)], GenerationSettings(9)) for n in lengths]
    gate = Gate(decoder.backbone)
    try:
        with RequestScheduler(decoder, max_batch=4) as scheduler:
            gate.hold()
            first = scheduler.submit([ids(0, 3)], GenerationSettings(2))
            gate.held()
            tickets = [scheduler.submit([ids(n, n)], GenerationSettings(9)) for n in lengths]
            gate.failure = lambda rows, length: MemoryError("no room") if length == 23 else None
            gate.open.set()
            first.result(PATIENCE)
            with pytest.raises(MemoryError, match="no room"):
                tickets[1].result(PATIENCE)
            assert [tickets[0].result(PATIENCE), tickets[2].result(PATIENCE)] == [expected[0], expected[2]]
    finally:
        gate.remove()


def test_a_span_with_values_that_are_no_numbers_ends_its_own_row(decoder: FrozenDecoder, scheduler: RequestScheduler,
                                                                 gate: Gate) -> None:
    """Sampling from such logits raises, or worse, ends the process on a GPU; argmax would answer nonsense."""
    bad = soft_span(decoder.backbone, 1, 3)
    bad = SoftSpan(bad.chunk_id, 6, bad.positions, 6, torch.full_like(bad.embeds, torch.nan))
    gate.hold()
    good = scheduler.submit([ids(1, 4)], settings(3))
    gate.held()
    tickets = [scheduler.submit([bad, ids(2, 3)], settings(n)) for n in (0, 1)]
    gate.open.set()
    for ticket in tickets:
        with pytest.raises(InputError, match=r"not numbers .*a span of the prompt, or the weights"):
            ticket.result(PATIENCE)
    assert good.result(PATIENCE) == decoder.generate([ids(1, 4)], settings(3))
    for read in (decoder.generate, lambda parts: list(decoder.stream(parts))):
        with pytest.raises(InputError, match="not numbers"):
            read([bad, ids(2, 3)])


def test_after_an_error_of_a_step_the_batch_ends_and_those_who_wait_are_served(
        decoder: FrozenDecoder, scheduler: RequestScheduler, gate: Gate) -> None:
    gate.hold(after=1)  # in the first step, which then fails: the others are to join after it
    running = scheduler.submit([ids(0, 3)], GenerationSettings(9))
    gate.held()
    waiting = [scheduler.submit([ids(n, 4)], GenerationSettings(6)) for n in (1, 2)]
    failures = iter([RuntimeError("out of memory")])
    gate.failure = lambda rows, length: next(failures, None) if length == 1 else None
    gate.open.set()
    with pytest.raises(RuntimeError, match="out of memory"):
        running.result(PATIENCE)
    assert [t.result(PATIENCE) for t in waiting] == [decoder.generate([ids(n, 4)], GenerationSettings(6))
                                                      for n in (1, 2)]


def test_more_than_may_wait_are_refused_and_may_come_again(decoder: FrozenDecoder) -> None:
    gate = Gate(decoder.backbone)
    try:
        with RequestScheduler(decoder, max_batch=1, max_waiting=2) as scheduler:
            gate.hold()
            tickets = [scheduler.submit([ids(1, 3)], GenerationSettings(3))]
            gate.held()
            tickets += [scheduler.submit([ids(n, 3)], GenerationSettings(3)) for n in (2, 3)]
            with pytest.raises(SchedulerFullError, match="2 requests are waiting already; retry later, or raise"):
                scheduler.submit([ids(4, 3)])
            gate.open.set()
            assert all(t.result(PATIENCE) for t in tickets)
            assert scheduler.submit([ids(4, 3)], GenerationSettings(3)).result(PATIENCE).completion_tokens == 3
    finally:
        gate.remove()


@pytest.mark.parametrize(("max_batch", "max_waiting"), [(0, 5), (-1, 5), (5, 0)])
def test_limits_that_serve_nobody_are_refused(decoder: FrozenDecoder, max_batch: int, max_waiting: int) -> None:
    with pytest.raises(InputError, match=f"of at least 1, got {max_batch} and {max_waiting}"):
        RequestScheduler(decoder, max_batch=max_batch, max_waiting=max_waiting)


# -- ending


def test_closing_finishes_what_was_submitted_and_takes_nothing_more(decoder: FrozenDecoder) -> None:
    scheduler = RequestScheduler(decoder, max_batch=2)
    tickets = [scheduler.submit([ids(n, 3)], GenerationSettings(6)) for n in range(7)]
    scheduler.close()
    assert [t.result(0) for t in tickets] == [decoder.generate([ids(n, 3)], GenerationSettings(6)) for n in range(7)]
    with pytest.raises(SchedulerFullError, match="was closed; make a new one"):
        scheduler.submit([ids(1, 3)])
    scheduler.close()
    assert decoder_threads() == []


def test_the_decoders_own_thread_may_close(decoder: FrozenDecoder) -> None:
    """As a finaliser does that happens to run there."""
    scheduler = RequestScheduler(decoder)
    handle = decoder.backbone.model.register_forward_pre_hook(lambda *_: scheduler.close())
    try:
        assert scheduler.submit([ids(1, 3)], GenerationSettings(3)).result(PATIENCE).completion_tokens == 3
    finally:
        handle.remove()
    assert eventually(lambda: decoder_threads() == [])


def test_an_idle_scheduler_keeps_no_thread_and_wakes_again(scheduler: RequestScheduler) -> None:
    expected = scheduler.submit([ids(1, 3)], GenerationSettings(3)).result(PATIENCE)
    assert len(decoder_threads()) == 1
    assert eventually(lambda: decoder_threads() == [])
    assert scheduler.submit([ids(1, 3)], GenerationSettings(3)).result(PATIENCE) == expected


def test_after_the_work_nothing_is_kept(decoder: FrozenDecoder, scheduler: RequestScheduler) -> None:
    """Neither tickets nor spans nor caches, also while the idle thread still lives."""
    span = kv_span(decoder.backbone, 1, 6)
    keys = weakref.ref(span.keys)
    caches: list[weakref.ref[DynamicCache]] = []
    handle = decoder.backbone.model.register_forward_pre_hook(
        lambda _, __, kwargs: caches.append(weakref.ref(kwargs["past_key_values"])), with_kwargs=True)
    try:
        tickets = [scheduler.submit([ids(n, 3), span, ids(n, 3)], GenerationSettings(4)) for n in range(3)]
        tickets += [scheduler.submit([ids(n, 3)], GenerationSettings(400)) for n in range(3)]
        for ticket in tickets[3:]:
            ticket.cancel()
        del span
        pieces = tickets[0].pieces()
        for ticket in tickets[:3]:
            ticket.result(PATIENCE)
        for ticket in tickets[3:]:
            with pytest.raises(CancelledError):
                ticket.result(PATIENCE)
    finally:
        handle.remove()
    assert all(t.request.prompt.usage.slots == 6 for t in tickets[:3])

    def gone(*things: weakref.ref[Any]) -> bool:
        gc.collect()
        return all(thing() is None for thing in things)

    assert eventually(lambda: gone(keys, *caches))  # while the tickets are kept
    left = [weakref.ref(t) for t in tickets]
    del tickets, ticket, pieces
    assert eventually(lambda: gone(*left))


def test_a_scheduler_that_is_dropped_is_freed_when_its_work_is_done(decoder: FrozenDecoder) -> None:
    scheduler = RequestScheduler(decoder)
    ticket = scheduler.submit([ids(1, 3)], GenerationSettings(3))
    dropped = weakref.ref(scheduler)
    del scheduler
    assert ticket.result(PATIENCE).completion_tokens == 3
    assert eventually(lambda: gc.collect() >= 0 and dropped() is None)


def test_a_scheduler_is_not_pickled_or_copied(scheduler: RequestScheduler) -> None:
    for how in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match="belongs to its process"):
            how(scheduler)


# -- the state of a batch


def width(loop: DecodingLoop) -> int:
    assert loop._state is not None
    layers: list[Any] = list(loop._state.cache.layers)
    (found,) = {loop._state.mask.shape[1], *(layer.keys.shape[2] for layer in layers)}
    return int(found)


@torch.inference_mode()
def test_padding_that_no_row_needs_any_more_is_cut_and_answers_stay_the_same(decoder: FrozenDecoder) -> None:
    state = prefill([decoder.splice([ids(n, n)]) for n in (4, 30, 9)], decoder.backbone)
    state.keep([0, 2])
    assert state.mask.sum(1).tolist() == [4, 9]
    assert state.mask.shape[1] == 9
    alone = [prefill([decoder.splice([ids(n, n)])], decoder.backbone) for n in (4, 9)]
    expected = merge(alone, decoder.backbone)
    assert torch.equal(state.mask, expected.mask)
    for got, want in zip(state.cache.layers, expected.cache.layers, strict=True):
        real = state.mask[:, None, :, None].bool()
        torch.testing.assert_close(got.keys * real, want.keys * real, atol=1e-5, rtol=0)  # type: ignore[union-attr]
        torch.testing.assert_close(got.values * real, want.values * real, atol=1e-5, rtol=0)  # type: ignore[union-attr]
        assert got.keys.untyped_storage().nbytes() == got.keys.nbytes  # type: ignore[union-attr]


def test_a_batch_that_is_never_empty_does_not_grow(decoder: FrozenDecoder) -> None:
    """Each answer hands over to the next one while it is still decoding, a hundred times."""
    expected = decoder.generate([ids(1, 5)], GenerationSettings(6))
    loop = DecodingLoop(decoder.backbone)
    loop.admit([first := decoder.request([ids(2, 40)], GenerationSettings(3))])
    widths, requests = [], []
    for _ in range(100):
        requests.append(decoder.request([ids(1, 5)], GenerationSettings(6)))
        loop.admit([requests[-1]])
        for _ in range(3):
            loop.advance()
        assert loop.rows
        widths.append(width(loop))
    while loop.rows:
        loop.advance()
    assert first.generation.completion_tokens == 3
    assert all(r.generation == expected for r in requests)
    assert max(widths[1:]) <= 5 + 6


def test_a_sliding_window_is_not_cut() -> None:
    decoder = FrozenDecoder(tiny_backbone("gemma2"))
    decoder.end_ids = frozenset({-1})
    prompts = [[ids(n, n)] for n in (4, 30, 9)]
    limits = [20, 2, 9]
    requests = [decoder.request(p, GenerationSettings(limit)) for p, limit in zip(prompts, limits, strict=True)]
    loop = DecodingLoop(decoder.backbone)
    loop.admit(requests)
    while loop.rows:
        loop.advance()
    assert [r.generation for r in requests] == [decoder.generate(p, GenerationSettings(limit))
                                                for p, limit in zip(prompts, limits, strict=True)]


def test_rows_that_cannot_be_admitted_leave_the_others_as_they_were(decoder: FrozenDecoder) -> None:
    loop = DecodingLoop(decoder.backbone)
    request = decoder.request([ids(1, 5)], GenerationSettings(12))
    loop.admit([request])
    loop.advance()
    loop.feed()
    handle = decoder.backbone.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
        loop.admit([decoder.request([ids(2, 9)])])
    handle.remove()
    while loop.rows:
        loop.advance()
    assert request.generation == decoder.generate([ids(1, 5)], GenerationSettings(12))


def test_a_program_may_end_in_the_middle_of_an_answer() -> None:
    """A thread inside the decoder when Python ends would abort the process."""
    program = (
        "from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, RequestScheduler\n"
        "from tests.tiny_models import tiny_backbone\n"
        "decoder = FrozenDecoder(tiny_backbone('llama'))\n"
        "decoder.end_ids = frozenset({-1})\n"
        "scheduler = RequestScheduler(decoder)\n"
        "tickets = [scheduler.submit(['hello'], GenerationSettings(max_new_tokens=100000)) for _ in range(4)]\n"
        "print(len(next(tickets[0].pieces())) > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                          timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


# -- limits and backpressure


def test_a_request_over_the_limits_is_refused_before_it_waits(decoder: FrozenDecoder) -> None:
    with RequestScheduler(decoder, limits=RequestLimits(max_prompt_positions=6, max_new_tokens=5)) as scheduler:
        with pytest.raises(PromptTooLongError, match=r"answer of 6 tokens was asked for, the limit is 5"):
            scheduler.submit([ids(1, 3)], GenerationSettings(6))
        with pytest.raises(PromptTooLongError, match=r"takes 7 positions, the limit is 6; retrieve fewer chunks"):
            scheduler.submit([ids(1, 3), soft_span(decoder.backbone, 1, 4)], GenerationSettings(5))
        allowed = scheduler.submit([ids(1, 3), soft_span(decoder.backbone, 1, 3)], GenerationSettings(5))
        assert allowed.result(PATIENCE).usage.positions == 6


def test_a_limit_is_at_least_one() -> None:
    with pytest.raises(InputError, match="max_new_tokens of at least 1, got 0"):
        RequestLimits(max_new_tokens=0)


def test_it_says_how_many_wait_and_how_many_decode(scheduler: RequestScheduler, gate: Gate) -> None:
    gate.hold(after=1)
    first = scheduler.submit([ids(0, 3)], GenerationSettings(4))
    gate.held()
    others = [scheduler.submit([ids(n, 3)], GenerationSettings(4)) for n in range(3)]
    assert (scheduler.decoding, scheduler.waiting) == (1, 3)
    gate.open.set()
    for ticket in (first, *others):
        ticket.result(PATIENCE)
    assert eventually(lambda: (scheduler.decoding, scheduler.waiting) == (0, 0))
