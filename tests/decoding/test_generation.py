"""Streaming, stopping, seeds, and cancelling."""

from __future__ import annotations

import threading

import pytest
import torch

from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, Message, TokenIds
from ctxcomp_rag.errors import InputError
from tests.tiny_models import tiny_backbone

PROMPT = [TokenIds((5, 9, 200, 31, 77))]
SAMPLED = GenerationSettings(max_new_tokens=40, temperature=1.0, seed=11)


@pytest.fixture
def decoder() -> FrozenDecoder:
    return FrozenDecoder(tiny_backbone("llama"))


@pytest.mark.parametrize("seed", range(6))
def test_streamed_pieces_joined_are_the_generated_text(decoder: FrozenDecoder, seed: int) -> None:
    settings = GenerationSettings(max_new_tokens=40, temperature=1.0, seed=seed)
    whole = decoder.generate(PROMPT, settings).text
    pieces = list(decoder.stream(PROMPT, settings))
    assert "".join(pieces) == whole
    assert len(pieces) > 1


def test_the_answer_ends_before_the_first_stop_string_also_when_streamed(decoder: FrozenDecoder) -> None:
    free = decoder.generate(PROMPT, SAMPLED).text
    middle = len(free) // 2
    stop = free[middle : middle + 3]
    settings = GenerationSettings(max_new_tokens=40, temperature=1.0, seed=11, stop=(stop, "never in there"))
    stopped = decoder.generate(PROMPT, settings)
    assert stopped.text == free[: free.find(stop)]
    assert stopped.finish_reason == "stop"
    assert "".join(decoder.stream(PROMPT, settings)) == stopped.text


def test_max_new_tokens_is_the_number_of_tokens_generated(decoder: FrozenDecoder) -> None:
    made = decoder.generate(PROMPT, GenerationSettings(max_new_tokens=7))
    assert (made.completion_tokens, made.finish_reason) == (7, "length")


def test_the_seed_decides_the_sample_and_temperature_zero_needs_none(decoder: FrozenDecoder) -> None:
    def text(seed: int, temperature: float) -> str:
        return decoder.generate(PROMPT, GenerationSettings(20, temperature, seed=seed)).text

    assert text(1, 1.0) == text(1, 1.0)
    assert text(1, 1.0) != text(2, 1.0)
    assert text(1, 0.0) == text(2, 0.0)


def test_a_tiny_top_p_leaves_the_greedy_token(decoder: FrozenDecoder) -> None:
    sampled = decoder.generate(PROMPT, GenerationSettings(10, temperature=1.0, top_p=1e-6, seed=3))
    assert sampled.token_ids == decoder.generate(PROMPT, GenerationSettings(10)).token_ids


def test_closing_a_stream_cancels_it(decoder: FrozenDecoder) -> None:
    stream = decoder.stream(PROMPT, SAMPLED)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert list(stream) == []


def test_an_exception_while_decoding_reaches_the_consumer(decoder: FrozenDecoder) -> None:
    stream = decoder.stream(PROMPT, SAMPLED)
    next(stream)

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    handle = decoder.backbone.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(MemoryError, match="no room"):
            list(stream)
    finally:
        handle.remove()


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(decoder: FrozenDecoder) -> None:
    first = decoder.generate(PROMPT, GenerationSettings(8)).token_ids
    decoder.end_ids = frozenset({first[3]})
    made = decoder.generate(PROMPT, GenerationSettings(8))
    assert (made.token_ids, made.finish_reason) == (first[: first.index(first[3])], "stop")


def test_generation_stops_at_the_decoders_window(decoder: FrozenDecoder) -> None:
    window = decoder.backbone.max_positions
    made = decoder.generate([TokenIds((1,) * (window - 3))], GenerationSettings(max_new_tokens=50))
    assert made.completion_tokens == 3


def test_two_threads_get_what_one_gets(decoder: FrozenDecoder) -> None:
    prompts = [[TokenIds((i, i + 1, i + 2))] for i in range(8)]
    expected = [decoder.generate(p, SAMPLED).token_ids for p in prompts]
    got: list[tuple[int, ...] | None] = [None] * 8

    def work(part: range) -> None:
        for i in part:
            got[i] = decoder.generate(prompts[i], SAMPLED).token_ids

    threads = [threading.Thread(target=work, args=(range(k, 8, 2),)) for k in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == expected


@pytest.mark.parametrize(("field", "value", "message"), [
    ("max_new_tokens", 0, "max_new_tokens of at least 1, got 0"),
    ("temperature", -1.0, "temperature >= 0"),
    ("temperature", float("nan"), "temperature >= 0"),
    ("top_p", 0.0, "0 < top_p <= 1"),
    ("stop", ("",), "stop string must not be empty"),
])
def test_settings_that_make_no_sense_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerationSettings(**{field: value})  # type: ignore[arg-type]


def test_a_plain_string_is_one_part_not_a_sequence_of_letters(decoder: FrozenDecoder) -> None:
    assert decoder.generate("and the", GenerationSettings(4)) == decoder.generate(["and the"], GenerationSettings(4))
    assert Message("user", "and the").content == ("and the",)  # type: ignore[arg-type]
    assert GenerationSettings(stop="END").stop == ("END",)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="use generate for a single prompt"):
        decoder.batch("and the")


@pytest.mark.parametrize("settings", [GenerationSettings(4, temperature=1), GenerationSettings(4, seed=2**70),
                                      GenerationSettings(4, temperature=1e-40)])
def test_unusual_numbers_do_not_break_the_sampling(decoder: FrozenDecoder, settings: GenerationSettings) -> None:
    assert decoder.generate(PROMPT, settings).completion_tokens == 4


def test_inference_leaves_no_gradient_graph(decoder: FrozenDecoder) -> None:
    assert not decoder.logits(PROMPT).requires_grad
    assert all(p.grad is None for p in decoder.backbone.model.parameters())
    assert torch.is_grad_enabled()
