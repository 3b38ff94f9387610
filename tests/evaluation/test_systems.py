"""The compared systems see the same chunks in prompts that differ only in what stands for them."""

from __future__ import annotations

import pytest
import torch

from ctxcomp_rag.chunking import Chunk, Document, split_document
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.decoding import FrozenDecoder, GenerationSettings
from ctxcomp_rag.decoding.quoting import Quoting
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.home_ground import chunk_with
from ctxcomp_rag.evaluation.systems import (
    PREROLLED,
    Comparison,
    Question,
    default_systems,
    further_systems,
    quoted_systems,
)
from ctxcomp_rag.evaluation.timing import cache_bytes, time_to_first_token
from tests.tiny_models import tiny_backbone

BACKBONE = tiny_backbone("llama")
CONFIG = ICAEConfig(num_memory_tokens=1, segment_tokens=64, slots="proportional", slot_positions="spread",
                    delimiters=("reconstruct",), lora_rank=2)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    torch.manual_seed(0)
    return Comparison(ICAECompressor(BACKBONE, CONFIG), FrozenDecoder(BACKBONE), GenerationSettings(max_new_tokens=4))


def chunk(text: str) -> Chunk:
    return split_document(Document(text[:3], text), BACKBONE.tokenizer, max_tokens=64)[0]


QUESTIONS = [Question("how?", ("so",), (chunk("the ship is in the harbour"), chunk("an other one"))),
             Question("why?", ("so",), (chunk("and the"),))]


def test_every_system_takes_the_positions_that_its_name_says(comparison: Comparison) -> None:
    usage = {s.name: [g.usage for g in comparison.ask(s, QUESTIONS)] for s in [*default_systems(), *PREROLLED]}
    base = [u.positions for u in usage["no_context"]]
    source = [sum(c.num_tokens for c in q.chunks) for q in QUESTIONS]
    separators = [2, 0]  # "\n\n" between two chunks
    assert [u.positions for u in usage["full_text"]] == [b + s + x for b, s, x in zip(base, source, separators,
                                                                                     strict=True)]
    for factor in (4, 8, 16):
        slots = [sum(-(-c.num_tokens // factor) for c in q.chunks) for q in QUESTIONS]
        assert [u.slots for u in usage[f"{factor}x"]] == slots
    assert [u.positions for u in usage["truncated_4x"]] == [u.positions for u in usage["4x"]]
    for system in PREROLLED:
        assert [u.positions for u in usage[system.name]] == [u.positions for u in usage["4x"]]


def test_prerolled_spans_blended_as_a_whole_answer_as_the_spans(comparison: Comparison) -> None:
    spans, whole = default_systems()[1], PREROLLED[-1]
    assert (spans.name, whole.blend) == ("4x", 1.0)
    for question in QUESTIONS:
        expected, got = (comparison.decoder.logits(comparison.prompt(s, question))[-3:] for s in (spans, whole))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_answers_come_in_the_questions_order_and_equal_single_ones(comparison: Comparison) -> None:
    for system in [*default_systems(), *PREROLLED]:
        together = comparison.ask(system, QUESTIONS)
        assert together == [comparison.ask(system, [q])[0] for q in QUESTIONS]


def test_a_system_that_quotes_reads_the_same_and_says_words_of_its_chunks(comparison: Comparison) -> None:
    quoted = quoted_systems(default_systems())
    assert [s.name for s in quoted] == ["full_text_quoted", "4x_quoted", "8x_quoted", "16x_quoted",
                                        "truncated_4x_quoted"]
    assert further_systems({}, [4, 8, 16], quote=True) == quoted
    for free, system in zip(default_systems(), quoted, strict=False):
        answers = comparison.ask(system, QUESTIONS)
        assert [a.usage for a in answers] == [a.usage for a in comparison.ask(free, QUESTIONS)]
        assert answers == [comparison.ask(system, [q])[0] for q in QUESTIONS]
        for answer, question in zip(answers, QUESTIONS, strict=True):
            quoting = Quoting([c.text for c in question.chunks], ["not stated"])
            assert quoting.may_begin(answer.text)


def test_the_right_chunk_is_the_one_that_states_the_answer() -> None:
    chunks = [Chunk("a", "lit in 1904", 0, 11, 3), Chunk("a", " it is 31 metres", 11, 27, 3), Chunk("b", "31", 0, 2, 1)]
    assert chunk_with("31 metres", "a", chunks) is chunks[1]
    assert chunk_with("nowhere", "b", chunks) is chunks[2]


def test_timing_measures_every_prompt_and_bytes_follow_the_shape() -> None:
    decoder = FrozenDecoder(BACKBONE)
    times = time_to_first_token(decoder, {"short": ["a"], "long": ["a" * 200]}, repeats=2)
    assert set(times) == {"short", "long"}
    assert min(times.values()) > 0
    assert cache_bytes(decoder, 10) == 2 * 2 * 2 * 8 * 4 * 10  # keys+values, layers, kv heads, head size, fp32, 10


def test_a_codec_that_learns_from_an_index_is_no_system() -> None:
    with pytest.raises(InputError, match=r"the codec 'pq2' learns from the first spans of an index, .* ctxcomp codecs"):
        further_systems({}, [4.0], codecs=["int8", "pq2"])
