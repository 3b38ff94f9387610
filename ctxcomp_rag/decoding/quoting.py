"""Answers that quote: every one is a run of words of its sources.

A span holds a text well enough to find an answer in it, and not every letter of a name. The text itself lies beside
the span, and the decoder need not read it to be held to what it says: of the next tokens, those are left that keep the
answer a piece of a source (as autoregressive retrieval is held to strings of its corpus: Bevilacqua et al., 2022,
arXiv 2204.10628).
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

_BLOCK = 64  # tokens looked at together, the likeliest first
_IN_A_NUMBER = re.compile(r"\d[.,:/'\u2019]\d")
_POWER_OF_TEN = re.compile(r"\d[eE][-+\u2212]\d")
_SIGNS = "-+\u2212"


class Quoting:
    """What an answer may say: words of one of the sources, as they stand there; or one of the refusals.

    White space counts as one space. An answer begins and ends where a word does (in scripts without capital letters,
    where some set no words apart, anywhere), and takes no number apart (unless its groups are set apart by spaces).
    """

    def __init__(self, sources: Sequence[str], refusals: Sequence[str] = ()) -> None:
        self.sources = [squeezed(source).strip() for source in sources]
        self.refusals = [squeezed(refusal).strip() for refusal in refusals]

    def may_begin(self, said: str, half: bytes = b"") -> bool:
        """Whether an answer may begin with this, and go on with a character that begins with these bytes."""
        words = squeezed(said).lstrip()
        refused = ((refusal, len(words)) for refusal in self.refusals if refusal.startswith(words))
        ends = chain(refused, self._ends(words))
        if half:
            return any(text[end : end + 1].encode().startswith(half) for text, end in ends)
        return not words or any(True for _ in ends)

    def may_end(self, said: str) -> bool:
        """Whether this may be a whole answer."""
        words = squeezed(said).strip()
        return words in self.refusals or (words != "" and any(not cuts(source, end)
                                                              for source, end in self._ends(words)))

    def whole(self, said: str) -> str:
        """The longest beginning that may be a whole answer; nothing where none may."""
        return next((said[:end] for end in range(len(said), 0, -1) if self.may_end(said[:end])), "")

    def _ends(self, words: str) -> Iterator[tuple[str, int]]:
        """Where the words stand: a source, and the place behind them."""
        for source in self.sources:
            begin = source.find(words)
            while begin >= 0:
                if not cuts(source, begin):
                    yield source, begin + len(words)
                begin = source.find(words, begin + 1)


def squeezed(text: str) -> str:
    """The text with one space for every run of white space."""
    return re.sub(r"\s+", " ", text)


def cuts(text: str, place: int) -> bool:
    """Whether a cut in front of the character at this place goes through a word, a number or a letter's marks."""
    if not 0 < place < len(text):
        return False
    before, behind = text[place - 1], text[place]
    kinds = unicodedata.category(before), unicodedata.category(behind)
    if kinds[1].startswith("M") or "Cf" in kinds:
        return True
    if before in _SIGNS and behind.isdigit() and not text[: place - 1][-1:].isalnum():
        return True
    if any(shape.fullmatch(text, begin, begin + length) for shape, length in ((_IN_A_NUMBER, 3), (_POWER_OF_TEN, 4))
           for begin in range(max(0, place - length + 1), place)):
        return True
    return before.isalnum() and behind.isalnum() and "Lo" not in kinds


def whole_characters(spelt: bytes) -> tuple[str, bytes] | None:
    """The characters that UTF-8 bytes spell and the first bytes of one more; None where they are something else."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return decoder.decode(spelt), decoder.getstate()[0]
    except UnicodeDecodeError:
        return None


def likeliest(scores: Tensor, allowed: Callable[[int], bool]) -> int | None:
    """The token of the highest score (vocab_size,) that is allowed; None where none is."""
    return next((token for block in _ranked(scores) for token in block if allowed(token)), None)


def narrowed(scores: Tensor, allowed: Callable[[int], bool]) -> Tensor | None:
    """Scores (vocab_size,) of the likeliest tokens that are allowed, the others -inf; None where none is.

    Of blocks of tokens, the likeliest first, the first one that has an allowed token decides.
    """
    lowest = float("-inf")
    kept = next((kept for block in _ranked(scores)
                 if (kept := [token for token in block if scores[token] > lowest and allowed(token)])), None)
    if kept is None:
        return None
    index = torch.tensor(kept, device=scores.device)
    return torch.full_like(scores, lowest).index_copy(0, index, scores[index])


def _ranked(scores: Tensor) -> Iterator[list[int]]:
    """All tokens in blocks, the likeliest first."""
    yield scores.topk(min(_BLOCK, len(scores))).indices.tolist()
    every = scores.argsort(descending=True)  # hardly ever: the first block mostly has what is sought
    for begin in range(0, len(every), _BLOCK):
        yield every[begin : begin + _BLOCK].tolist()


__all__ = ["Quoting", "cuts", "likeliest", "narrowed", "squeezed", "whole_characters"]
