"""The training loop: it learns, it never touches the decoder, and a run that was killed ends where it would have."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ctxcomp_rag.backbone import weights_digest
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.compressors.pcc import PCCCompressor, PCCConfig, load_encoder
from ctxcomp_rag.decoding import Delimiter, FrozenDecoder, TokenIds, enclosed, reconstruction_prompt
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.pipeline import prompt_parts
from ctxcomp_rag.spans import PromptLayout
from ctxcomp_rag.training import (
    AutoencodingObjective,
    BracketedAutoencoding,
    BracketedContinuation,
    BracketedQuestion,
    ContinuationObjective,
    Example,
    InstructionObjective,
    Source,
    Stage,
    Trainer,
    summed_bracketed_loss,
    summed_loss,
)
from tests.tiny_models import save_tiny, tiny_backbone

TEXTS = ["The lamp of Varn is red.", "A keeper painted the stairs in spring.", "The ferry rests in winter."]
EXAMPLES = [Example(text, " It is old.", "What is it?", " A lamp.") for text in TEXTS]
BACKBONE = tiny_backbone("llama")
LAYOUT = PromptLayout(context_ids=(5,), left_ids=(282,), question="Ask: {question}", right_ids=(284,),
                      reconstruct_ids=(282, 9))


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("gpt2", tmp_path_factory.mktemp("encoder"))


def pcc(folder: Path, layout: PromptLayout | None = None) -> PCCCompressor:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return PCCCompressor(BACKBONE, load_encoder(folder), PCCConfig(24, 6, layout=layout))


def icae(layout: PromptLayout | None = None) -> ICAECompressor:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return ICAECompressor(BACKBONE, ICAEConfig(num_memory_tokens=4, segment_tokens=16, lora_rank=2, layout=layout))


Made = tuple[nn.Module, Callable[[Any], Tensor], list[Stage]]


def make(method: str, encoder: Path) -> Made:
    """A compressor with its loss, and two stages of it: one objective, then two."""
    if method == "icae":
        compressor: Any = icae()
        first, second = AutoencodingObjective(compressor), ContinuationObjective(compressor, max_tokens=9, min_tokens=1,
                                                                                 leave_tokens=0)
        third: Any = InstructionObjective(compressor, left_ids=[282], right_ids=[284])
        loss: Any = summed_loss
        frozen = "encoder"
    else:
        compressor = pcc(encoder)
        first, second = BracketedAutoencoding(compressor), BracketedContinuation(compressor)  # type: ignore[assignment]
        third, loss, frozen = BracketedQuestion(compressor), summed_bracketed_loss, "special_rows"
    stages = [Stage("one", (Source(first, EXAMPLES),), 3, 2, 0.01, warmup_steps=1),
              Stage("two", (Source(second, EXAMPLES, 0.5), Source(third, EXAMPLES[:2], 0.5)), 4, 3, 0.01,
                    frozen=(frozen,))]
    return compressor, lambda samples: loss(compressor, samples), stages


def trained(compressor: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in compressor.named_parameters() if p.requires_grad}


def log(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["icae", "pcc"])
@pytest.mark.parametrize("killed_after", [2, 3, 6], ids=lambda n: f"killed after {n}")
def test_a_killed_run_ends_where_an_uninterrupted_one_does(method: str, killed_after: int, encoder_folder: Path,
                                                           tmp_path: Path) -> None:
    """Killed within a stage, at its end, and beyond the last checkpoint of the second one."""
    whole, loss, stages = make(method, encoder_folder)
    Trainer(whole, loss, stages, tmp_path / "whole", seed=3, save_every=2).run()

    killed, loss, stages = make(method, encoder_folder)
    steps = 0

    def count(record: dict[str, Any]) -> None:
        nonlocal steps
        steps += 1
        if steps == killed_after:
            raise Killed

    with pytest.raises(Killed):
        Trainer(killed, loss, stages, tmp_path / "killed", seed=3, save_every=2).run(count)
    resumed, loss, stages = make(method, encoder_folder)
    torch.manual_seed(99)  # another state of the generator than any step leaves behind
    done: list[dict[str, Any]] = []
    Trainer(resumed, loss, stages, tmp_path / "killed", seed=3, save_every=2).run(done.append)
    assert len(done) < 7
    expected = trained(whole)
    assert trained(resumed).keys() == expected.keys()
    assert all(p.equal(expected[n]) for n, p in trained(resumed).items())
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


@pytest.mark.parametrize("method", ["icae", "pcc"])
def test_the_loss_falls_and_the_decoder_is_untouched(method: str, encoder_folder: Path, tmp_path: Path) -> None:
    compressor, loss, stages = make(method, encoder_folder)
    digest, before = weights_digest(BACKBONE.model), trained(compressor)
    long = Stage("long", stages[0].sources, 40, 3, 0.01, warmup_steps=2)
    Trainer(compressor, loss, [long], tmp_path).run()
    losses = [r["loss"] for r in log(tmp_path)[1:]]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert weights_digest(BACKBONE.model) == digest
    assert all(p.grad is None and not p.requires_grad for p in BACKBONE.model.parameters())
    assert any(not p.equal(before[n]) for n, p in trained(compressor).items())
    assert not compressor.training


def test_what_a_stage_freezes_stays(encoder_folder: Path, tmp_path: Path) -> None:
    compressor, loss, (_, stage) = make("pcc", encoder_folder)
    before = trained(compressor)
    Trainer(compressor, loss, [stage], tmp_path).run()
    after = trained(compressor)
    assert after["special_rows"].equal(before["special_rows"])
    assert not after["converter.dense_in.weight"].equal(before["converter.dense_in.weight"])


def test_the_log_says_what_was_trained_on_what(encoder_folder: Path, tmp_path: Path) -> None:
    compressor, loss, stages = make("pcc", encoder_folder)
    Trainer(compressor, loss, stages, tmp_path, seed=8).run()
    head, *records = log(tmp_path)
    assert (head["seed"], head["parameters"]) == (8, sum(p.numel() for p in trained(compressor).values()))
    data = [s["data"] for stage in head["stages"] for s in stage["sources"]]
    assert data[0] == data[1] != data[2]
    assert all(len(d) == 64 for d in data)
    assert [(r["stage"], r["step"]) for r in records] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    for record in records:
        assert record["labels"] > 0
        assert record["gradient_norm"] > 0
    rates = [r["learning_rate"] for r in records[:3]]
    assert rates[0] == pytest.approx(0.005)
    assert rates[1] == pytest.approx(0.01)
    assert rates[2] < rates[1]
    mixed = {name for r in records[3:] for name in r["losses"]}
    assert mixed == {"0.BracketedContinuation", "1.BracketedQuestion"}


def test_gradients_are_clipped(encoder_folder: Path, tmp_path: Path) -> None:
    """SGD at rate 1 moves the weights by the gradient itself: at most by the norm that is allowed."""
    compressor, loss, stages = make("pcc", encoder_folder)
    before = trained(compressor)
    one = Stage("one", stages[0].sources, 1, 2, 1.0)
    Trainer(compressor, loss, [one], tmp_path, max_grad_norm=0.01,
            optimizers=lambda parameters, rate: [torch.optim.SGD(parameters.values(), lr=rate)]).run()
    moved = torch.cat([(p - before[n]).flatten() for n, p in trained(compressor).items()])
    assert log(tmp_path)[1]["gradient_norm"] > 0.1
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("changes", "match"), [({"seed": 4}, "begun with another seed"),
                                                ({"max_grad_norm": 2.0}, "begun with another max_grad_norm")])
def test_other_settings_do_not_go_on_with_a_run(changes: dict[str, Any], match: str, encoder_folder: Path,
                                                tmp_path: Path) -> None:
    compressor, loss, stages = make("icae", encoder_folder)
    Trainer(compressor, loss, stages, tmp_path, seed=3).run()
    with pytest.raises(InputError, match=match):
        Trainer(compressor, loss, stages, tmp_path, **{"seed": 3, **changes}).run()
    other = [Stage("one", (Source(stages[0].sources[0].objective, EXAMPLES[:2]),), 3, 2, 0.01, 1), stages[1]]
    with pytest.raises(InputError, match="begun with another stages"):
        Trainer(compressor, loss, other, tmp_path, seed=3).run()


def test_a_source_without_examples_is_refused(encoder_folder: Path, tmp_path: Path) -> None:
    compressor, loss, stages = make("icae", encoder_folder)
    empty = Stage("empty", (Source(stages[0].sources[0].objective, []),), 1, 1, 0.1)
    with pytest.raises(InputError, match="the stage 'empty' has a source without examples"):
        Trainer(compressor, loss, [empty], tmp_path)


@pytest.mark.parametrize(("frozen", "message"), [
    (("encoder", "memory_token5"), "freezes 'memory_token5', with which no trained parameter begins; the nearest are "
                                   "memory_tokens"),
    (("zzz",), "freezes 'zzz', .* the nearest are memory_tokens, encoder"),
    (("encoder", "memory_tokens"), "freezes every trained parameter"),
])
def test_a_stage_freezes_parameters_that_there_are_and_leaves_some(frozen: tuple[str, ...], message: str,
                                                                   encoder_folder: Path, tmp_path: Path) -> None:
    compressor, loss, (stage, _) = make("icae", encoder_folder)
    with pytest.raises(InputError, match=message):
        Trainer(compressor, loss, [replace(stage, frozen=frozen)], tmp_path)


@pytest.mark.parametrize("method", ["icae", "pcc"])
def test_a_text_of_one_token_can_be_trained_on(method: str, encoder_folder: Path, tmp_path: Path) -> None:
    compressor, loss, (stage, _) = make(method, encoder_folder)
    tiny = replace(stage, sources=(Source(stage.sources[0].objective, [Example(".")]),), steps=1)
    Trainer(compressor, loss, [tiny], tmp_path).run()
    assert log(tmp_path)[1]["labels"] == 4  # of two samples: the token and the end


def test_a_run_is_the_same_in_one_process_and_in_two(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    script = str(Path(__file__).parent / "run_trainer.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, command in (("one", [script]), ("two", [*launch, script])):
        done = subprocess.run([sys.executable, *command, str(tmp_path / name)], capture_output=True, text=True,
                              check=False, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / n / "checkpoint.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert len(log(tmp_path / "two")) == len(log(tmp_path / "one"))  # one process writes
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-6, rtol=1e-4)
    for a, b in zip(log(tmp_path / "one")[1:], log(tmp_path / "two")[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["labels"] == b["labels"]


# -- objectives against a slow, obvious reference: the prompt that the product splices, and the sum by hand -----------


def by_hand(compressor: Any, parts: list[Any], answer: list[int]) -> float:
    """Minus the log-probability of the answer, token by token, after a spliced prompt."""
    logits = FrozenDecoder(BACKBONE).logits([*parts, TokenIds(tuple(answer))])[-len(answer) - 1 : -1]
    return -sum(float(row.log_softmax(-1)[token]) for row, token in zip(logits, answer, strict=True))


@pytest.mark.parametrize("layout", [None, LAYOUT], ids=["chat template", "own layout"])
def test_pcc_objectives_are_the_prompts_of_the_product(layout: PromptLayout | None, encoder_folder: Path) -> None:
    compressor = pcc(encoder_folder, layout)
    encode, end = BACKBONE.tokenizer.encode, [BACKBONE.config.eos_token_id]
    long = Example("The keeper of Varn painted the red stairs.", " Then he slept.", "Who?", " The keeper.")
    examples = [long, EXAMPLES[0]]
    spans = compressor.compress([Chunk("c", e.context, 0, len(e.context), 1) for e in examples])
    spec = compressor.spec
    assert spans[0].num_slots > compressor.config.slots_per_segment  # inner brackets
    head = [TokenIds(layout.reconstruct_ids)] if layout else []
    both = list(zip(spans, examples, strict=True))
    prompts = {
        BracketedAutoencoding: [(reconstruction_prompt(s, spec), encode(e.context)) for s, e in both],
        BracketedContinuation: [([*head, *enclosed(s, spec)], encode(e.continuation)) for s, e in both],
        BracketedQuestion: [(prompt_parts(BACKBONE, e.question, [enclosed(s, spec)], spec), encode(e.answer))
                            for s, e in both],
    }
    for objective, expected in prompts.items():
        samples = [objective(compressor).from_example(e, random.Random(0)) for e in examples]  # type: ignore[abstract]
        with torch.no_grad():
            loss = summed_bracketed_loss(compressor, samples).item()
        wanted = sum(by_hand(compressor, parts, [*answer, *end]) for parts, answer in expected)
        assert loss == pytest.approx(wanted, rel=1e-5), objective.__name__


def test_icae_objectives_read_the_bos_of_the_layout_except_in_instructions() -> None:
    compressor = icae(LAYOUT)
    encode, end, example = BACKBONE.tokenizer.encode, BACKBONE.config.eos_token_id, EXAMPLES[0]
    ids = encode(example.context)
    samples = {c: c(compressor, **options).from_example(example, random.Random(0)) for c, options in (
        (AutoencodingObjective, {}), (ContinuationObjective, {"max_tokens": 99, "min_tokens": 1, "leave_tokens": 0}),
        (InstructionObjective, {"left_ids": [282], "right_ids": [284]}))}  # type: ignore[arg-type]
    assert [list(s.context_ids) for s in samples.values()] == [[5, *ids], [5, *ids], ids]
    answers = [[x for x in s.labels if x != -100] for s in samples.values()]
    assert answers == [[5, *ids, end], encode(example.continuation), [*encode(example.answer), end]]
    # the slots of `compress` are those that autoencoding trains
    [span] = compressor.compress([Chunk("c", example.context, 0, len(example.context), 1)])
    parts = [span, Delimiter(compressor.spec.delimiters["reconstruct"])]
    with torch.no_grad():
        loss = summed_loss(compressor, [samples[AutoencodingObjective]] * 2).item()
    assert loss == pytest.approx(2 * by_hand(compressor, parts, [5, *ids, end]), rel=1e-5)


def test_a_nested_compressor_is_trained_at_every_factor_and_by_the_seed_alone(tmp_path: Path) -> None:
    config = ICAEConfig(num_memory_tokens=4, segment_tokens=48, compression_factor=2.0, slots="proportional",
                        slot_positions="spread", lora_rank=2, nested=(2.0, 8.0))

    def train(folder: Path) -> ICAECompressor:
        with torch.random.fork_rng():
            torch.manual_seed(6)
            compressor = ICAECompressor(BACKBONE, config)
        stage = Stage("one", (Source(AutoencodingObjective(compressor), EXAMPLES[:2]),), 2, 4, 0.01)
        Trainer(compressor, lambda samples: summed_loss(compressor, samples), [stage], folder).run()
        return compressor

    compressor = train(tmp_path / "a")
    again = trained(train(tmp_path / "b"))
    assert all(torch.equal(again[n], p) for n, p in trained(compressor).items())
    objective, rng = AutoencodingObjective(compressor), random.Random(0)
    length = len(BACKBONE.tokenizer.encode(EXAMPLES[0].context))
    samples = [objective.from_example(EXAMPLES[0], rng) for _ in range(20)]
    slots = {s.compression_factor: s.prompt_ids.count(objective.ids.first_memory) for s in samples}
    assert slots == {2.0: -(-length // 2), 8.0: -(-length // 8)}
    assert all(len(s.prompt_ids) == len(s.labels) for s in samples)
