"""Peaks are those of the work, whatever was taken before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor, InfiniPotConfig
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings, TokenIds
from ctxcomp_rag.evaluation.memory import peak_memory
from tests.tiny_models import tiny_backbone

MIB = 2**20


def test_a_peak_counts_what_is_taken_inside_and_not_what_was_given_back_before() -> None:
    before = torch.ones(200 * MIB // 4)
    del before
    with peak_memory() as peak:
        inside = torch.ones(64 * MIB // 4)
        del inside
    assert 60 * MIB < peak.bytes < 150 * MIB


def allocated_peak(work: Any) -> int:
    """Most bytes of tensors alive at once, beyond what was alive before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    now = highest = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


@pytest.mark.parametrize("repeats", [False, True])
def test_reading_into_a_pot_takes_the_same_memory_however_long_the_text(repeats: bool) -> None:
    config = InfiniPotConfig(pot_tokens=96, step_tokens=32)
    compressor = InfiniPotCompressor(tiny_backbone("llama"), config.repeating() if repeats else config)
    short, long = (allocated_peak(lambda n=n: compressor.distilled([7, 8, 9] * n, 12)) for n in (80, 320))
    whole = InfiniPotCompressor(tiny_backbone("llama"), InfiniPotConfig(pot_tokens=512, step_tokens=32))
    assert 0 < long <= 1.05 * short
    assert allocated_peak(lambda: whole.distilled([7, 8, 9] * 150, 450)) > 2 * short


def test_reading_within_a_cache_budget_takes_the_same_memory_however_long_the_prompt() -> None:
    decoder = FrozenDecoder(tiny_backbone("llama"), cache_budget=96)
    short, long = (allocated_peak(lambda n=n: decoder.generate([TokenIds((7, 8, 9) * n)], GenerationSettings(1)))
                   for n in (80, 320))
    assert 0 < long <= 1.05 * short
