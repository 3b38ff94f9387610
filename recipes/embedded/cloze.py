"""Questions made of a text's own sentences: a span is asked for, and some of the other words are left out.

They teach to find the sentence that shares words with the question and to give the span that it lacks, for which
SQuAD's own questions are too few and too free.
"""

from __future__ import annotations

import random
import re

SENTENCE_GAP = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")
# A span of text that could be an answer, and the words that ask for its kind.
_ANSWERS = ((re.compile(r"\b(?:1[0-9]|20)\d\d\b"), ("when", "what year")),
            (re.compile(r"(?<![\w.,])\d[\d.,]*\d(?:st|nd|rd|th|%)?(?!\w)|\b\d\b"), ("how many", "how much", "what")),
            (re.compile(r"(?<=[a-z,;(] )[A-Z][\w'-]+(?: (?:of |the |de |van )?[A-Z][\w'-]+){0,3}"),
             ("who", "where", "what", "which")),
            (re.compile(r"(?<= (?:the|and|for|its|are|was) )[a-z]{4,}(?: [a-z]{4,})?"), ("what", "what")))


def cloze_questions(rng: random.Random, text: str, count: int) -> list[tuple[str, str]]:
    """At most `count` questions with their answers, each about another sentence; the answer stands in the text."""
    sentences = [s for s in SENTENCE_GAP.split(text) if 5 <= len(s.split()) <= 60]
    pairs = []
    for sentence in rng.sample(sentences, min(count, len(sentences))):
        found = [(m, words) for pattern, words in _ANSWERS for m in pattern.finditer(sentence)]
        if not found:
            continue
        kind = rng.choice(sorted({words for _, words in found}))
        match, words = rng.choice([f for f in found if f[1] == kind])
        reach, drop = rng.randint(4, 12), rng.choice((0.0, 0.15, 0.3))
        before = [w for w in sentence[: match.start()].split()[-reach:] if rng.random() >= drop]
        after = [w.rstrip(".") for w in sentence[match.end() :].split()[:reach] if rng.random() >= drop]
        if len(before) + len(after) < 3:
            continue
        asked = rng.choice(words)
        order = [asked, *after, *before] if rng.random() < 0.3 else [asked, *before, *after] \
            if rng.random() < 0.7 else [*before, asked, *after]
        question = " ".join(order)
        pairs.append((question[0].upper() + question[1:].rstrip(",;: ") + "?", match.group()))
    return pairs
