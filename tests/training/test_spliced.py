"""Training in the prompts of the product, against a slow, obvious reference: the prompt that `splice` makes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ctxcomp_rag.backbone import weights_digest
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.compressors.infinipot import InfiniPotCompressor
from ctxcomp_rag.compressors.pcc import PCCCompressor, PCCConfig, load_encoder
from ctxcomp_rag.decoding import FrozenDecoder, Part, TokenIds, enclosed, reconstruction_prompt
from ctxcomp_rag.errors import InputError, UnsupportedModelError
from ctxcomp_rag.pipeline import prompt_parts
from ctxcomp_rag.training.examples import Example
from ctxcomp_rag.training.sampling import SampledSource
from ctxcomp_rag.training.spliced import (
    OBJECTIVES,
    Answering,
    Distilling,
    SplicedSample,
    Trainable,
    answer_logits,
    summed_spliced_loss,
)
from tests.tiny_models import save_tiny, tiny_backbone

BACKBONE = tiny_backbone("llama")
EXAMPLE = Example("The keeper of Varn painted the red stairs.", " Then he slept.", "Who?", " The keeper.")
OTHER = "The ferry rests in winter."
END = BACKBONE.config.eos_token_id


@pytest.fixture(scope="module", params=["icae", "icae official", "pcc"])
def trainable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainable:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        if request.param == "pcc":
            folder = save_tiny("gpt2", tmp_path_factory.mktemp("encoder"))
            return Trainable(PCCCompressor(BACKBONE, load_encoder(folder), PCCConfig(24, 6)))
        config = ICAEConfig(num_memory_tokens=4, segment_tokens=16, lora_rank=2)
        if request.param == "icae":
            config = ICAEConfig(4, 16, slots="proportional", slot_positions="spread", lora_rank=2)
        return Trainable(ICAECompressor(BACKBONE, config))


def spans(trainable: Trainable, texts: list[str]) -> list[Any]:
    return trainable.compressor.compress([Chunk("c", t, 0, len(t), 1) for t in texts])


def by_hand(parts: list[Part], answer: list[int]) -> Tensor:
    """Log-probabilities (answer, vocab_size) after a spliced prompt."""
    logits = FrozenDecoder(BACKBONE).logits([*parts, TokenIds(tuple(answer))])
    return logits[-len(answer) - 1 : -1].log_softmax(-1)


def test_every_objective_is_the_prompt_of_the_product(trainable: Trainable) -> None:
    spec, encode = trainable.spec, BACKBONE.tokenizer.encode
    own, other = spans(trainable, [EXAMPLE.context, OTHER])
    answer = [*encode(EXAMPLE.answer), END]
    both = [enclosed(other, spec), enclosed(own, spec)]
    prompts: dict[str, tuple[list[str], list[Part], list[int]]] = {
        "autoencoding": ([EXAMPLE.context], reconstruction_prompt(own, spec), [*encode(EXAMPLE.context), END]),
        "continuation": ([EXAMPLE.context], enclosed(own, spec), encode(EXAMPLE.continuation)),
        "question": ([OTHER, EXAMPLE.context], prompt_parts(BACKBONE, "Who?", both, spec), answer),
    }
    samples, wanted = [], 0.0
    for name, (contexts, parts, ids) in prompts.items():
        samples.append(OBJECTIVES[name](trainable).sample(EXAMPLE, contexts, None))
        expected = by_hand(parts, ids)
        with torch.no_grad():
            [logits] = answer_logits(trainable, samples[-1:])
        torch.testing.assert_close(logits.log_softmax(-1), expected, atol=2e-5, rtol=0)
        wanted -= sum(float(row[i]) for row, i in zip(expected, ids, strict=True))
    with torch.no_grad():
        assert summed_spliced_loss(trainable, samples).item() == pytest.approx(wanted, rel=1e-5)  # in one batch too


def test_distillation_is_the_kl_from_the_full_text(trainable: Trainable) -> None:
    spec, answer = trainable.spec, [*BACKBONE.tokenizer.encode(EXAMPLE.answer), END]
    texts = [OTHER, EXAMPLE.context]
    contents = [enclosed(s, spec) for s in spans(trainable, texts)]
    student = by_hand(prompt_parts(BACKBONE, "Who?", contents, spec), answer)
    teacher = by_hand(prompt_parts(BACKBONE, "Who?", [[t] for t in texts]), answer)
    expected = float((teacher.exp() * (teacher - student)).sum())
    sample = Distilling(trainable).sample(EXAMPLE, texts, None)
    with torch.no_grad():
        loss = summed_spliced_loss(trainable, [sample]).item()
    assert expected > 0.01
    assert loss == pytest.approx(expected, rel=1e-4)


def test_a_student_that_reads_what_the_teacher_reads_has_nothing_to_learn(trainable: Trainable) -> None:
    taught = Distilling(trainable).sample(EXAMPLE, [EXAMPLE.context], None)
    assert taught.teacher is not None
    same = SplicedSample((), (taught.teacher,), taught.labels, teacher=taught.teacher)
    with torch.no_grad():
        assert summed_spliced_loss(trainable, [same]).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_reach_the_compressor_and_nothing_else(name: str, trainable: Trainable) -> None:
    digest, compressor = weights_digest(BACKBONE.model), trainable.compressor
    sample = OBJECTIVES[name](trainable).sample(EXAMPLE, [EXAMPLE.context], None)
    summed_spliced_loss(trainable, [sample]).backward()
    touched = {n for n, p in compressor.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    compressor.zero_grad(set_to_none=True)
    assert touched
    assert {"memory_tokens", "special_rows"} & touched
    assert all(p.grad is None for p in BACKBONE.model.parameters())
    assert weights_digest(BACKBONE.model) == digest


def test_the_gradient_is_that_of_finite_differences(trainable: Trainable) -> None:
    compressor = trainable.compressor
    rows = compressor.special_rows if isinstance(compressor, PCCCompressor) else compressor.memory_tokens
    sample = Distilling(trainable).sample(EXAMPLE, [EXAMPLE.context], None)
    summed_spliced_loss(trainable, [sample]).backward()
    assert rows.grad is not None
    direction = rows.grad / rows.grad.norm()
    slope = float((rows.grad * direction).sum())
    compressor.zero_grad(set_to_none=True)
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            rows += sign * 1e-2 * direction
            values.append(summed_spliced_loss(trainable, [sample]).item())
            rows -= sign * 1e-2 * direction
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(slope, rel=0.02)


def test_samples_of_several_factors_share_a_batch() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        compressor = ICAECompressor(BACKBONE, ICAEConfig(4, 16, slots="proportional", slot_positions="spread",
                                                         lora_rank=2))
    t = Trainable(compressor)
    samples = [OBJECTIVES["autoencoding"](t).sample(EXAMPLE, [], factor) for factor in (2.0, 8.0, 2.0, None)]
    with torch.no_grad():
        together = summed_spliced_loss(t, samples).item()
        alone = [summed_spliced_loss(t, [s]).item() for s in samples]
    assert together == pytest.approx(sum(alone), rel=1e-5)
    assert alone[0] == alone[2] != alone[1]


def test_a_source_draws_factors_and_neighbours_and_puts_the_right_span_anywhere(trainable: Trainable) -> None:
    examples = [Example(f"The lamp {i} is red.", "", "What?", " A lamp.") for i in range(5)]
    source = SampledSource(Answering(trainable), examples, factors=(4.0, 8.0), max_spans=3)
    drawn = [source.draw(random.Random(seed)) for seed in range(60)]
    assert {s.factor for s in drawn} == {4.0, 8.0}
    assert {len(s.contexts) for s in drawn} == {1, 2, 3}
    assert drawn[7] == source.draw(random.Random(7))
    assert source.described()["factors"] == [4.0, 8.0]


def test_what_cannot_be_trained_is_refused(trainable: Trainable) -> None:
    with pytest.raises(UnsupportedModelError, match="the method 'infinipot' has nothing to train; use icae or pcc"):
        Trainable(InfiniPotCompressor(BACKBONE))
    long = Example("a" * 600, "", "Who?", " x")
    with pytest.raises(InputError, match=r"takes \d+ positions and the decoder has 512; use shorter contexts"):
        answer_logits(trainable, [OBJECTIVES["autoencoding"](trainable).sample(long, [long.context], None)])


def test_the_full_text_that_a_student_is_taught_from_has_to_fit_the_window(trainable: Trainable) -> None:
    sample = Distilling(trainable).sample(EXAMPLE, [EXAMPLE.context], None)
    longer = replace(sample, teacher=(*(sample.teacher or ()), *[30] * 512))
    with pytest.raises(InputError, match=r"the full text .* taught from takes \d+ positions and the decoder has 512"):
        summed_spliced_loss(trainable, [longer])


