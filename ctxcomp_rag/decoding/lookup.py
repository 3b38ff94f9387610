"""Greedy answers in fewer passes: what stands in the sources is drafted, one pass checks the whole draft.

Answers repeat their sources. The last tokens of the answer are looked up there, what follows them is fed together with
the last token, and as much of it is kept as the decoder would have said itself (prompt lookup, a speculative decoding
without a second model). A spliced prompt has slots where the text was, so the texts behind the spans are given beside
it: they are never read by the decoder, and a wrong one costs time, not correctness.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ctxcomp_rag.decoding.batching import extend, prefill, retract
from ctxcomp_rag.decoding.cache import keeps_all
from ctxcomp_rag.decoding.generation import Generation, GenerationSettings
from ctxcomp_rag.decoding.prompt import Part, TokenIds, text_ids
from ctxcomp_rag.decoding.splice import SplicedPrompt, TextPiece, lay_out
from ctxcomp_rag.errors import InputError

if TYPE_CHECKING:
    from ctxcomp_rag.decoding.decoder import FrozenDecoder

_LONGEST_MATCH = 3


@dataclass(frozen=True)
class DraftedGeneration:
    """An answer and what drafting brought.

    Attributes:
        generation: equal to that of `FrozenDecoder.generate`.
        passes: of the decoder after the prompt's; without drafts one a token, less the last.
        drafted, accepted: tokens that were drafted, and of them those that the decoder said too.
    """

    generation: Generation
    passes: int
    drafted: int
    accepted: int


@torch.inference_mode()
def generate_drafted(decoder: FrozenDecoder, parts: Sequence[Part], sources: Iterable[str | TokenIds] = (),
                     settings: GenerationSettings | None = None, *, draft_tokens: int = 8) -> DraftedGeneration:
    """The greedy answer of `decoder.generate(parts, settings)`, token for token.

    Args:
        sources: texts (or their token ids) behind the spans of the prompt; the prompt's own text is looked through too.
        draft_tokens: longest draft.

    Raises:
        InputError: the settings sample, or the prompt is beyond a cache budget; else as `generate`.
    """
    request = decoder.request(parts, settings)
    if not request.sampler.greedy or not isinstance(request.prompt, SplicedPrompt):
        raise InputError("drafts are for greedy answers (temperature 0) of prompts within the cache budget; "
                         "use generate")
    if draft_tokens < 1:
        raise InputError(f"expected draft_tokens of at least 1, got {draft_tokens}")
    backbone, progress = decoder.backbone, request.progress
    texts = [piece.ids for piece in lay_out(parts, backbone).pieces if isinstance(piece, TextPiece)]
    texts += [text_ids(source, backbone.tokenizer) for source in sources]
    state = prefill([request.prompt], backbone, decoder.prefixes)
    drafting = keeps_all(state.cache)  # a layer that forgets cannot take a draft back
    passes = drafted = accepted = 0
    progress.take(state.logits[0], request.sampler)
    while progress.finish_reason is None:
        room = min(draft_tokens, progress.settings.max_new_tokens - progress.num_generated - 1) if drafting else 0
        draft = find_draft([*texts, progress.token_ids], progress.token_ids, room)
        logits = extend(state, [progress.token_ids[-1], *draft], backbone)
        passes, drafted, kept = passes + 1, drafted + len(draft), 0
        for row, guess in zip(logits, [*draft, None], strict=True):
            token = progress.take(row, request.sampler)
            if progress.finish_reason is not None or token != guess:
                break
            kept += 1
        accepted += kept
        retract(state, len(draft) - kept)
    return DraftedGeneration(request.generation, passes, drafted, accepted)


def find_draft(texts: Sequence[Sequence[int]], said: Sequence[int], room: int) -> list[int]:
    """At most `room` tokens that follow the longest end of `said` (up to three tokens) found in one of the texts."""
    if room <= 0:
        return []
    for length in range(min(_LONGEST_MATCH, len(said)), 0, -1):
        end = list(said[-length:])
        for ids in texts:
            # the last token of a text has nothing after it
            for begin in range(len(ids) - length):
                if ids[begin + length - 1] == end[-1] and list(ids[begin : begin + length]) == end:
                    return list(ids[begin + length : begin + length + room])
    return []


__all__ = ["DraftedGeneration", "find_draft", "generate_drafted"]
