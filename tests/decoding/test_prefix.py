"""The text before the first span, read once: prompts that begin with it are read as without a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding import Blended, FrozenDecoder, GenerationSettings, Part, SplicedPrompt, TokenIds, splice
from ctxcomp_rag.decoding.batching import DecodingState, extend, prefill
from ctxcomp_rag.decoding.prefix import PrefixCache
from ctxcomp_rag.spans import KVSpan, SoftSpan
from tests.tiny_models import ARCHITECTURES, FULL_ATTENTION_ROPE, tiny_backbone

HEAD, MIDDLE, QUESTION = (TokenIds(tuple(range(begin, begin + 9))) for begin in (10, 30, 50))
HEAD_BYTES = 2 * 9 * 4  # of keys and values: entries of 4 bytes, for every layer, head and channel
TOLERANCE = 1e-5


def soft(backbone: Backbone) -> SoftSpan:
    embeds = torch.randn(5, backbone.hidden_size, generator=torch.Generator().manual_seed(1))
    return SoftSpan("soft", 20, torch.arange(5) * 4 + 3, 20, embeds)


def kv(backbone: Backbone) -> KVSpan:
    shape = (int(backbone.config.num_hidden_layers), backbone.num_kv_heads, 6, backbone.head_dim)
    keys, values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    return KVSpan("kv", 6, torch.arange(6), 6, keys, values)


def parts_of(kind: str, backbone: Backbone) -> list[Part]:
    """A prompt that begins with HEAD."""
    if kind == "soft":
        return [HEAD, soft(backbone), QUESTION]
    if kind == "kv":  # one run beside entries
        return [HEAD, kv(backbone), QUESTION]
    if kind == "kv between texts":  # read in one pass, in which entries stand first in the cache
        return [HEAD, kv(backbone), MIDDLE, kv(backbone), soft(backbone), QUESTION]
    return [HEAD, soft(backbone), Blended(kv(backbone), TokenIds(tuple(range(6))), 0.5), QUESTION]


def logits(state: DecodingState, backbone: Backbone) -> Tensor:
    """Of the next token, and of the two after it."""
    return torch.cat([state.logits, extend(state, [1, 2], backbone)])


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
@pytest.mark.parametrize("kind", ["soft", "kv", "kv between texts", "blended"])
@torch.inference_mode()
def test_a_head_that_is_known_changes_nothing(name: str, kind: str) -> None:
    backbone = tiny_backbone(name)
    prefixes, prompt = PrefixCache(backbone), splice(parts_of(kind, backbone), backbone)
    expected = logits(prefill([prompt], backbone), backbone)
    for _ in range(2):
        torch.testing.assert_close(logits(prefill([prompt], backbone, prefixes), backbone), expected,
                                   atol=TOLERANCE, rtol=0)
    assert (prefixes.misses, prefixes.hits) == (1, 1)


@torch.inference_mode()
def test_it_serves_every_prompt_that_begins_with_it_and_no_other() -> None:
    backbone = tiny_backbone("llama")
    prefixes = PrefixCache(backbone)
    prompts = [splice(parts_of(kind, backbone), backbone) for kind in ("kv between texts", "soft", "blended")]
    for prompt in prompts:
        torch.testing.assert_close(logits(prefill([prompt], backbone, prefixes), backbone),
                                   logits(prefill([prompt], backbone), backbone), atol=TOLERANCE, rtol=0)
    assert (prefixes.misses, prefixes.hits) == (1, 2)
    prefill([splice([TokenIds(HEAD.ids[:-1]), soft(backbone), QUESTION], backbone)], backbone, prefixes)
    assert (prefixes.misses, prefixes.hits) == (2, 2)


@torch.inference_mode()
def test_the_head_is_not_computed_again() -> None:
    backbone = tiny_backbone("llama")
    prefixes = PrefixCache(backbone)
    prompt = splice(parts_of("soft", backbone), backbone)
    prefill([prompt], backbone, prefixes)
    begun: SplicedPrompt = prefixes.begin(prompt)
    entries, rows = begun.runs
    assert entries.keys.shape[2] == len(HEAD.ids)  # type: ignore[union-attr]
    assert rows.embeds.shape[0] == prompt.length - len(HEAD.ids)  # type: ignore[union-attr]
    assert begun.length == prompt.length


@torch.inference_mode()
def test_heads_are_kept_within_a_number_of_bytes_the_oldest_used_go_first() -> None:
    backbone = tiny_backbone("llama")
    one = HEAD_BYTES * int(backbone.config.num_hidden_layers) * backbone.num_kv_heads * backbone.head_dim
    prefixes = PrefixCache(backbone, 2 * one)
    for first in (10, 11, 10, 12, 10, 11):
        head = TokenIds(tuple(range(first, first + 9)))
        prefill([splice([head, soft(backbone), QUESTION], backbone)], backbone, prefixes)
    assert (prefixes.misses, prefixes.hits) == (4, 2)  # 11 had gone for 12
    small = PrefixCache(backbone, one - 1)
    for _ in range(2):
        prefill([splice(parts_of("soft", backbone), backbone)], backbone, small)
    assert (small.misses, small.hits) == (2, 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_answers_are_the_same_from_the_second_time_on_also_where_layers_forget(name: str) -> None:
    backbone = tiny_backbone(name)
    decoder, settings = FrozenDecoder(backbone), GenerationSettings(max_new_tokens=8)
    parts = parts_of("soft", backbone)
    first, second, (batched, _) = (decoder.generate(parts, settings), decoder.generate(parts, settings),
                                   decoder.batch([parts, [QUESTION]], settings))
    assert first.token_ids == second.token_ids == batched.token_ids
    assert decoder.prefixes.hits == (0 if name in ("gemma2", "gemma3") else 1)


def test_text_alone_has_no_head() -> None:
    backbone = tiny_backbone("llama")
    assert splice([HEAD, QUESTION], backbone).head == ()
    assert splice([soft(backbone), QUESTION], backbone).head == ()
    assert splice(parts_of("kv", backbone), backbone).head == HEAD.ids
