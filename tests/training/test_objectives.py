"""Training samples and their loss. The official layouts and numbers are checked in test_golden_icae_v2.py."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from ctxcomp_rag.backbone import weights_digest
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.decoding import Delimiter, FrozenDecoder, TokenIds
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.spans import SoftSpan
from ctxcomp_rag.training import (
    AutoencodingObjective,
    ContinuationObjective,
    InstructionObjective,
    SampleIds,
    TrainingSample,
    training_loss,
)
from tests.tiny_models import tiny_backbone

CONFIG = ICAEConfig(num_memory_tokens=4, segment_tokens=16, lora_rank=2)
CONFIGS = {"official": CONFIG, "spread": replace(CONFIG, slots="proportional", slot_positions="spread")}
TEXT = list(range(30, 70))


@pytest.fixture(scope="module", params=CONFIGS)
def compressor(request: pytest.FixtureRequest) -> ICAECompressor:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return ICAECompressor(tiny_backbone("llama"), CONFIGS[request.param])


def instruction(compressor: ICAECompressor) -> TrainingSample:
    return InstructionObjective(compressor, left_ids=[284, 286], right_ids=[285, 287]).sample(TEXT, [40, 41], [50, 51])


def test_ids_above_the_vocabulary() -> None:
    ids = SampleIds(vocab_size=100, num_memory_tokens=4)
    assert (ids.padding, ids.first_memory, ids.reconstruct, ids.continue_, ids.after) == (100, 101, 105, 106, 107)


def test_window_is_drawn_within_the_text(compressor: ICAECompressor) -> None:
    objective, rng = AutoencodingObjective(compressor), random.Random(0)
    contexts = {objective.draw(TEXT, 10, rng).context_ids for _ in range(200)}
    assert contexts == {tuple(TEXT[i : i + 10]) for i in range(31)}
    assert objective.draw(TEXT, 40, rng).context_ids == tuple(TEXT)


def test_cut_is_drawn_within_the_text(compressor: ICAECompressor) -> None:
    objective, rng = ContinuationObjective(compressor, max_tokens=8, min_tokens=2, leave_tokens=3), random.Random(0)
    samples = [objective.draw(TEXT, 40, rng) for _ in range(400)]
    assert {len(s.context_ids) for s in samples} == set(range(1, 41))
    for sample in samples:
        follows = TEXT[len(sample.context_ids) :][:8]
        repeated = [*sample.context_ids, 285]
        expected = follows[3:] if len(TEXT) - len(sample.context_ids) > 2 else repeated
        assert [label for label in sample.labels if label != -100] == expected


@pytest.mark.parametrize("prompt", ["autoencoding", "instruction"])
def test_loss_sees_the_prompt_that_the_decoder_will_see(prompt: str, compressor: ICAECompressor) -> None:
    """Same logits as splicing the finished span, wherever its slots stand."""
    with torch.no_grad():
        rows = compressor.encode([TEXT])[0]
    places, length = compressor.span_positions(len(TEXT))
    span = SoftSpan("c", len(TEXT), torch.tensor(places), length, rows)
    def row(name: str) -> Delimiter:
        return Delimiter(compressor.spec.delimiters[name])
    if prompt == "autoencoding":
        sample = AutoencodingObjective(compressor).sample(TEXT)
        parts = [span, row("reconstruct"), TokenIds((*TEXT, 285))]
    else:
        sample = instruction(compressor)
        parts = [TokenIds((284, 286)), span, row("after"), TokenIds((40, 41, 285, 287, 50, 51, 285))]
    expected = FrozenDecoder(compressor.backbone).logits(parts)
    with torch.no_grad():
        loss, logits = training_loss(compressor, sample)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    labelled = [(i, label) for i, label in enumerate(sample.labels) if label != -100]
    by_hand = [-expected[i - 1].log_softmax(-1)[label] for i, label in labelled]
    assert loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), abs=1e-5)


def test_gradients_reach_the_compressor_only(compressor: ICAECompressor) -> None:
    digest = weights_digest(compressor.backbone.model)
    loss, _ = training_loss(compressor, instruction(compressor))
    loss.backward()
    touched = {n for n, p in compressor.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    compressor.zero_grad()
    assert "memory_tokens" in touched
    # lora_A gets its first gradient once lora_B, which begins at zero, has moved
    assert touched - {"memory_tokens"} == {n for n, _ in compressor.named_parameters() if ".lora_B." in n}
    assert all(p.grad is None for p in compressor.backbone.model.parameters())
    assert weights_digest(compressor.backbone.model) == digest


def test_a_few_steps_lower_the_loss() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        compressor = ICAECompressor(tiny_backbone("llama"), CONFIGS["spread"])
    sample = instruction(compressor)
    optimizer = torch.optim.Adam([p for p in compressor.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss, _ = training_loss(compressor, sample)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_refusals(compressor: ICAECompressor) -> None:
    with pytest.raises(InputError, match="must hold at least one token"):
        AutoencodingObjective(compressor).sample([])
    sample = AutoencodingObjective(compressor).sample(TEXT)
    slots = len(compressor.span_positions(len(TEXT))[0])
    shorter = replace(sample, prompt_ids=sample.prompt_ids[1:], labels=sample.labels[1:])
    with pytest.raises(InputError, match=rf"40 tokens gives {slots} slots in a row; .* has {slots - 1} places"):
        training_loss(compressor, shorter)
    without = replace(sample, prompt_ids=tuple(TEXT), labels=tuple(TEXT))
    with pytest.raises(InputError, match="has 0 places"):
        training_loss(compressor, without)


@pytest.mark.parametrize("factor", [4.0, 8.0])
def test_a_nested_sample_is_trained_on_the_first_slots_of_its_span(factor: float) -> None:
    """Same logits as splicing the finished span cut to as many slots."""
    config = replace(CONFIGS["spread"], segment_tokens=48, compression_factor=2.0, nested=(2.0, 4.0, 8.0))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        nested = ICAECompressor(tiny_backbone("llama"), config)
    objective = AutoencodingObjective(nested)
    sample = objective.read_at(objective.sample(TEXT), factor)
    with torch.no_grad():
        rows = nested.encode([TEXT])[0]
        _, logits = training_loss(nested, sample)
    places, length = nested.span_positions(len(TEXT))
    order = torch.tensor(config.slot_places(length, len(places))).argsort().argsort()
    span = SoftSpan("c", len(TEXT), torch.tensor(places), length, rows, order)
    parts = [span.first(nested.spec.slot_counts(span)[factor]), Delimiter(nested.spec.delimiters["reconstruct"]),
             TokenIds((*TEXT, 285))]
    torch.testing.assert_close(logits, FrozenDecoder(nested.backbone).logits(parts), atol=1e-5, rtol=0)
    assert [x for x in sample.labels if x != -100] == [*TEXT, 285]
