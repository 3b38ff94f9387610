"""Drafted answers are the greedy ones, token for token, whatever the drafts are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, Part, TokenIds
from ctxcomp_rag.decoding.lookup import find_draft, generate_drafted
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.spans import SoftSpan
from tests.tiny_models import ARCHITECTURES, tiny_backbone

TWENTY = GenerationSettings(max_new_tokens=20)


def prompt(name: str) -> list[Part]:
    size = tiny_backbone(name).hidden_size
    span = SoftSpan("s", 12, torch.arange(3) * 4, 12, torch.randn(3, size, generator=torch.Generator().manual_seed(3)))
    return [TokenIds((1, 2, 3)), span, TokenIds((9, 8, 7))]


def decoder(name: str) -> FrozenDecoder:
    return FrozenDecoder(tiny_backbone(name), end_ids=[-1])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("draft_tokens", [1, 3, 8])
def test_the_answer_is_the_greedy_one(name: str, draft_tokens: int) -> None:
    expected = decoder(name).generate(prompt(name), TWENTY)
    tail = " ".join(expected.text.split()[1:])
    for sources in ([], ["the cat is on the water"], [expected.text], [tail, expected.text[5:] + "and so on"]):
        got = generate_drafted(decoder(name), prompt(name), sources, TWENTY, draft_tokens=draft_tokens)
        assert got.generation.token_ids == expected.token_ids
        assert got.generation == replace(expected, usage=got.generation.usage)
        assert got.passes == expected.completion_tokens - 1 - got.accepted


def test_a_source_that_holds_the_answer_saves_passes() -> None:
    answer = decoder("llama").generate(prompt("llama"), TWENTY).token_ids
    got = generate_drafted(decoder("llama"), prompt("llama"), [TokenIds(answer)], TWENTY, draft_tokens=8)
    assert got.generation.token_ids == answer
    assert got.passes <= 5  # 19 tokens in passes of up to nine
    assert got.accepted == 19 - got.passes


def test_it_ends_where_generate_ends() -> None:
    mine = decoder("qwen2")
    ids = mine.generate(prompt("qwen2"), TWENTY).token_ids
    ending = FrozenDecoder(mine.backbone, end_ids=[ids[7]])
    expected = ending.generate(prompt("qwen2"), TWENTY)
    got = generate_drafted(ending, prompt("qwen2"), [], TWENTY).generation
    assert (got.token_ids, got.finish_reason) == (expected.token_ids, expected.finish_reason) == (
        ids[: ids.index(ids[7])], "stop")
    one = GenerationSettings(max_new_tokens=1)
    assert generate_drafted(mine, prompt("qwen2"), [], one).passes == 0
    text = mine.generate(prompt("qwen2"), TWENTY).text
    stop = GenerationSettings(max_new_tokens=20, stop=(text[6:8],))
    assert generate_drafted(mine, prompt("qwen2"), [text], stop).generation.text == mine.generate(
        prompt("qwen2"), stop).text


def test_the_longest_end_is_looked_for_first() -> None:
    texts = [[5, 1, 2, 9, 9], [4, 1, 2, 7, 8, 6]]
    assert find_draft(texts, [3, 4, 1, 2], 2) == [7, 8]
    assert find_draft(texts, [0, 0, 2], 8) == [9, 9]
    assert find_draft(texts, [6], 8) == []  # nothing stands after it
    assert find_draft(texts, [1, 2], 0) == []
    assert find_draft([], [], 4) == []


def test_sampling_is_refused() -> None:
    with pytest.raises(InputError, match=r"greedy answers \(temperature 0\)"):
        generate_drafted(decoder("llama"), prompt("llama"), settings=GenerationSettings(temperature=1.0))
