"""The control's memory: entries of the tokens that a scorer chooses, which the decoder reads as it reads its cache."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache

RECIPE = Path(__file__).parents[2] / "recipes" / "embedded"


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPE))


@pytest.fixture
def keeper(recipe: None) -> torch.nn.Module:
    """Small random weights; LoRA has not begun."""
    from kept import Keeper
    from model import Shape

    torch.manual_seed(0)
    made = Keeper(Shape(vocab_size=90, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=48, lora_rank=4))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_b" not in name:
                p.add_(torch.randn_like(p) * 0.1)
    return made


def test_all_entries_answer_as_the_text_does(keeper: torch.nn.Module) -> None:
    from data import Branch, Row
    from kept import encode_kept
    from objective import forward

    ids = random.Random(1).choices(range(3, 90), k=11)
    branch = Branch([8, 7, 6, 5, 2], 2, "answer")
    with torch.no_grad():
        text, entries = (forward(keeper, [Row([], [(ids, factor)], [branch])], [3], encode=encode_kept)
                         for factor in (None, 1.0))
    assert entries.sums["answer"] == pytest.approx(text.sums["answer"], abs=1e-4)


def test_kept_entries_are_those_of_the_decoders_cache_at_their_positions(keeper: torch.nn.Module) -> None:
    import export
    from data import Branch, Row
    from kept import encode_kept
    from objective import forward

    ids = random.Random(2).choices(range(3, 90), k=12)
    branch = [8, 7, 6, 2]
    llama = export.build_decoder(keeper, keeper.shape, {"bos": 1, "eos": 2, "pad": 0})
    with torch.no_grad():
        outcome = forward(keeper, [Row([], [(ids, 4.0)], [Branch(branch, 2, "answer")])], [3], encode=encode_kept)
        _, (kept,) = encode_kept(keeper, [(ids, 4.0)])
        whole = llama(torch.tensor([ids]), use_cache=True).past_key_values
        cache = DynamicCache()
        for number, layer in enumerate(whole.layers):
            cache.update(layer.keys[:, :, kept], layer.values[:, :, kept], number)
        logits = llama(torch.tensor([branch]), past_key_values=cache, position_ids=torch.arange(12, 16)[None],
                       attention_mask=torch.ones(1, 7)).logits[0].log_softmax(-1)
    assert len(kept) == 3
    assert outcome.sums["answer"] == pytest.approx(-float(logits[1, 6] + logits[2, 2]), abs=1e-4)


def test_what_is_kept_scores_above_what_is_not(keeper: torch.nn.Module) -> None:
    from kept import encode_kept

    texts = [random.Random(n).choices(range(3, 90), k=10 + n) for n in (3, 4)]
    entries, kept = encode_kept(keeper, [(texts[0], 4.0), (texts[1], 2.0)])
    assert entries.shape == (4, 4 + 7, 2, 4, 8)
    for scores, tokens in zip(keeper.scores(texts), kept, strict=True):
        assert tokens == sorted(tokens)
        left = [i for i in range(len(scores)) if i not in tokens]
        assert scores[tokens].min() > scores[left].max()


def test_gradients_reach_lora_and_no_weight_of_the_scorer(keeper: torch.nn.Module) -> None:
    from data import Branch, Row
    from kept import encode_kept
    from objective import forward

    ids = random.Random(4).choices(range(3, 90), k=12)
    rows = [Row([1], [(ids, 3.0)], [Branch([8, 7, 6, 2], 2, "answer")])]
    forward(keeper, rows, [3], taught=1.0, guided=False, encode=encode_kept).loss.backward()
    assert float(keeper.blocks[1].lora_b["k_proj"].grad.abs().max()) > 0
    assert all(p.grad is None for p in keeper.scorer.parameters())


def test_answers_and_the_name_are_labelled(recipe: None) -> None:
    from data import Corpus
    from kept import home_text

    from ctxcomp_rag.evaluation.fictional import generate_document

    corpus = Corpus.__new__(Corpus)
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    corpus.tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    corpus.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # a token is a letter
    document = generate_document(random.Random(5), "held_out")
    corpus.fictional = lambda rng: (corpus.ids(document.text), document)
    ids, wanted = home_text(corpus, random.Random(0))
    assert len(ids) == len(wanted) == len(document.text)
    for answer in (q.answer for q in document.questions):
        begin = document.text.index(answer)
        assert wanted[begin : begin + len(answer)].tolist() == [1.0] * len(answer)
    begin = document.text.index(document.subject)
    assert set(wanted[begin : begin + len(document.subject)].tolist()) <= {0.5, 1.0}
    assert wanted.unique().tolist() == pytest.approx([0.0, 0.1, 0.5, 1.0])


def test_rows_lose_what_asks_for_a_text_word_by_word(recipe: None) -> None:
    from data import Branch, Row
    from kept import without_wording

    kinds = ("answer", "reconstruct", "recall", "cloze")
    row = Row([], [([5], 4.0)], [Branch([4, 5], 1, kind) for kind in kinds])
    assert [b.kind for b in without_wording(row).branches] == ["answer", "cloze"]


def test_a_stage_that_tells_no_head_where_to_look_has_no_such_loss(keeper: torch.nn.Module) -> None:
    from data import Branch, Row
    from kept import encode_kept
    from objective import forward

    rows = [Row([1], [([5, 6, 7, 8], 2.0)], [Branch([7, 3, 8, 2], 2, "answer", stands=(0, 3))])]
    told, left = (forward(keeper, rows, [3], guided=guided, encode=encode_kept) for guided in (True, False))
    assert told.sums["point"] > 0
    assert left.sums["point"] == 0
    assert left.sums["answer"] == told.sums["answer"]
    assert left.loss < told.loss


def test_a_checkpoint_is_not_written_over(recipe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    import kept

    (tmp_path / "checkpoint.safetensors").write_bytes(b"trained")
    monkeypatch.setattr("sys.argv", ["kept.py", "--data", "DATA", "--begin", "no", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        kept.main()
    assert "expected a new folder, got" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == b"trained"
