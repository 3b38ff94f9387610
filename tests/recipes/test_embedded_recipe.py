"""The fast training model computes what the product computes: same logits, same slots, branches as single prompts."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "embedded"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    sys.path.insert(0, str(RECIPE))
    try:
        import train
    finally:
        sys.path.remove(str(RECIPE))
    return train


@pytest.fixture(scope="module")
def model(recipe: ModuleType) -> torch.nn.Module:
    torch.manual_seed(0)
    from model import Shape

    shape = Shape(vocab_size=90, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, lora_rank=4)
    made = recipe.Model(shape)
    with torch.no_grad():
        for p in made.parameters():  # nothing stays zero: every path has to count
            p.add_(torch.randn_like(p) * 0.1)
    return made


def decode(recipe: ModuleType, model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    n = len(ids)
    bias = torch.zeros(1, 1, n, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -1e9)
    nothing = torch.zeros(1, n, dtype=torch.long)
    return model.decode(torch.tensor([ids]), torch.zeros(0, model.shape.hidden_size), nothing.bool(), nothing,
                        torch.arange(n)[None], bias, (nothing[0], torch.arange(n)))


def test_the_exported_llama_gives_the_same_logits(recipe: ModuleType, model: torch.nn.Module) -> None:
    sys.path.insert(0, str(RECIPE))
    import export

    llama = export.build_decoder(model, model.shape, {"bos": 1, "eos": 2, "pad": 0})
    ids = torch.randint(0, 90, (20,)).tolist()
    with torch.no_grad():
        torch.testing.assert_close(decode(recipe, model, ids), llama(torch.tensor([ids])).logits[0], atol=2e-5, rtol=0)


def test_a_question_branch_scores_as_a_prompt_of_its_own(recipe: ModuleType, model: torch.nn.Module) -> None:
    from data import Branch, Row

    rng = random.Random(1)
    context, one, two = ([rng.randrange(3, 90) for _ in range(n)] for n in (9, 7, 5))
    row = Row([1], [(context, None)], [Branch(one, 4, "answer"), Branch(two, 2, "answer")])
    with torch.no_grad():
        outcome = recipe.forward(model, [row], [3])
        expected = 0.0
        for ids, start in ((one, 4), (two, 2)):
            whole = [1, *context, *ids]
            scores = decode(recipe, model, whole).log_softmax(-1)
            begin = 1 + len(context) + start
            expected -= sum(float(scores[i - 1, whole[i]]) for i in range(begin, len(whole)))
    assert outcome.sums["answer"] == pytest.approx(expected, abs=1e-3)
    assert outcome.counts["answer"] == 3 + 3


def test_a_grown_model_computes_the_same_and_all_of_it_learns(recipe: ModuleType, model: torch.nn.Module) -> None:
    sys.path.insert(0, str(RECIPE))
    from grow import grow
    from model import Shape

    torch.manual_seed(2)
    large = grow(model, Shape(vocab_size=90, hidden_size=48, num_layers=3, num_heads=6, intermediate_size=64,
                              lora_rank=4))
    ids = torch.randint(0, 90, (20,)).tolist()
    # not to the last digit: the epsilon of a norm weighs more in a mean over more channels
    torch.testing.assert_close(decode(recipe, large, ids), decode(recipe, model, ids), atol=2e-3, rtol=0)
    slots, _ = recipe.encode_spans(large, [(ids, 4.0)])
    expected, _ = recipe.encode_spans(model, [(ids, 4.0)])
    torch.testing.assert_close(slots[:, :32], expected, atol=2e-3, rtol=2e-3)
    assert not slots[:, 32:].any()
    optimizer = torch.optim.SGD(large.parameters(), lr=0.1)
    for _ in range(3):  # what writes first, then what is read
        optimizer.zero_grad()
        (decode(recipe, large, ids).square().mean() + recipe.encode_spans(large, [(ids, 4.0)])[0].square().mean()
         ).backward()
        optimizer.step()
    still = [n for n, p in large.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    with pytest.raises(ValueError, match="expected sizes of at least"):
        grow(large, model.shape)


def test_slots_sit_on_the_last_token_of_their_piece(recipe: ModuleType) -> None:
    assert recipe.slot_places(8, 2) == [3, 7]
    assert recipe.slot_places(10, 3) == [2, 5, 9]
    assert recipe.num_slots(9, 4.0) == 3


def test_a_step_is_the_same_in_one_process_and_in_two() -> None:
    script = str(Path(__file__).parent / "one_step.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPE.parents[1])}
    said = []
    for command in ([sys.executable, script],
                    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                     script]):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=200)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    alone, together = said
    assert (alone[0], together[0]) == ("1", "2")
    assert [float(x) for x in together[1:]] == pytest.approx([float(x) for x in alone[1:]], rel=1e-4)


@pytest.mark.parametrize("script", ["train", "grow", "resume", "export"])
def test_every_script_explains_itself(script: str) -> None:
    done = subprocess.run([sys.executable, str(RECIPE / f"{script}.py"), "--help"], capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(RECIPE.parents[1])}, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_training_goes_on_from_the_released_folders(recipe: ModuleType) -> None:
    """Logits and slots of the training model are those of the embedded decoder and its compressor."""
    sys.path.insert(0, str(RECIPE))
    from model import PRESETS
    from resume import read_released

    from ctxcomp_rag import Chunk, load_frozen, load_trained_compressor
    from ctxcomp_rag.backbone import embedded_path

    made = recipe.Model(PRESETS["small"])
    read_released(made, embedded_path().parent)
    backbone = load_frozen()
    ids = backbone.tokenizer.encode("The Skellan lighthouse is 31 metres tall.")
    nothing = torch.zeros(1, len(ids), dtype=torch.long)
    bias = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(~torch.ones(len(ids), len(ids)).bool().tril(), -1e9)
    with torch.no_grad():
        logits = made.decode(torch.tensor([ids]), torch.zeros(0, made.shape.hidden_size), nothing.bool(), nothing,
                             torch.arange(len(ids))[None], bias, (nothing[0], torch.arange(len(ids))))
        slots, _ = recipe.encode_spans(made, [(ids, 4.0)])
        expected = backbone.model(torch.tensor([ids])).logits[0]
    span = load_trained_compressor("icae", backbone).compress(
        [Chunk("d", backbone.tokenizer.decode(ids), 0, 10, len(ids))], compression_factor=4.0)[0]
    torch.testing.assert_close(logits, expected.float(), atol=5e-4, rtol=1e-3)
    torch.testing.assert_close(slots, span.embeds.float(), atol=5e-4, rtol=1e-3)  # type: ignore[attr-defined]
