"""The fast training model computes what the product computes: same logits, same slots, branches as single prompts."""

from __future__ import annotations

import copy
import json
import lzma
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import ctxcomp_rag
from ctxcomp_rag import Chunk, SoftSpan, load_frozen, load_trained_compressor
from ctxcomp_rag.compressors.icae import ICAECompressor
from ctxcomp_rag.training.run import nested_from

RECIPE = Path(__file__).parents[2] / "recipes" / "embedded"
ASSETS = Path(ctxcomp_rag.__file__).parent / "assets"


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

    shape = Shape(vocab_size=90, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=48, lora_rank=4)
    made = recipe.Model(shape)
    with torch.no_grad():
        for p in made.parameters():  # nothing stays zero: every path has to count
            p.add_(torch.randn_like(p) * 0.1)
    return made


def decode(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    from packed import Packing

    n = len(ids)
    logits: torch.Tensor = model.decode(torch.tensor(ids), torch.zeros(0, model.shape.hidden_size),
                                        torch.full((n,), -1), torch.arange(n), Packing([(n, ())]), torch.arange(n))
    return logits


def test_the_exported_llama_gives_the_same_logits(recipe: ModuleType, model: torch.nn.Module) -> None:
    sys.path.insert(0, str(RECIPE))
    import export

    llama = export.build_decoder(model, model.shape, {"bos": 1, "eos": 2, "pad": 0})
    ids = torch.randint(0, 90, (20,)).tolist()
    with torch.no_grad():
        torch.testing.assert_close(decode(model, ids), llama(torch.tensor([ids])).logits[0], atol=2e-5, rtol=0)


def test_a_question_branch_scores_as_a_prompt_of_its_own(recipe: ModuleType, model: torch.nn.Module) -> None:
    from data import Branch, Row
    from objective import forward

    rng = random.Random(1)
    context, one, two = ([rng.randrange(3, 90) for _ in range(n)] for n in (9, 7, 5))
    row = Row([1], [(context, None)], [Branch(one, 4, "answer"), Branch(two, 2, "answer")])
    with torch.no_grad():
        outcome = forward(model, [row], [3])
        expected = 0.0
        for ids, start in ((one, 4), (two, 2)):
            whole = [1, *context, *ids]
            scores = decode(model, whole).log_softmax(-1)
            begin = 1 + len(context) + start
            expected -= sum(float(scores[i - 1, whole[i]]) for i in range(begin, len(whole)))
    assert outcome.sums["answer"] == pytest.approx(expected, abs=1e-3)
    assert outcome.counts["answer"] == 3 + 3


def test_slots_are_taught_by_the_exported_decoder_reading_text(recipe: ModuleType, model: torch.nn.Module) -> None:
    """Answers and hidden states of a question; neither reconstructions nor rows that are all text count."""
    sys.path.insert(0, str(RECIPE))
    import export
    from data import Branch, Row
    from layout import slot_places
    from objective import encode_spans, forward

    rng = random.Random(2)
    context, branch, other = ([rng.randrange(3, 90) for _ in range(n)] for n in (9, 7, 5))
    rows = [Row([1], [(context, 3.0)], [Branch([91, *context, 2], 1, "reconstruct"), Branch(branch, 4, "answer")]),
            Row([1], [(context, None)], [Branch(other, 2, "answer")])]
    llama = export.build_decoder(model, model.shape, {"bos": 1, "eos": 2, "pad": 0})
    with torch.no_grad():
        gained = forward(model, rows, [3], taught=0.5).loss - forward(model, rows, [3]).loss
        slots, _ = encode_spans(model, [(context, 3.0)])
        embed = llama.get_input_embeddings()
        text = llama(torch.tensor([[1, *context, *branch]]), output_hidden_states=True)
        places = torch.tensor([[0, *(1 + p for p in slot_places(9, 3)), *range(10, 17)]])
        rows_in = torch.cat([embed(torch.tensor([1])), slots, embed(torch.tensor(branch))])[None]
        spans = llama(inputs_embeds=rows_in, position_ids=places, attention_mask=torch.ones(1, 11),
                      output_hidden_states=True)
        wanted, got = (x.logits[0, -4:-1].log_softmax(-1) for x in (text, spans))  # predict tokens 4, 5 and 6
        expected = (wanted.exp() * (wanted - got)).sum() / 3
        for layer in range(1, 4):
            wanted, got = (x.hidden_states[layer][0, -7:] for x in (text, spans))
            expected += (got - wanted).square().sum() / 7 / wanted.square().sum(-1).mean()
    assert float(gained) == pytest.approx(0.5 * float(expected), rel=1e-3)


def test_packed_rows_attend_as_one_masked_square_each(recipe: ModuleType) -> None:
    from packed import Packing

    torch.manual_seed(0)
    rows: list[tuple[int, list[int]]] = [(5, [3, 1, 4]), (2, []), (1, [2])]
    total = sum(context + sum(branches) for context, branches in rows)
    q, k, v = torch.randn(3, total, 2, 8)
    expected, begin = [], 0
    for context, branches in rows:
        part = torch.tensor([0] * context + [n for n, length in enumerate(branches, 1) for _ in range(length)])
        see = ((part == 0) | (part == part[:, None])) & torch.ones(len(part), len(part)).tril().bool()
        one, two, three = (x[begin : begin + len(part)].transpose(0, 1) for x in (q, k, v))
        scores = (one @ two.mT * 8**-0.5).masked_fill(~see, -torch.inf)
        expected.append((scores.softmax(-1) @ three).transpose(0, 1).flatten(1))
        begin += len(part)
    torch.testing.assert_close(Packing(rows).attend(q, k, v), torch.cat(expected), atol=1e-5, rtol=0)


def test_an_answer_token_weighs_the_same_whatever_the_kind(recipe: ModuleType) -> None:
    from objective import KINDS, READ_WEIGHT, token_weights

    counts = dict.fromkeys(KINDS, 0) | {"answer": 170, "answer-home": 4, "reconstruct": 24, "cloze": 40, "lm": 800}
    weights = token_weights(counts)
    assert weights["answer-home"] == weights["answer"] == 4 * weights["reconstruct"] == 2 * weights["cloze"]
    read = sum(weights[k] * counts[k] for k in ("answer", "answer-home", "reconstruct", "cloze"))
    assert read == pytest.approx(READ_WEIGHT)
    assert weights["lm"] * 800 == pytest.approx(0.3)


def test_where_to_look_is_asked_of_the_exported_decoders_own_attention(recipe: ModuleType,
                                                                       model: torch.nn.Module) -> None:
    """The first head of the second layer for words of the question, all of the last but one for the answer."""
    sys.path.insert(0, str(RECIPE))
    import export
    from data import Branch, Row
    from objective import forward

    rng = random.Random(3)
    context = rng.sample(range(10, 60), 7)
    context += [context[1], 9, 9, 9]  # one token stands twice, one too often to tell anything
    answer = context[4:6]
    asked = [3, context[1], 9]
    row = Row([1], [(context, None)], [Branch([*asked, *answer, 2], 3, "answer", stands=(0, 4))])
    llama = export.build_decoder(model, model.shape, {"bos": 1, "eos": 2, "pad": 0})
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        outcome = forward(model, [row], [3])
        seen = llama(torch.tensor([[1, *context, *asked, *answer, 2]]), output_attentions=True).attentions
    last = 1 + len(context) + len(asked) - 1
    expected = {"match": seen[1][0, :1, last - 1, [2, 8]].sum(1), "point": seen[-2][0, :, last, 5],
                "follow": seen[-2][0, :, last + 1, 6]}
    for kind, laid in expected.items():
        assert outcome.counts[kind] == 1
        assert outcome.sums[kind] == pytest.approx(-float(laid.log().mean()), abs=1e-4)


def test_a_word_of_the_question_looks_at_the_slot_that_holds_it(recipe: ModuleType) -> None:
    from data import Branch, Row
    from layout import Point, Span, lay_out

    row = Row([1], [([5, 6, 7, 8], 2.0)], [Branch([7, 3, 8, 2], 2, "answer", stands=(0, 3))])
    assert lay_out(row, [3], {0: Span(0, [1, 3])}).points == [Point(3, (2,), "match"),
                                                              Point(4, (2,), "point", token=1, tokens=2)]


def test_tokens_of_a_slot_are_dealt_out_to_the_heads_that_copy(recipe: ModuleType, model: torch.nn.Module) -> None:
    """A head without the wanted token looks at the row's first column."""
    sys.path.insert(0, str(RECIPE))
    import export
    from data import Branch, Row
    from objective import encode_spans, forward

    ids = random.Random(3).sample(range(10, 60), 8)
    row = Row([1], [(ids, 4.0)], [Branch([9, 7, ids[6], 2], 2, "answer", stands=(0, 6))])
    llama = export.build_decoder(model, model.shape, {"bos": 1, "eos": 2, "pad": 0})
    llama.set_attn_implementation("eager")
    heads = model.shape.num_heads
    with torch.no_grad():
        outcome = forward(model, [row], [3])
        slots, _ = encode_spans(model, [(ids, 4.0)])
        embed = llama.get_input_embeddings()
        inputs = torch.cat([embed(torch.tensor([1])), slots, embed(torch.tensor([9, 7, ids[6], 2]))])
        seen = llama(inputs_embeds=inputs[None], position_ids=torch.tensor([[0, 4, 8, 9, 10, 11, 12]]),
                     output_attentions=True).attentions[-2][0, :, 4]
        alike = forward(model, [row], [3], dealt=False)
    looked_at = [2 if head * 4 // heads == 2 else 0 for head in range(heads)]  # the third token of the second slot
    assert outcome.sums["point"] == pytest.approx(-float(seen[range(heads), looked_at].log().mean()), abs=1e-4)
    assert alike.sums["point"] == pytest.approx(-float(seen[:, 2].log().mean()), abs=1e-4)


def test_the_first_token_of_an_answer_is_asked_for_apart_where_it_is_hard_to_find(recipe: ModuleType) -> None:
    from data import Branch, Row
    from layout import lay_out

    branch = Branch([7, 3, 8, 6, 2], 2, "answer")
    for source, kinds in (("squad", ["answer-first", "answer", "answer"]), ("fictional", ["answer-home"] * 3),
                          ("fictional-several", ["answer-first", "answer-several", "answer-several"]),
                          ("fictional-short", ["answer-first", "answer-short", "answer-short"])):
        targets = lay_out(Row([1], [([5, 6, 7, 8], None)], [branch], source=source), [3], {}).targets
        assert [kind for _, _, kind, _ in targets] == ["question", *kinds]


@pytest.mark.parametrize(("heads", "tokens"), [(4, 1), (4, 2), (4, 3), (4, 4), (4, 6), (4, 16), (1, 4)])
def test_no_head_is_idle_and_every_token_of_a_slot_has_a_head(recipe: ModuleType, heads: int, tokens: int) -> None:
    from objective import has_token

    of_head = [{token for token in range(tokens) if has_token(head, heads, token, tokens)} for head in range(heads)]
    assert set().union(*of_head) == set(range(tokens))
    assert min(map(len, of_head)) == max(1, tokens // heads)
    assert sum(map(len, of_head)) == max(heads, tokens)  # shared only where there are more heads than tokens


def test_tokens_of_a_document_and_questions_about_it_look_at_its_name(recipe: ModuleType) -> None:
    from data import Branch, Row
    from layout import Point, Span, lay_out

    about_it = Branch([30, 31, 32, 4, 2], 3, "answer", stands=(1, 4), name=(1, 1))
    row = Row([1], [([5, 6, 7, 8], None), ([8, 7, 6, 5, 4, 3], 2.0)], [about_it],
              names=[[(1, 2)], [(0, 2), (5, 5)]])
    flat = lay_out(row, [3], {1: Span(0, [1, 3, 5])})  # bos, four tokens, a separator, three slots, the branch
    assert flat.points[:2] == [Point(4, (2, 3), "bind"), Point(8, (6, 7), "bind")]
    assert flat.points[2:] == [Point(11, (10,), "who"), Point(11, (6, 7, 8), "ask"),
                               Point(11, (8,), "point", token=0, tokens=2)]


def test_a_documents_name_is_found_in_its_tokens(recipe: ModuleType) -> None:
    from data import Corpus
    from tokenizers import Tokenizer, models, pre_tokenizers

    from ctxcomp_rag.evaluation.fictional import generate_document

    corpus = Corpus.__new__(Corpus)
    corpus.eos = 0
    corpus.tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(
        sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    corpus.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    document = generate_document(random.Random(4), "train")
    found = corpus.mentions(document.text, document.subject)
    assert {document.text[first : last + 1] for first, last in found} == {document.subject}  # a token is a letter
    assert len(found) == document.text.count(document.subject) > 1
    before, after = "<|bos|>Well: ", "<|end|>"
    asked = corpus.about(document.subject, document.questions[0], before + "{q}" + after)
    first, last = asked.name
    assert (before + document.questions[0].question)[first : last + 1] == document.subject


def test_a_text_is_gone_on_with_after_a_few_of_its_tokens(recipe: ModuleType) -> None:
    from data import NATIVE, Corpus, Row
    from layout import Span, lay_out
    from tokenizers import Tokenizer, models, pre_tokenizers

    corpus = Corpus.__new__(Corpus)
    corpus.tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(
        sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    corpus.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    before, after = map(corpus.ids, NATIVE[1].split("{q}"))
    text = random.Random(0).sample(range(300, 400), 40)
    corpus.eos, corpus.full_stops = 2, {text[25]}
    branches = corpus.recall_branches(random.Random(1), text, 200, NATIVE[1])
    for branch in branches:
        part, first = branch.stands
        cue = branch.ids[len(before) : branch.answer_start - len(after)]
        told = branch.ids[branch.answer_start :]
        assert branch.ids == [*before, *cue, *after, *told]
        said = 25 - first if 0 < 25 - first < 24 else min(24, 40 - first)  # to the sentence's end, or 24 tokens
        assert told == text[first : first + said] + ([2] if first + said == 25 else [])
        assert text[first - len(cue) : first] == cue
        assert (part, branch.kind) == (0, "recall")
    assert {branch.stands[1] for branch in branches} == set(range(3, 32))
    assert corpus.recall_branches(random.Random(1), text[:20], 2, NATIVE[1]) == []
    flat = lay_out(Row([], [(text, 4.0)], branches[:1]), [], {0: Span(0, [*range(3, 40, 4)])})
    told = branches[0].ids[branches[0].answer_start :]
    assert [(label, kind) for _, label, kind, _ in flat.targets] == [(token, "recall") for token in told]


def test_a_reconstruction_is_asked_for_whole_where_some_of_its_own_past_is_wrong(recipe: ModuleType) -> None:
    from data import MISHEARD, Corpus, Row
    from layout import Span, lay_out
    from tokenizers import Tokenizer, models

    corpus = Corpus.__new__(Corpus)
    corpus.tokenizer = Tokenizer(models.BPE(vocab={str(i): i for i in range(4096)}, merges=[]))
    corpus.eos = 2
    text = random.Random(0).sample(range(6, 4096), 2000)
    branch = corpus.reconstruction(random.Random(1), text, 4097)
    flat = lay_out(Row([], [(text, 4.0)], [branch]), [], {0: Span(0, [*range(3, 2000, 4)])})
    assert [label for _, label, _, _ in flat.targets] == [*text, 2]
    read = flat.ids[flat.context :]
    assert (read[0], read[-1], len(read)) == (4097, 2, 2002)
    assert sum(a != b for a, b in zip(read[1:-1], text, strict=True)) / 2000 == pytest.approx(MISHEARD, abs=0.02)
    assert len(flat.points) == 2000


def test_a_reconstruction_follows_the_slots_that_hold_its_tokens(recipe: ModuleType) -> None:
    from data import Branch, Row
    from layout import Span, lay_out

    row = Row([1], [([7] * 10, 4.0)], [Branch([91, *[7] * 10, 2], 1, "reconstruct", stands=(0, 0))])
    flat = lay_out(row, [3], {0: Span(0, [2, 5, 9])})
    assert [point.column for point in flat.points] == list(range(4, 14))  # [1], three slots, then [AE]
    assert [point.targets[0] - 1 for point in flat.points] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [(point.token, point.tokens) for point in flat.points[2:7]] == [(2, 3), (0, 3), (1, 3), (2, 3), (0, 4)]
    assert {point.kind for point in flat.points} == {"follow"}


@pytest.mark.parametrize(("length", "slots"), [(8, 2), (10, 3), (7, 7), (112, 28), (5, 1)])
def test_a_token_is_held_by_the_first_slot_behind_it(recipe: ModuleType, length: int, slots: int) -> None:
    from layout import Span, slot_places

    places = slot_places(length, slots)
    expected = [next(j for j, p in enumerate(places) if p >= token) for token in range(length)]
    assert [Span(0, places).holder(token) for token in range(length)] == expected


def test_an_answer_stands_somewhere_only_if_the_context_states_it_once(recipe: ModuleType) -> None:
    from data import Branch, Row

    def where(answer: list[int]) -> tuple[int, int] | None:
        row = Row([], [([5, 6, 7], None), ([8, 6, 9, 6], 4.0)], [Branch([3, *answer, 2], 1, "answer")])
        row.find_answers()
        stands: tuple[int, int] | None = row.branches[0].stands
        return stands

    assert where([6, 9]) == (1, 1)
    assert where([5]) == (0, 0)
    assert where([6]) is None
    assert where([6, 8]) is None


def test_a_cloze_question_lacks_its_answer_which_the_text_states(recipe: ModuleType) -> None:
    from cloze import cloze_questions

    text = ("The Battle of Brandywine was fought near Chadds Ford on 11 September 1777. Afterwards the army of General "
            "Howe marched to Philadelphia, where 26 ships waited. Rain fell.")
    pairs = [pair for seed in range(40) for pair in cloze_questions(random.Random(seed), text, 2)]
    assert {"1777", "26", "Chadds Ford", "Philadelphia"} <= {answer for _, answer in pairs}
    for question, answer in pairs:
        assert answer in text
        assert answer not in question.split()
        assert question.endswith("?")
        assert question.removesuffix("?").lower() not in text.lower()  # it asks; it does not only repeat
    years = {question.split()[0] for question, answer in pairs if answer == "1777"}
    assert years & {"When", "What"}


def test_tokens_in_like_company_get_like_embeddings(recipe: ModuleType) -> None:
    from cooccurrence import embeddings_from_counts

    rng = random.Random(0)
    texts = []
    for _ in range(400):  # 0 to 4 stand between 10 and 11, 5 to 9 between 12 and 13
        low = rng.random() < 0.5
        texts.append([10, rng.randrange(5), 11] if low else [12, rng.randrange(5, 10), 13])
    torch.manual_seed(0)
    rows = embeddings_from_counts(texts, 14, 8, norm=0.3, share=1.0)
    assert rows.norm(dim=1).tolist() == pytest.approx([0.3] * 14)
    alike = rows[:10] @ rows[:10].T / 0.09
    assert alike[:5, :5].min() > 0.9
    assert alike[5:, 5:].min() > 0.9
    assert alike[:5, 5:].max() < 0


def test_counts_end_with_the_text(recipe: ModuleType) -> None:
    from cooccurrence import count_pairs

    next_to, next_but_one, near = count_pairs([[0, 1, 2, 0], [2, 1]], 3)
    assert next_to.tolist() == [[0, 1, 0], [0, 0, 1], [1, 1, 0]]
    assert next_but_one.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert near.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_an_untrained_decoder_has_heads_that_look_back(recipe: ModuleType) -> None:
    sys.path.insert(0, str(RECIPE))
    import export
    from model import Shape
    from positional import HEADS, set_positional_heads

    torch.manual_seed(0)
    made = recipe.Model(Shape(vocab_size=90, num_layers=4))
    lengths = made.embed.norm(dim=1)
    set_positional_heads(made)
    torch.testing.assert_close(made.embed.norm(dim=1), lengths)
    llama = export.build_decoder(made, made.shape, {"bos": 1, "eos": 2, "pad": 0})
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        seen = llama(torch.randint(3, 90, (1, 120)), output_attentions=True).attentions
    back = torch.arange(120)[:, None] - torch.arange(120)
    for block, head, distance, width, _ in HEADS:
        inside = (back >= max(0, distance - width)) & (back <= distance + 1.5 * width)
        assert float((seen[block][0, head] * inside)[60:].sum(1).mean()) > 0.85, (block, head)
        top = seen[block][0, head][60:].sum(0)
        assert float(top.max()) < 3  # no single token draws the looks


@pytest.mark.parametrize("limit", [1.0, 4.0, 16.0])
def test_the_curriculum_begins_at_1x_and_keeps_to_its_largest_factor(recipe: ModuleType, limit: float) -> None:
    from mix import FICTIONAL, draw_factor

    rng = random.Random(0)
    drawn = {p: [draw_factor(rng, p, limit, FICTIONAL) for _ in range(200)] for p in (0.0, 0.3, 0.6, 0.8, 1.0)}
    assert drawn[0.0] == [1.0] * 200
    assert all(1 <= factor <= limit for factors in drawn.values() for factor in factors)
    assert max(drawn[1.0]) == limit


def test_slots_sit_on_the_last_token_of_their_piece(recipe: ModuleType) -> None:
    from layout import num_slots, slot_places

    assert slot_places(8, 2) == [3, 7]
    assert slot_places(10, 3) == [2, 5, 9]
    assert num_slots(9, 4.0) == 3


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


def test_the_rate_of_the_joint_stage_falls_several_times(recipe: ModuleType) -> None:
    from schedule import FALLS, Schedule

    schedule = Schedule(joint=1000, warmup=10)
    assert schedule.ends() == [560, 800, 940, 1000]
    for begin, end, (_, first, last) in zip([0, *schedule.ends()], schedule.ends(), FALLS, strict=False):
        rates = [schedule.learning_rate("joint", step) for step in range(begin, end)]
        assert rates[0] == pytest.approx(first / 10)  # from the first of ten steps of warm-up
        assert max(rates) == first
        assert rates[(end - begin) // 2 - 1] == first
        assert rates[-1] == pytest.approx(last, abs=2 * first / (end - begin))
        assert rates[10:] == sorted(rates[10:], reverse=True)


def test_released_weights_go_on_with_one_fall_and_no_curriculum(recipe: ModuleType) -> None:
    from schedule import MORE_FALLS, Schedule

    schedule = Schedule(joint=100, warmup=10, begun=True)
    ((_, first, last),) = MORE_FALLS
    assert schedule.ends() == [100]
    assert schedule.learning_rate("joint", 0) == pytest.approx(first / 10)
    assert schedule.learning_rate("joint", 50) == first
    assert schedule.learning_rate("joint", 99) == pytest.approx(last, abs=2 * first / 50)
    assert (schedule.progress("joint", 0), schedule.naming("joint", 0)) == (1.0, 0.0)


@pytest.fixture(scope="module")
def corpus(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One text of SQuAD in two articles, and the generator's documents."""
    from data import Corpus

    text = "The Alborz lighthouse was built by Ana Ruiz in 1904. It is 31 m tall; 12 keepers lived there until 1950."
    asked = {"question": "Who built the lighthouse?", "answers": [{"text": "Ana Ruiz", "answer_start": 35}]}
    articles = {"data": [{"paragraphs": [{"context": text, "qas": [asked]}]} for _ in range(2)]}
    folder = tmp_path_factory.mktemp("squad")
    with lzma.open(folder / "squad-train-v1.1.json.xz", "wt", encoding="utf-8") as file:
        json.dump(articles, file)
    made = Corpus(Tokenizer.from_file(str(ASSETS / "decoder" / "tokenizer.json")), folder, wiki_files=0)
    made.wiki = [made.ids(text) * 2]
    return made


def test_of_squads_rows_a_share_is_drilled_in_what_is_asked_of_any_text(corpus: Any) -> None:
    for drilled, drills in ((0.0, set()), (1.0, {"recall", "reconstruct", "cloze"})):
        rng = random.Random(0)
        rows = [corpus.single_row(rng, "squad", 4.0, 4097, drilled) for _ in range(30)]
        assert {b.kind for row in rows for b in row.branches} == {"answer", *drills}
        assert all(any(b.kind == "reconstruct" for b in row.branches) == bool(drilled) for row in rows)


@pytest.mark.parametrize("stage", ["text", "joint", "answers", "documents", "nested", "compressor"])
def test_a_step_has_the_rows_that_its_mix_names(corpus: Any, stage: str) -> None:
    from mix import MIXES, step_rows

    mix, rng = MIXES[stage], random.Random(0)
    steps = [step_rows(corpus, stage, rng, 1.0, 1.0, 4096, 16.0, 1.0, 2) for _ in range(8)]
    for rows in steps:
        alone = Counter((row.source, row.parts[0][1] is None) for row in rows if len(row.parts) == 1)
        alone.pop(("random", True), None)
        together = Counter(row.source.partition("-")[0] for row in rows if "-" in row.source)
        assert alone == {(source, True): n for source, n in mix.text.items()} | {
            (source, False): n for source, n in mix.slots.items()}
        assert together == mix.together
    factors = {f for rows in steps for row in rows if row.source == "fictional-several" for _, f in row.parts}
    assert factors
    assert factors <= ({None} if stage == "text" else {None, *mix.factors["several"]})
    halved = step_rows(corpus, stage, rng, 1.0, 0.5, 4096, 8.0, 0.0, 2)
    assert {row.source.partition("-")[0] for row in halved} <= {"fictional", "random"}  # no English
    assert all(f is None or f <= 8 for row in halved for _, f in row.parts)


def test_half_of_several_documents_of_one_kind_have_names_alike(corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import data

    likeness = data.likeness
    assert likeness("Comet Drirro", "Comet Drirro") == 1
    assert likeness("comet drirro", "Comet Drirnel") > likeness("Comet Drirro", "Comet Wollot") > 0
    assert likeness("Abo", "Xu") == 0
    rng = random.Random(0)
    document = corpus.fictional(rng)[1]
    like = [corpus.fictional_like(rng, document) for _ in range(10)]
    others = [corpus.fictional(rng, document.kind)[1] for _ in range(40)]
    assert {d.kind for d in like} == {document.kind}
    assert document.subject not in {d.subject for d in like}
    assert min(likeness(d.subject, document.subject) for d in like) > fmean(
        likeness(d.subject, document.subject) for d in others)
    drawn: list[str] = []
    monkeypatch.setattr(corpus, "fictional_like", lambda rng, other: drawn.append(other.kind) or document)
    for _ in range(200):
        corpus.several_row(rng, "fictional", [4.0, 4.0])
    assert 50 < len(drawn) < 100  # half of the three in four that are of one kind


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(RECIPE / "train.py"), "--data", str(tmp_path), "--out", str(tmp_path),
                           "--begin", str(tmp_path)], capture_output=True, text=True, check=False, timeout=200,
                          env={**os.environ, "PYTHONPATH": str(RECIPE.parents[1])})
    assert done.returncode == 2
    assert "there is no decoder/model.safetensors; give the folder that export.py wrote" in done.stderr


def test_training_goes_on_from_the_very_weights_that_the_package_loads(recipe: ModuleType) -> None:
    from model import Shape
    from objective import encode_spans
    from released import load_released

    backbone = load_frozen("embedded")
    model = recipe.Model(Shape())
    load_released(model, ASSETS)
    chunk = Chunk("d", "The Alborz lighthouse was built in 1904 by Ana Ruiz.", 0, 52, 16)
    ids = backbone.tokenizer.encode(chunk.text)
    with torch.no_grad():
        torch.testing.assert_close(decode(model, ids), backbone.model(torch.tensor([ids])).logits[0], atol=1e-3, rtol=0)
        slots, _ = encode_spans(model, [(ids, 4.0)])
    span = load_trained_compressor("icae", backbone).compress([chunk], compression_factor=4.0)[0]
    assert isinstance(span, SoftSpan)
    torch.testing.assert_close(slots, span.embeds, atol=1e-3, rtol=0)


def test_nested_slots_are_those_that_the_package_makes(recipe: ModuleType) -> None:
    from kept import MEMORIES
    from model import Shape
    from released import load_released

    backbone = load_frozen("embedded")
    kind, encode = MEMORIES["nested"]
    model = kind(Shape())
    load_released(model, ASSETS)
    released = load_trained_compressor("icae", backbone)
    assert isinstance(released, ICAECompressor)
    nested = nested_from(released, (4.0, 8.0, 16.0))
    texts = ["The Alborz lighthouse was built in 1904 by Ana Ruiz.", "Nothing else is known about it, and nobody asks."]
    ids = [backbone.tokenizer.encode(text) for text in texts]
    for factor in (4.0, 8.0, 16.0):
        spans = nested.compress([Chunk("d", t, 0, len(t), 1) for t in texts], compression_factor=factor)
        with torch.no_grad():
            slots, places = encode(model, [(i, factor) for i in ids])
        assert places == [span.positions.tolist() for span in spans]
        torch.testing.assert_close(slots, torch.cat([span.embeds for span in spans]), atol=1e-3, rtol=0)


def test_a_control_learns_its_compressor_at_the_rate_of_the_joint_stage(recipe: ModuleType) -> None:
    from schedule import Schedule

    assert Schedule(joint=0, compressor=500).learning_rate("compressor", 100) == 0.5
    assert Schedule(joint=500, compressor=500).learning_rate("compressor", 100) == 0.2


def test_what_the_falls_end_with_is_averaged(recipe: ModuleType, model: torch.nn.Module, tmp_path: Path) -> None:
    from model import Model

    before, ends = {k: v.clone() for k, v in model.state_dict().items()}, []
    for number in range(2):
        end = Model(model.shape)
        end.load_state_dict({k: v + number + 1 for k, v in before.items()})
        ends.append(tmp_path / f"{number}.safetensors")
        recipe.save(end, recipe.make_optimizers(end, "joint", recipe.Schedule()), ends[-1], {})
    averaged = copy.deepcopy(model)
    recipe.average(averaged, ends)
    for name, value in averaged.state_dict().items():
        assert torch.allclose(value, before[name] + 1, atol=1e-5)
    leaning = copy.deepcopy(model)
    recipe.average(leaning, ends, own=0.8)
    for name, value in leaning.state_dict().items():
        assert torch.allclose(value, before[name] + 0.3, atol=1e-5)


@pytest.mark.parametrize("script", ["train", "export"])
def test_every_script_explains_itself(script: str) -> None:
    done = subprocess.run([sys.executable, str(RECIPE / f"{script}.py"), "--help"], capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(RECIPE.parents[1])}, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
